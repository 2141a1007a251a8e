"""Cache of preprocessed volumes: windowed float16 slices and uint8 labels at network size.

One uncompressed `.npz` per case, named after the case and a hash of all inputs, so a changed file,
window, size or label table makes a new cache file and a stale one is never read. Files are verified
(zip checksums) before use and rebuilt if damaged. Writing a file removes those made from earlier
contents of the same source files, which cannot be used again.
"""

import contextlib
import hashlib
import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pgpsam_jax.data.io.array_files import Source
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.io.pairing import LOST, pair_grids
from pgpsam_jax.data.io.volumes import digest, files_of, read_grid, read_image, read_label
from pgpsam_jax.data.io.voxel_grid import AXIAL, SourceGrid, to_source
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.letterbox import Letterbox, to_model
from pgpsam_jax.data.preprocessing import Preprocessing, intensity_limits, is_relative
from pgpsam_jax.data.quality import appearance, clipping
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import atomic_path

FORMAT = 1  # increase it whenever the content of cache files changes
_BLOCK = 16  # slices resized at a time


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A verified cache file.

    Attributes:
        areas: (D, K) native pixels per slice and class.
        meta: spacing (mm) and shape in display order (D, H, W), source orientation, SHA-256 of both
            sources, and the key.
    """

    case: Case
    file: Path
    areas: np.ndarray
    meta: dict

    @property
    def case_id(self) -> str:
        return self.case.case_id

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.meta["shape"])

    @property
    def spacing(self) -> tuple[float, float, float]:
        return tuple(self.meta["spacing"])

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns images (D, S, S) float16 in [0, 1] and labels (D, S, S) uint8."""
        with np.load(self.file, allow_pickle=False) as file:
            return file["images"], file["labels"]


def build_cache(
    cases: Sequence[Case], table: LabelTable, preprocessing: Preprocessing, folder
) -> list[CachedCase]:
    """Creates or reuses the cache file of each case in `folder`, in order.

    Raises:
        UserError: unreadable or mismatching files, or label ids outside the table.
    """
    progress = tqdm(cases, desc="reading volumes", unit="case", leave=False)
    cached = [_cached(case, table, preprocessing, Path(folder)) for case in progress]
    clipped = {case.case_id: case.meta.get("clipped") for case in cached}
    if message := clipping.message(clipped, preprocessing.window):
        warnings.warn(message, stacklevel=2)
    return cached


def _recipe(table: LabelTable, preprocessing: Preprocessing) -> dict:
    """Returns the settings that a cache file depends on, as JSON."""
    recipe = {
        "format": FORMAT,
        "window": list(map(float, preprocessing.window)),
        "size": preprocessing.image_size,
        "table": table.to_json(),
    }
    # Defaults are omitted, which keeps older files valid.
    if preprocessing.levels:
        recipe["levels"] = preprocessing.levels
    if is_relative(preprocessing.window):
        recipe[type(preprocessing.window).__name__.lower()] = True
    if preprocessing.axis != AXIAL:
        recipe["axis"] = preprocessing.axis
    return recipe


def read_case(case: Case, table: LabelTable, axis: str = AXIAL) -> tuple[Volume, np.ndarray]:
    """Reads an image and its class ids (D, H, W) uint8 on the same native grid.

    The label is reoriented to the image (see `pairing`), with a warning if their affines disagree.

    Args:
        case: with a label.
        table: maps source ids to class ids.
        axis: the axis to slice along, one of `voxel_grid.AXES`.

    Raises:
        UserError: image and label do not match.
    """
    image = read_image(case.image, axis)
    return image, read_truth(image.source, case.truth, table)


def read_truth(image: SourceGrid, label: Source, table: LabelTable) -> np.ndarray:
    """Reads the class ids (D, H, W) uint8 of an image whose grid is known; see `read_case`."""
    volume = read_label(label)
    pairing = pair_grids(image, volume.source)
    if pairing.remark:
        warnings.warn(f"{label} {pairing.remark}", stacklevel=2)
    ids = pairing.display(to_source(volume.array, volume.source))
    return table.remap(np.ascontiguousarray(ids), label)


def gather_slices(
    cached: Sequence[CachedCase], entries: Sequence[tuple[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, S, S) float16 and labels (N, S, S) uint8 of (case_id, slice) entries.

    Each case is read once, one at a time.
    """
    ids = np.array([case_id for case_id, _ in entries], str)
    indices = np.array([index for _, index in entries], int)
    unknown = sorted({*ids.tolist()} - {case.case_id for case in cached})
    if unknown:
        raise UserError(f"slices are wanted of cases that are not cached: {', '.join(unknown)}")
    found = None
    for case in cached:
        rows = np.flatnonzero(ids == case.case_id)
        if not len(rows):
            continue
        case_images, case_labels = case.load()
        if found is None:
            shape = (len(entries), *case_images.shape[1:])
            found = np.empty(shape, np.float16), np.empty(shape, np.uint8)
        images, labels = found
        images[rows], labels[rows] = case_images[indices[rows]], case_labels[indices[rows]]
    if found is None:
        raise UserError("no slices to gather; the few-shot list is empty")
    return found


def _cached(
    case: Case, table: LabelTable, preprocessing: Preprocessing, folder: Path
) -> CachedCase:
    for path in (case.image, case.truth):
        if not path.is_file():
            raise UserError(f"case {case.case_id}: file {path} not found; check the data folder")
    sources = {"image": digest(case.image), "label": digest(case.truth)}
    pairing = pair_grids(read_grid(case.image), read_grid(case.truth))
    content = _recipe(table, preprocessing) | {"sources": sources}
    if pairing.code == LOST or (pairing.code and pairing.turns):  # formerly paired in another way
        content["pairing"] = pairing.code
    text = json.dumps(content, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    file = folder / f"{case.case_id}-{key[:16]}.npz"
    found = _verify(file, key)
    if found is None:
        about = {"key": key, "sources": sources, "places": _places(case)}
        _build(file, case, table, preprocessing, about)
        found = _verify(file, key)
        if found is None:
            raise UserError(f"cache file {file} is damaged right after writing; check the disk")
        _remove_outdated(folder, about | {"case_id": case.case_id})
    return CachedCase(case, file, *found)


def _places(case: Case) -> str:
    """Returns a hash of the paths of a case."""
    files = [str(file.absolute()) for s in (case.image, case.truth) for file in files_of(s)]
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()


def _remove_outdated(folder: Path, about: dict) -> None:
    """Removes cache files made from earlier contents of the same source files.

    Those for another window, size or table are kept, as are those of other data sets with the same
    case id: several runs may share the folder.
    """
    for file in folder.glob(f"{about['case_id']}-*.npz"):
        with contextlib.suppress(Exception):  # unreadable files are kept
            meta = _meta(file)
            same = all(meta[name] == about[name] for name in ("case_id", "places"))
            if same and meta["sources"] != about["sources"]:
                file.unlink()


def _meta(file: Path) -> dict:
    with np.load(file, allow_pickle=False) as arrays:
        return json.loads(str(arrays["meta"]))


def _verify(file: Path, key: str) -> tuple[np.ndarray, dict] | None:
    """Returns areas and metadata of an intact cache file with this key, else None."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum")
        with np.load(file, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            intact = meta["key"] == key and {"images", "labels"} <= set(arrays.files)
            current = "appearance" in meta  # missing in older files
            return (arrays["areas"], meta) if intact and current else None
    except FileNotFoundError:
        return None
    except Exception as error:  # damage raises a dozen types, all with the same remedy
        warnings.warn(f"cache file {file} is damaged ({error}); rebuilding it", stacklevel=2)
        return None


def _build(
    file: Path, case: Case, table: LabelTable, preprocessing: Preprocessing, meta: dict
) -> None:
    image, ids = read_case(case, table, preprocessing.axis)
    (depth, *native), size = image.array.shape, preprocessing.image_size
    letterbox = Letterbox.of(tuple(native), size)
    limits = intensity_limits(preprocessing.window, image.array)
    images = np.empty((depth, size, size), np.float16)
    labels = np.empty((depth, size, size), np.uint8)
    for start in range(0, depth, _BLOCK):
        part = slice(start, start + _BLOCK)
        images[part] = preprocessing.to_model(image.array[part], limits)
        labels[part] = to_model(ids[part], letterbox, order=0)
    meta = meta | {
        "case_id": case.case_id,
        "shape": list(image.array.shape),
        "spacing": list(image.spacing),
        "orientation": image.source.orientation,
        "window": list(map(float, preprocessing.window)),
        "appearance": appearance.describe(image.array, ids),
        "clipped": clipping.describe(image.array[ids > 0], limits),
    }
    areas, described = slice_areas(ids, table.num_classes), np.array(json.dumps(meta))
    with atomic_path(file) as temporary:
        np.savez(temporary, meta=described, images=images, labels=labels, areas=areas)


def slice_areas(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels per slice and class, (D, H, W) -> (D, K)."""
    return np.stack([np.bincount(part.ravel(), minlength=num_classes) for part in ids])
