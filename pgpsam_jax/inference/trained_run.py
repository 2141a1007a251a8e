"""The Python API of a trained run: `run = pgpsam_jax.load_run("runs/x")`."""

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
from pgpsam_jax.data.io.nifti import Volume, from_nibabel, label_image
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.io.voxel_grid import AXIAL
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.data.preprocessing import intensity_limits
from pgpsam_jax.data.quality import appearance
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.restore import load_predictor
from pgpsam_jax.methods import registry
from pgpsam_jax.models.pgpsam.model import Pass, PrototypeSegmenter
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.results import runs
from pgpsam_jax.runtime.compilation_cache import keep_compiled, start


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run with its newest parameters, or the best with `config.validation`.

    Attributes:
      workdir: of the run.
      config: of the run.
      label_names: K names, the background first.
      predictor: volumes to class ids.
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
        """Workdir, and checksum of all parameters with how masks are made of them."""
        numbers = f"{multihost.checksum(nnx.state(self.model)):08x}"
        made = self.predictor.settings.describe(self.label_names)
        return {
            "workdir": str(self.workdir),
            "parameters": f"{numbers} {made}" if made else numbers,
        }

    @property
    def results(self) -> runs.Run:
        """Results on disk: loss records, scores per case, provenance."""
        return runs.read_run(self.workdir)

    def segment(self, volume) -> nib.Nifti1Image:
        """Returns class ids, uint8, on the volume's voxel grid, as written by `predict`.

        Args:
          volume: path of a NIfTI file, nibabel NIfTI image, or `data.io.nifti.Volume`.

        Raises:
          UserError: the file cannot be read, or the method needs labels.
        """
        registry.refuse_without_labels(self.config.model)
        volume = self.read(volume)
        for remark in self.remarks(volume):
            warnings.warn(f"{volume.source.path} {remark}", stacklevel=2)
        return label_image(self.predictor(volume), volume.source)

    def read(self, volume) -> Volume:
        """Reads a volume, given as in `segment`, with slices along the run's axis."""
        return as_volume(volume, self.config.data.axis)

    def remarks(self, volume: Volume) -> list[str]:
        """Returns warnings about a volume's voxel grid and differences from training volumes."""
        found = [*volume.source.remarks().values()]
        axis, thick = self.config.data.axis, volume.source.thick_axis
        if thick not in (None, axis) and len(volume.array) > 1:
            found.append(
                f"was acquired in {thick} slices, but this run was trained on {axis} slices and "
                "cuts it along those; train a run on such volumes with data.axis"
            )
        return found + (
            appearance.differences(volume, self.training_statistics)
            if self.training_statistics
            else []
        )

    @functools.cached_property
    def training_statistics(self) -> dict | None:
        """Intensities and sizes of the training volumes; None in runs of earlier versions."""
        return appearance.read_statistics(self.workdir)

    def passes(self, volume, slices) -> list[Pass]:
        """Returns the intermediate results of `PgpSam.passes` for some slices, on the host.

        Args:
          volume: as in `segment`.
          slices: N indices along `data.axis`, one batch.

        Raises:
          UserError: the method has no decoder passes.
        """
        return jax.device_get(self._passes(self.inputs(volume, slices)))

    def inputs(self, volume, slices):
        """Returns preprocessed slices, (N, S, S) in [0, 1]; arguments as for `passes`."""
        array = self.read(volume).array
        preprocessing = self.predictor.preprocessing
        limits = intensity_limits(preprocessing.window, array)
        return preprocessing.to_model(array[list(slices)], limits)

    @functools.cached_property
    def _passes(self):
        model = self.model
        if not isinstance(model, PrototypeSegmenter):
            name = registry.name_of(registry.key_of(self.config.model))
            raise UserError(
                f"{self.workdir} holds a run of {name}, which has no decoder passes to show"
            )
        graphdef, state = nnx.split(model)

        def run(state, images):
            return nnx.merge(graphdef, state).passes(to_input(images))

        return functools.partial(jax.jit(run), state)


def load_run(workdir, base=None) -> TrainedRun:
    """Loads a trained run.

    Args:
      workdir: of the run.
      base: stem of the converted SAM it was trained on, if that has moved.

    Raises:
      UserError: there is no run, no checkpoint, or its weights cannot be found.
    """
    keep_compiled()
    config = load_config(workdir)
    if base:
        config.model.base = os.fspath(base)
    start()
    array_checks.allow(config.data.max_gib)
    names = tuple(load_label_table(Path(workdir) / "labels.json").names)
    return TrainedRun(Path(workdir), config, names, load_predictor(config, workdir, names))


def as_volume(volume, axis: str = AXIAL) -> Volume:
    """Returns a volume in display orientation.

    Args:
      volume: a path, a nibabel NIfTI image or a `Volume`.
      axis: of the slices, one of `voxel_grid.AXES`.
    """
    if isinstance(volume, str | os.PathLike):
        return read_image(Path(volume), axis)
    if isinstance(volume, nib.Nifti1Image):  # Nifti2Image is one too
        return from_nibabel(volume).along(axis)
    if isinstance(volume, Volume):
        return volume.along(axis)
    raise TypeError(
        "a volume is the path of a NIfTI file, a nibabel NIfTI image or a pgpsam_jax Volume, not "
        f"{type(volume).__name__}; arrays need their affine: nibabel.Nifti1Image(array, affine)"
    )
