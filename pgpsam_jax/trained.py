"""A trained run for notebooks and scripts: `run = pgpsam_jax.load_run("runs/x")`."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import nibabel as nib
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax import distributed, methods, runs
from pgpsam_jax.compilation import keep_compiled, start
from pgpsam_jax.config import load_config
from pgpsam_jax.data import array_checks
from pgpsam_jax.data.geometry import Fit, model_slices
from pgpsam_jax.data.labels import load_label_table
from pgpsam_jax.data.nibabel_image import from_nibabel
from pgpsam_jax.data.nifti import Volume, label_image, read_image
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.inference import Predictor
from pgpsam_jax.step import to_input
from pgpsam_jax.train import load_predictor


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """A workdir's newest parameters, or those that validation chose (`config.validation`).

    `label_names` has K names, the background first.
    """

    workdir: Path
    config: ConfigDict
    label_names: tuple[str, ...]
    predictor: Predictor

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The module with the trained weights: images (B, S, S, 3) in [0, 1] to logits."""
        return self.predictor.model

    @functools.cached_property
    def identity(self) -> dict:
        """What tells this run from others, wherever its folder is: a digest of all its numbers."""
        numbers = distributed.checksum(nnx.state(self.model))
        return {"workdir": str(self.workdir), "parameters": f"{numbers:08x}"}

    @property
    def results(self) -> runs.Run:
        """What the run left on disk: loss records, scores per case, provenance."""
        return runs.read_run(self.workdir)

    def segment(self, volume) -> nib.Nifti1Image:
        """Class ids, uint8, on exactly the volume's grid: what `pgpsam_jax.predict` writes.

        volume: path of a NIfTI file, nibabel NIfTI image, or `pgpsam_jax.data.nifti.Volume`.
        """
        methods.refuse_without_labels(self.config.model)
        volume = as_volume(volume)
        return label_image(self.predictor(volume), volume.source)

    def passes(self, volume, slices) -> list:
        """All that the model computes on its way for some slices: `PgpSam.passes`, on the host.

        volume: as in `segment`; slices: N indices from inferior to superior, one batch.
        """
        if not hasattr(self.model, "passes"):
            name = methods.name_of(methods.key_of(self.config.model))
            raise UserError(
                f"{self.workdir} holds a run of {name}, which has no decoder passes to show"
            )
        images = self.inputs(volume, slices)
        return jax.device_get(self._passes(images))

    def inputs(self, volume, slices):
        """Some slices as the network sees them, (N, S, S) in [0, 1]."""
        array = as_volume(volume).array
        fit = Fit.of(array.shape[1:], self.config.model.image_size)
        predictor = self.predictor
        return model_slices(array[list(slices)], predictor.window, fit, predictor.levels)

    @functools.cached_property
    def _passes(self):
        graphdef, state = nnx.split(self.model)

        def run(state, images):
            return nnx.merge(graphdef, state).passes(to_input(images))

        return functools.partial(jax.jit(run), state)


def load_run(workdir) -> TrainedRun:
    """The trained parameters of a workdir, ready to use; `UserError` if there are none."""
    keep_compiled()
    config = load_config(workdir)
    start()
    array_checks.allow(config.data.max_gib)
    names = tuple(load_label_table(Path(workdir) / "labels.json").names)
    return TrainedRun(Path(workdir), config, names, load_predictor(config, workdir, len(names)))


def as_volume(volume) -> Volume:
    """A volume in display orientation from a path, a nibabel NIfTI image or one read already."""
    if isinstance(volume, str | os.PathLike):
        return read_image(volume)
    if isinstance(volume, nib.Nifti1Image):  # Nifti2Image is one too
        return from_nibabel(volume)
    if isinstance(volume, Volume):
        return volume
    raise TypeError(
        "a volume is the path of a NIfTI file, a nibabel NIfTI image or a pgpsam_jax Volume, not "
        f"{type(volume).__name__}; arrays need their affine: nibabel.Nifti1Image(array, affine)"
    )
