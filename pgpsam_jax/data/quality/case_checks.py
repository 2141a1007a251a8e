"""The checks of one case: its image, its label and the two together, as a record in plain JSON.

A record never raises: what cannot be read is a finding. Without JAX, for worker processes.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from pgpsam_jax.data.findings import ERROR, WARNING, BadFile, Finding
from pgpsam_jax.data.io import nifti, volumes
from pgpsam_jax.data.io.array_files import ArrayFiles, Source
from pgpsam_jax.data.io.pairing import pair_grids
from pgpsam_jax.data.io.voxel_grid import to_source
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.letterbox import Percentiles, Window, ends_of
from pgpsam_jax.data.quality import appearance
from pgpsam_jax.data.quality.organ_priors import describe, turned
from pgpsam_jax.errors import UserError

_HU = (-2048, 4000)
_CUT = 0.1  # of the labelled voxels, outside the window
_MAX_ID = 4096  # ids beyond get no anatomy


def check_case(case: Case, table: LabelTable | None = None, window: Window | None = None) -> dict:
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
        label.guarded(lambda: _check_pair(image, label, record, table, window))
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
        for code, message in self.grid.remarks():
            self.add(WARNING, code, message)
        slope, inter = nifti.scale_of(self.grid)
        if self.record["kind"] == "label" and (slope, inter) != (1.0, 0.0):
            self.add(
                WARNING,
                "scaled",
                f"has a scale factor ({slope:.6g}, intercept {inter:g}), which its label ids are "
                "rounded for; save them as integers without one",
            )


def _check_image(image: _File, window) -> None:
    array = image.array
    if array is None:
        return
    low, high = float(array.min()), float(array.max())
    image.record |= {"range": [low, high], "appearance": appearance.describe(array)}
    image.record["thick_axis"] = image.grid.thick_axis if image.has_grid else None
    if low == high:
        image.add(WARNING, "constant", f"has the same value {low:g} everywhere; is it an image?")
    elif image.has_grid and (low < _HU[0] or high > _HU[1]):
        image.add(
            WARNING,
            "intensity",
            f"holds {low:g} to {high:g}, outside [{_HU[0]}, {_HU[1]}] HU; check its scale if it is "
            "a CT",
        )
    if window is not None and not isinstance(window, Percentiles):
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


def _check_pair(image: _File, label: _File, record: dict, table: LabelTable | None, window) -> None:
    if image.grid is None or label.grid is None:
        return
    pairing = pair_grids(image.grid, label.grid)
    if pairing.remark:
        label.add(WARNING, pairing.code, pairing.remark)
    ids = label.array
    if ids is None or image.array is None or ids.min() < 0 or ids.max() > _MAX_ID:
        return
    ids = pairing.display(to_source(ids, label.grid))
    if table is not None:  # what the table ignores must not count as an organ
        listed = np.arange(_MAX_ID + 1, dtype=np.int32)
        listed[[not table.source_to_class.get(i) for i in range(_MAX_ID + 1)]] = 0
        ids = listed[ids]
    image.record["appearance"] = appearance.describe(image.array, ids)
    if window is not None:
        _check_cut(image, ids, ends_of(window, image.array))
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


def _check_cut(image: _File, ids: np.ndarray, window) -> None:
    """Say how much of what is labelled the window clips."""
    values = image.array[ids > 0]
    if not len(values):
        return
    below, above = float(np.mean(values < window[0])), float(np.mean(values > window[1]))
    if below + above > _CUT:
        image.add(
            WARNING,
            "cut",
            f"has {below + above:.0%} of its labelled voxels outside data.window "
            f"({window[0]:g}, {window[1]:g}) ({below:.0%} below, {above:.0%} above), where nothing "
            f"can be told apart; they range from {np.quantile(values, 0.005):.4g} to "
            f"{np.quantile(values, 0.995):.4g}: set data.window to show them",
        )
