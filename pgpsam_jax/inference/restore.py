"""Restores a predictor from a workdir."""

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import (
    best_parameters,
    checkpoint,
    frozen_weights,
    locations,
)
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.distributed import multihost
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.settings import InferenceSettings
from pgpsam_jax.methods import build, pretrained, registry
from pgpsam_jax.sharding import device_mesh


def load_predictor(config: ConfigDict, workdir, names: Sequence[str]) -> Predictor:
    """Restores a predictor with the newest or best parameters of a workdir.

    Args:
      config: of the run.
      workdir: of the run.
      names: K class names, the background first.

    Raises:
      UserError: there is no checkpoint, or weights are missing, damaged or not those of the run.
    """
    config = config.copy_and_resolve_references()
    config.model.cnn_base = ""  # only initializes training; the workdir has the trained CNN
    pinned = frozen_weights.pinned(workdir)
    no_base = pinned is not None and pinned["sha256"] is None
    config.model.base = "" if no_base else locations.find_base(config, workdir)
    graphdef, params, frozen, digest = build.init_model(
        config.model, len(names), config.seed if pinned is None else None
    )
    random_frozen = pretrained.randomly_initialized_frozen_params(config.model, frozen)
    frozen_weights.pin_frozen_weights(workdir, config.model.base, digest, frozen, random_frozen)
    everywhere = device_mesh.replicated(device_mesh.make_mesh())
    abstract = checkpoint.abstract_like(params, jax.tree.map(lambda _: everywhere, params))
    params = best_parameters.restore_params(
        workdir, abstract, best=best_parameters.keeps_best(config.validation)
    )
    if notice := best_parameters.notice(config.validation, workdir):
        multihost.print_once(notice)
    mesh, model = device_mesh.make_mesh(), (graphdef, params, frozen)
    settings = InferenceSettings.of(config.eval, workdir, names)
    return make_predictor(config, model, mesh, settings).on_local_devices()


def make_predictor(
    config: ConfigDict, model: tuple, mesh, settings: InferenceSettings
) -> Predictor:
    """Returns a predictor with the preprocessing and batch size of a run.

    Args:
      config: of the run.
      model: (graphdef, params, frozen).
      mesh: the devices.
      settings: how masks are made.
    """
    return Predictor(
        *model,
        preprocessing=Preprocessing.from_config(config.data, config.model.image_size),
        batch_size=config.eval.batch_size,
        mesh=mesh,
        oracle=registry.method_of(config.model).oracle,
        settings=settings,
        token=config.model.patch_size,
    )
