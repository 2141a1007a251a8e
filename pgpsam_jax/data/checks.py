"""The checks of one case: its image, its label and the two together, as a record in plain JSON.

A record never raises: what cannot be read is a finding. Without JAX, for worker processes.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from pgpsam_jax.data import nifti, volumes
from pgpsam_jax.data.anatomy import describe, turned
from pgpsam_jax.data.arrays import ArrayFiles
from pgpsam_jax.data.cases import Case, Source
from pgpsam_jax.data.findings import ERROR, WARNING, BadFile, Finding
from pgpsam_jax.data.grid import TOLERANCE_MM, SourceGrid, corner_distance, to_display, to_source
from pgpsam_jax.data.labels import LabelTable
from pgpsam_jax.errors import UserError

_SPACING = 1e-3  # relative
_HU = (-2048, 4000)
_SHEAR = 1e-3  # cosine between axes
_MAX_ID = 4096  # ids beyond get no anatomy


def check_case(
    case: Case, table: LabelTable | None = None, window: tuple[float, float] | None = None
) -> dict:
    """All there is to say about a case.

    `{"case", "part", "files": [record], "features": {id: [floats]}}`; a file's record has `file`,
    `kind` ("image" or "label"), `findings` and, where it could be read, `shape` (D, H, W),
    `spacing` (mm), `orientation`, `content` (SHA-256 of the voxels in display orientation) and
    `range` or `voxels` (`{id: number}`). `window`: the intensities that a run maps to [0, 1].
    """
    record = {"case": case.case_id, "part": case.part, "features": {}}
    image = _File(case.image, "image", np.float32)
    files = [image]
    image.guarded(lambda: _check_image(image, window))
    if case.label is not None:
        label = _File(case.label, "label", np.int32)
        files.append(label)
        label.guarded(lambda: _check_label(label, table))
        label.guarded(lambda: _check_pair(image, label, record, table))
    record["files"] = [file.record for file in files]
    return record


class _File:
    """A file being checked: its record, and grid and display array as far as it can be read."""

    def __init__(self, source: Source, kind: str, dtype):
        self.source, self.has_grid = source, not isinstance(source, ArrayFiles)
        self.record = {"file": str(source), "kind": kind, "findings": []}
        self.raw = self.grid = self.array = None
        self.guarded(lambda: self._read(dtype))

    def add(self, level: str, code: str, message: str) -> None:
        message = message.removeprefix(f"{self.source} ")
        finding = Finding(level, code, self.record["file"], message)
        self.record["findings"].append(finding.to_json())

    def guarded(self, action: Callable[[], None]) -> None:
        """Whatever goes wrong with a file is a finding, and the next one is looked at."""
        try:
            action()
        except UserError as error:
            self.add(ERROR, error.code if isinstance(error, BadFile) else "content", str(error))
        except MemoryError:
            self.add(ERROR, "size", "does not fit into memory; crop it, or use a larger machine")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            self.add(ERROR, "unreadable", f"cannot be read ({what:.200}); export it again")

    def _read(self, dtype) -> None:
        raw, self.grid, trailing = volumes.read_raw(self.source)
        shape = list(self.grid.display_shape)
        self.record |= {"shape": shape, "spacing": [round(s, 5) for s in self.grid.spacing]}
        self.record["orientation"] = self.grid.orientation if self.has_grid else None
        if trailing:
            more = f"{trailing} bytes" if trailing < 1 << 20 else "a MiB or more"
            message = f"holds {more} behind its voxels; check that its header is right"
            self.add(WARNING, "trailing", message)
        if self.has_grid:
            self.guarded(self._check_grid)
        self.array = nifti.to_volume(raw, self.grid, dtype).array
        content = hashlib.sha256(f"{self.array.dtype} {self.array.shape}".encode())
        content.update(self.array)
        self.record["content"] = content.hexdigest()

    def _check_grid(self) -> None:
        grid = self.grid
        (qform, qcode), (sform, scode) = grid.qform, grid.sform
        if qcode and scode:
            distance = corner_distance(grid.shape[:3], qform, sform)
            if not distance <= TOLERANCE_MM:
                self.add(
                    WARNING,
                    "two_affines",
                    f"has a qform and an sform that differ by up to {distance:.2f} mm; programs "
                    "disagree on which one counts, here it is the sform",
                )
        columns = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
        shear = np.abs(columns.T @ columns - np.eye(3)).max()
        if shear > _SHEAR:
            degrees = np.degrees(np.arcsin(min(shear, 1.0)))
            self.add(
                WARNING,
                "shear",
                f"has axes {degrees:.2f} degrees from a right angle, which other tools refuse; "
                "resample it if that is not meant",
            )


def _check_image(image: _File, window) -> None:
    array = image.array
    if array is None:
        return
    low, high = float(array.min()), float(array.max())
    image.record["range"] = [low, high]
    if low == high:
        image.add(WARNING, "constant", f"has the same value {low:g} everywhere; is it an image?")
    elif image.has_grid and (low < _HU[0] or high > _HU[1]):
        image.add(
            WARNING,
            "intensity",
            f"holds {low:g} to {high:g}, outside [{_HU[0]}, {_HU[1]}] HU; check its scale if it is "
            "a CT",
        )
    if window is not None:
        seen = min(high, window[1]) - max(low, window[0])
        if seen < 0.05 * (window[1] - window[0]) and low < high:
            image.add(
                ERROR,
                "window",
                f"holds {low:g} to {high:g}, of which data.window {tuple(window)} shows next to "
                "nothing; set data.window to the intensities of the data",
            )


def _check_label(label: _File, table: LabelTable | None) -> None:
    if label.array is None:
        return
    counts = _counts(label.array)
    label.record["voxels"] = {str(i): n for i, n in counts.items()}
    if set(counts) == {0}:
        label.add(WARNING, "empty", "is all background; leave the case out or label it")
    if table is None:
        return
    if table.other == "error":
        unknown = {i: n for i, n in counts.items() if i not in table.source_to_class}
        if unknown:
            listed = ", ".join(f"{i} ({n} voxels)" for i, n in list(unknown.items())[:10])
            more = ", ..." if len(unknown) > 10 else ""
            label.add(
                ERROR,
                "unknown_label",
                f"holds label values outside the label table: {listed}{more}; list them in the "
                'table or set its "other" to "background"',
            )
    classes = {table.source_to_class[i] for i in counts if i in table.source_to_class}
    absent = [name for k, name in enumerate(table.names) if k and k not in classes]
    if absent and set(counts) != {0}:
        label.add(
            WARNING,
            "absent",
            f"has no {', '.join(absent)}; if the patient has, check the label and the table",
        )


def _counts(ids: np.ndarray) -> dict[int, int]:
    """Voxels of every id, sorted by id."""
    if ids.min() < 0 or ids.max() > 1 << 16:
        values, numbers = np.unique(ids, return_counts=True)
        return dict(zip(values.tolist(), numbers.tolist(), strict=True))
    top = int(ids.max()) + 1
    total = np.zeros(top, np.int64)
    for part in ids:  # slice by slice: the count converts what it counts
        total += np.bincount(part.ravel(), minlength=top)
    return {int(i): int(total[i]) for i in np.flatnonzero(total)}


def _check_pair(image: _File, label: _File, record: dict, table: LabelTable | None) -> None:
    if image.grid is None or label.grid is None:
        return
    ids = label.array
    distance = image.grid.distance(label.grid)
    if image.grid.display_shape != label.grid.display_shape or distance > TOLERANCE_MM:
        ids = _check_grids(image.grid, label, distance)
    if ids is None or image.array is None or ids.min() < 0 or ids.max() > _MAX_ID:
        return
    if table is not None:  # what the table ignores must not count as an organ
        listed = np.arange(_MAX_ID + 1, dtype=np.int32)
        listed[[i not in table.source_to_class for i in range(_MAX_ID + 1)]] = 0
        ids = listed[ids]
    features = describe(image.array, ids, image.grid.spacing, has_grid=image.has_grid)
    record["features"] = {str(i): values for i, values in features.items()}
    if table is not None and image.has_grid:
        names = {i: table.names[k] for i, k in table.source_to_class.items() if k}
        if how := turned(features, names):
            label.add(
                WARNING,
                "turned",
                f"has its organs as if the volume lay with {how}; check the affine of the image",
            )


def _check_grids(grid: SourceGrid, label: _File, distance: float) -> np.ndarray | None:
    """Label ids on the image's voxels, as training would pair them, else None."""
    other, ids = label.grid, label.array
    if grid.shape[:3] == other.shape[:3]:
        if ids is not None:
            ids = to_display(to_source(ids, other), grid)
    elif grid.display_shape != other.display_shape:
        label.add(
            ERROR,
            "shape_mismatch",
            f"has shape {other.display_shape} but its image {grid.display_shape} (slices, rows, "
            "columns); pair the right files or resample the label",
        )
        return None
    spacing = np.abs(np.array(other.spacing) / grid.spacing - 1).max() > _SPACING
    voxels = [" x ".join(f"{s:.4g}" for s in g.spacing) for g in (other, grid)]
    sizes = f", with voxels of {voxels[0]} mm and {voxels[1]} mm" if spacing else ""
    label.add(
        WARNING,
        "affine_mismatch",
        f"lies up to {distance:.2f} mm off its image by its affine{sizes}; voxels are paired as "
        "they are stored: look at an overlay, then copy the affine from the image",
    )
    return ids
