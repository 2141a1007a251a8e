"""The test volumes of a run with their truth and predictions."""

from typing import NamedTuple

import numpy as np

from pgpsam_jax.checkpointing import locations
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.io.volumes import read_label
from pgpsam_jax.data.preprocessing import normalize_volume, window_of
from pgpsam_jax.errors import UserError
from pgpsam_jax.results.runs import Run


class ScoredVolume(NamedTuple):
    """Volume of a case.

    image: (D, H, W) in [0, 1]; truth, predictions (one per run): class ids (D, H, W); spacing: mm
    along (H, W); region: slices that are scored, boolean (D,); directions: `SourceGrid.directions`.
    """

    image: np.ndarray
    truth: np.ndarray
    predictions: list[np.ndarray]
    spacing: tuple[float, float]
    region: np.ndarray
    directions: str


class TestSet:
    """Volumes, truth and predictions of the test cases that a run was scored on.

    Raises:
        UserError: the data set is missing, or no longer matches the run.
    """

    def __init__(self, run: Run):
        config = run.config.copy_and_resolve_references()
        config.data.root = run.path_overrides.get("data.root", config.data.root)
        if config.data.layout == "phantom":
            config.data.layout = "btcv"  # the layout it was written in
        config.model.base = config.fewshot.file = ""  # not needed here
        config = locations.resolve_paths(config, run.workdir, root_flag="--data")
        cases = dataset.find_cases(config.data)
        self.table = dataset.label_table(config.data)
        if self.table.names != run.names:
            raise UserError(f"the label table of {config.data.root} no longer matches the run")
        scored = {row["case"] for row in run.cases}
        self.cases = {c.case_id: c for c in cases if c.case_id in scored}
        self.window, self.axis = window_of(config.data), config.data.axis
        self.region_of = lambda case_id, truth: np.ones(len(truth), bool)
        if config.data.split == "within_volume":
            entries = dataset.stored_list(run.workdir).entries
            self.region_of = dataset.unseen_slices(config.fewshot, self.table, entries)

    def read(self, case_id: str, runs) -> ScoredVolume:
        """Reads a case with the predictions of the runs."""
        if case_id not in self.cases:
            raise UserError(f"case {case_id} is no longer in the data set")
        volume, truth = read_case(self.cases[case_id], self.table, self.axis)
        predictions = []
        for run in runs:
            path = run.workdir / "evaluation" / "predictions" / f"{case_id}.nii.gz"
            predictions.append(read_label(path, self.axis).array)
            if predictions[-1].shape != truth.shape:
                raise UserError(
                    f"{path} does not have the shape of the volume; run --mode evaluate"
                )
        region = self.region_of(case_id, truth)
        image = normalize_volume(volume.array, self.window)
        of_grid = volume.spacing[1:], region, volume.source.directions
        return ScoredVolume(image, truth, predictions, *of_grid)


def fullest_slice(truth, num_classes: int, region=True) -> int:
    """The slice of (D, H, W) with most organs, among equals the one with the largest organ area.

    region: boolean (D,), the slices to choose from.
    """
    organs = sum((truth == k).any(axis=(1, 2)).astype(int) for k in range(1, num_classes))
    area = np.count_nonzero(truth, axis=(1, 2))
    return int(np.lexsort((area, np.where(region, organs, -1)))[-1])
