"""A trained run for notebooks and scripts: `run = pgpsam_jax.load_run("runs/x")`."""

import dataclasses
import functools
import os
import warnings
from pathlib import Path

import jax
import nibabel as nib
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.config import load_config
from pgpsam_jax.data.io import array_checks
from pgpsam_jax.data.io.nibabel_image import from_nibabel
from pgpsam_jax.data.io.nifti import Volume, label_image, read_image
from pgpsam_jax.data.io.voxel_grid import AXIAL
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.data.letterbox import Letterbox, ends_of, model_slices
from pgpsam_jax.data.quality import appearance
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.restore import load_predictor
from pgpsam_jax.methods import registry
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.results import runs
from pgpsam_jax.runtime.compilation_cache import keep_compiled, start


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
        numbers = multihost.checksum(nnx.state(self.model))
        return {"workdir": str(self.workdir), "parameters": f"{numbers:08x}"}

    @property
    def results(self) -> runs.Run:
        """What the run left on disk: loss records, scores per case, provenance."""
        return runs.read_run(self.workdir)

    def segment(self, volume) -> nib.Nifti1Image:
        """Class ids, uint8, on exactly the volume's grid: what `pgpsam_jax.predict` writes.

        volume: path of a NIfTI file, nibabel NIfTI image, or `pgpsam_jax.data.io.nifti.Volume`.
        """
        registry.refuse_without_labels(self.config.model)
        volume = self.read(volume)
        for remark in self.remarks(volume):
            warnings.warn(f"{volume.source.path} {remark}", stacklevel=2)
        return label_image(self.predictor(volume), volume.source)

    def read(self, volume) -> Volume:
        """The volume, given as in `segment`, with slices along the axis that the run's have."""
        return as_volume(volume, self.config.data.axis)

    def remarks(self, volume: Volume) -> list[str]:
        """What is odd about a volume, a sentence each: its grid, and how training's differ."""
        found = [text for _, text in volume.source.remarks()]
        axis, thick = self.config.data.axis, volume.source.thick_axis
        if thick not in (None, axis) and len(volume.array) > 1:
            found.append(
                f"was taken in {thick} slices, but this run knows {axis} ones and cuts it along "
                "them; train one on such volumes with data.axis"
            )
        return found + (appearance.differences(volume, self.looks) if self.looks else [])

    @functools.cached_property
    def looks(self) -> dict | None:
        """What the training volumes look like (`appearance`); None in runs of before."""
        return appearance.read_record(self.workdir)

    def passes(self, volume, slices) -> list:
        """All that the model computes on its way for some slices: `PgpSam.passes`, on the host.

        volume: as in `segment`; slices: N indices along `data.axis`, one batch.
        """
        if not hasattr(self.model, "passes"):
            name = registry.name_of(registry.key_of(self.config.model))
            raise UserError(
                f"{self.workdir} holds a run of {name}, which has no decoder passes to show"
            )
        images = self.inputs(volume, slices)
        return jax.device_get(self._passes(images))

    def inputs(self, volume, slices):
        """Some slices as the network sees them, (N, S, S) in [0, 1]."""
        array = self.read(volume).array
        letterbox = Letterbox.of(array.shape[1:], self.config.model.image_size)
        predictor = self.predictor
        ends = ends_of(predictor.window, array)
        return model_slices(array[list(slices)], ends, letterbox, predictor.levels)

    @functools.cached_property
    def _passes(self):
        graphdef, state = nnx.split(self.model)

        def run(state, images):
            return nnx.merge(graphdef, state).passes(to_input(images))

        return functools.partial(jax.jit(run), state)


def load_run(workdir, base=None) -> TrainedRun:
    """The trained parameters of a workdir, ready to use; `UserError` if there are none.

    base: stem of the converted SAM that the run was trained on, where it is no longer at the place
    that the run knows.
    """
    keep_compiled()
    config = load_config(workdir)
    if base:
        config.model.base = os.fspath(base)
    start()
    array_checks.allow(config.data.max_gib)
    names = tuple(load_label_table(Path(workdir) / "labels.json").names)
    return TrainedRun(Path(workdir), config, names, load_predictor(config, workdir, len(names)))


def as_volume(volume, axis: str = AXIAL) -> Volume:
    """A volume in display orientation from a path, a nibabel NIfTI image or one read already.

    axis: along which slices are cut, one of `grid.AXES`.
    """
    if isinstance(volume, str | os.PathLike):
        return read_image(volume, axis)
    if isinstance(volume, nib.Nifti1Image):  # Nifti2Image is one too
        return from_nibabel(volume).along(axis)
    if isinstance(volume, Volume):
        return volume.along(axis)
    raise TypeError(
        "a volume is the path of a NIfTI file, a nibabel NIfTI image or a pgpsam_jax Volume, not "
        f"{type(volume).__name__}; arrays need their affine: nibabel.Nifti1Image(array, affine)"
    )
