"""Checks of one case (image, label and their match), recorded as plain JSON.

Unreadable files are findings, not exceptions. JAX is not imported: worker processes run this.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pgpsam_jax.data.findings import ERROR, WARNING, BadFile, Finding
from pgpsam_jax.data.io import nifti, volumes
from pgpsam_jax.data.io.array_files import ArrayFiles, Source
from pgpsam_jax.data.io.pairing import pair_grids
from pgpsam_jax.data.io.voxel_grid import SourceGrid, to_source
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.preprocessing import Window, intensity_limits, is_relative
from pgpsam_jax.data.quality import appearance, clipping
from pgpsam_jax.data.quality.organ_priors import describe, flips_of
from pgpsam_jax.errors import UserError

_HU = (-2048, 4000)
_MAX_ID = 4096  # larger ids skip the anatomy checks


def check_case(case: Case, table: LabelTable | None = None, window: Window | None = None) -> dict:
    """Runs all checks of a case.

    Args:
        table: label table of the data set; without one, label values are not checked.
        window: intensities that a run maps to [0, 1]; without one, clipping is not checked.

    Returns:
        `{"case", "part", "group", "files": [record], "features": {id: [floats]}}`. The record of a
        file has `file`, `kind` ("image" or "label"), `findings` and, if readable, `shape`
        (D, H, W), `spacing` (mm), `orientation`, `content` (SHA-256 of the voxels in display
        orientation) and `range` or `voxels` (`{id: count}`).
    """
    record: dict[str, Any] = {"case": case.case_id, "part": case.part, "group": case.group}
    record["features"] = {}
    image = _File(case.image, "image", np.float32)
    files = [image]
    image.run(lambda: _check_image(image, window))
    if case.label is not None:
        label = _File(case.label, "label", np.int32)
        files.append(label)
        label.run(lambda: _check_label(label, table))
        label.run(lambda: _check_pair(image, label, record, table, window))
    record["files"] = [file.record for file in files]
    return record


class _File:
    """A file under check: its record and, as far as readable, its voxel grid and array."""

    def __init__(self, source: Source, kind: str, dtype):
        self.source, self.has_grid = source, not isinstance(source, ArrayFiles)
        self.record: dict[str, Any] = {"file": str(source), "kind": kind, "findings": []}
        self.grid: SourceGrid | None = None
        self.array: np.ndarray | None = None
        self.run(lambda: self._read(dtype))

    def add(self, code: str, message: str, level: str = ERROR) -> None:
        message = message.removeprefix(f"{self.source} ")
        finding = Finding(level, code, self.record["file"], message)
        self.record["findings"].append(finding.to_json())

    def warn(self, code: str, message: str) -> None:
        self.add(code, message, WARNING)

    def run(self, action: Callable[[], None]) -> None:
        """Runs a check and records any exception as a finding."""
        try:
            action()
        except UserError as error:
            self.add(error.code if isinstance(error, BadFile) else "content", str(error))
        except MemoryError:
            self.add("size", "does not fit in memory; crop it, or use a larger machine")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            self.add("unreadable", f"cannot be read ({what:.200}); export it again")

    def _read(self, dtype) -> None:
        raw, grid, trailing = volumes.read_raw(self.source)
        self.grid, shape = grid, list(grid.display_shape)
        self.record |= {"shape": shape, "spacing": [round(s, 5) for s in grid.spacing]}
        self.record["orientation"] = grid.orientation if self.has_grid else None
        if trailing:
            more = f"{trailing} bytes" if trailing < 1 << 20 else "a MiB or more"
            message = f"has {more} after its voxel data; check its header"
            self.warn("trailing", message)
        if self.has_grid:
            self.run(lambda: self._check_grid(grid))
        self.array = array = nifti.to_volume(raw, grid, dtype).array
        content = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        content.update(array.data)
        self.record["content"] = content.hexdigest()

    def _check_grid(self, grid: SourceGrid) -> None:
        for code, message in grid.remarks().items():
            self.warn(code, message)
        slope, inter = nifti.scale_of(grid)
        if self.record["kind"] == "label" and (slope, inter) != (1.0, 0.0):
            self.warn(
                "scaled",
                f"stores label ids with a scale factor ({slope:.6g}, intercept {inter:g}), so they "
                "had to be rounded; save them as integers without scaling",
            )


def _check_image(image: _File, window) -> None:
    array = image.array
    if array is None or image.grid is None:
        return
    low, high = float(array.min()), float(array.max())
    relative = window is not None and is_relative(window)
    image.record |= {"range": [low, high], "appearance": appearance.describe(array)}
    image.record["thick_axis"] = image.grid.thick_axis if image.has_grid else None
    if low == high:
        image.warn("constant", f"has the constant value {low:g}; check that it is an image")
    elif image.has_grid and (low < _HU[0] or high > _HU[1]) and not relative:
        image.warn(
            "intensity",
            f"has values from {low:g} to {high:g}, outside [{_HU[0]}, {_HU[1]}] HU; if it is a CT, "
            "check its scale",
        )
    if window is not None and not relative:
        seen = min(high, window[1]) - max(low, window[0])
        if seen < 0.05 * (window[1] - window[0]) and low < high:
            image.add(
                "window",
                f"has values from {low:g} to {high:g}, almost all of them outside data.window "
                f"{tuple(window)}; set data.window to the intensities of the data",
            )


def _check_label(label: _File, table: LabelTable | None) -> None:
    if label.array is None:
        return
    counts = _counts(label.array)
    label.record["voxels"] = {str(i): n for i, n in counts.items()}
    if set(counts) == {0}:
        label.warn("empty", "is all background; remove the case or label it")
    if table is None:
        return
    if unknown := table.describe_unknown(counts):
        label.add("unknown_label", unknown)
    classes = {table.source_to_class[i] for i in counts if i in table.source_to_class}
    absent = [name for k, name in enumerate(table.names) if k and k not in classes]
    if absent and set(counts) != {0}:
        label.warn(
            "absent",
            f"has no {', '.join(absent)}; if the scan shows them, check the label and the table",
        )


def _counts(ids: np.ndarray) -> dict[int, int]:
    """Number of voxels per id, sorted by id."""
    if ids.min() < 0 or ids.max() > 1 << 16:
        values, numbers = np.unique(ids, return_counts=True)
        return dict(zip(values.tolist(), numbers.tolist(), strict=True))
    top = int(ids.max()) + 1
    total = np.zeros(top, np.int64)
    for part in ids:  # slice by slice, as bincount converts its input to int64
        total += np.bincount(part.ravel(), minlength=top)
    return {int(i): int(total[i]) for i in np.flatnonzero(total)}


def _check_pair(image: _File, label: _File, record: dict, table: LabelTable | None, window) -> None:
    if image.grid is None or label.grid is None:
        return
    pairing = pair_grids(image.grid, label.grid)
    if pairing.remark:
        label.warn(pairing.code, pairing.remark)
    array, ids = image.array, label.array
    if ids is None or array is None or ids.min() < 0 or ids.max() > _MAX_ID:
        return
    ids = pairing.display(to_source(ids, label.grid))
    if table is not None:  # ids that the table ignores are not organs
        kept = np.arange(_MAX_ID + 1, dtype=np.int32)
        kept[[not table.source_to_class.get(i) for i in range(_MAX_ID + 1)]] = 0
        ids = kept[ids]
    image.record["appearance"] = appearance.describe(array, ids)
    if window is not None:
        limits = intensity_limits(window, array)
        image.record["clipped"] = clipping.describe(array[ids > 0], limits)
    features = describe(array, ids, image.grid.spacing, has_grid=image.has_grid)
    record["features"] = {str(i): values for i, values in features.items()}
    if table is not None and image.has_grid:
        if flips := flips_of(features, table.organs):
            label.warn(
                "turned",
                f"has its organs where they would be with {flips}; check the affine of the image",
            )
