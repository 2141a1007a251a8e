"""From a configuration to objects: model, optimiser, step; and the backbone it starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax import backbone, weights
from pgpsam_jax.config import total_steps
from pgpsam_jax.data.augment import AugmentConfig
from pgpsam_jax.errors import UserError
from pgpsam_jax.models import pgpsam
from pgpsam_jax.models.image_encoder import EncoderConfig, attention_report
from pgpsam_jax.models.initial import NoDraws
from pgpsam_jax.models.lora import TARGETS, LoraConfig
from pgpsam_jax.models.release import model as release
from pgpsam_jax.models.sam import SamConfig
from pgpsam_jax.optim import OptimConfig, learning_rate_schedule, make_optimizer
from pgpsam_jax.parameters import flat_paths
from pgpsam_jax.step import StepConfig, split_model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered segmentation method: its module, and what it takes from a converted SAM."""

    make: callable  # (settings, num_classes, dtype, rngs) -> nnx.Module
    base_tensors: dict[str, str]
    base_unused: tuple[str, ...]


def _prototype_settings(settings, num_classes: int) -> dict:
    """The arguments of `PrototypeConfig`: what both presets of PGP-SAM are told."""
    full = settings.train_encoder == "full"
    if unknown := set(settings.lora_targets) - set(TARGETS):
        raise UserError(f"model.lora_targets {sorted(unknown)} unknown; choose from {TARGETS}")
    return dict(
        sam=SamConfig.preset(
            settings.encoder,
            settings.image_size,
            settings.patch_size,
            attention=settings.attention,
            remat=settings.remat,
            scan_blocks=settings.scan_blocks,
        ),
        num_classes=num_classes,
        stage_taps=tuple(settings.stage_taps),
        alpha=settings.alpha,
        k=settings.k,
        lora=LoraConfig(0 if full else settings.lora_rank, tuple(settings.lora_targets)),
    )


def _make_paper(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    config = pgpsam.PgpSamConfig(
        **_prototype_settings(settings, num_classes),
        mix_start=settings.mix_start,
        cfm=settings.cfm,
        ppr=settings.ppr,
        ppg=settings.ppg,
    )
    return pgpsam.PgpSam(config, dtype=dtype, rngs=rngs)


def _make_release(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    if not (settings.cfm and settings.ppr and settings.ppg):
        raise UserError(
            "model.cfm, model.ppr and model.ppg switch off parts of preset paper, release has no "
            "such switches; set model.preset=paper or all three to True"
        )
    config = release.ReleaseConfig(
        **_prototype_settings(settings, num_classes),
        dcn=settings.dcn,
        token_order=settings.token_order,
    )
    return release.ReleasePgpSam(config, dtype=dtype, rngs=rngs)


# (config.model.name, config.model.preset) -> method.
METHODS = {
    ("pgpsam", "paper"): Method(_make_paper, pgpsam.BASE_TENSORS, pgpsam.BASE_UNUSED),
    ("pgpsam", "release"): Method(_make_release, release.BASE_TENSORS, release.BASE_UNUSED),
}


def method_of(settings: ConfigDict) -> Method:
    """The method that `config.model` names."""
    key = (settings.name, settings.preset)
    if key not in METHODS:
        known = ", ".join(f"{name}/{preset}" for name, preset in METHODS)
        raise UserError(f"unknown method {'/'.join(key)} (model.name/model.preset); known: {known}")
    return METHODS[key]


def make_model(settings: ConfigDict, num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    """The module of `config.model`, initialised from `rngs`."""
    if settings.compute_dtype not in DTYPES:
        raise UserError(
            f"model.compute_dtype {settings.compute_dtype!r} unknown; choose {' or '.join(DTYPES)}"
        )
    dtype = DTYPES[settings.compute_dtype]
    model = method_of(settings).make(settings, num_classes, dtype, rngs)
    attention_report(model.image_encoder.config, dtype)  # refuses what cannot run here
    return model


def abstract_model(config: ConfigDict, num_classes: int):
    """(graphdef, params, frozen) with shapes only: nothing is computed."""
    model = nnx.eval_shape(lambda: make_model(config.model, num_classes, NoDraws()))
    return split_model(model, config.model.train_encoder)


def init_model(config: ConfigDict, num_classes: int):
    """(graphdef, params, frozen, base digest or None): random, then the backbone's weights."""
    model = make_model(config.model, num_classes, nnx.Rngs(config.seed))
    graphdef, params, frozen = split_model(model, config.model.train_encoder)
    digest = None
    if config.model.base:
        digest = apply_base(config.model, model.image_encoder.config, params, frozen)
    return graphdef, params, frozen, digest


def attention_of(config: ConfigDict, graphdef, params, frozen) -> str:
    """One line: which attention kernels the encoder's blocks are computed with."""
    encoder = nnx.merge(graphdef, params, frozen).image_encoder
    return attention_report(encoder.config, DTYPES[config.model.compute_dtype])


def apply_base(settings: ConfigDict, encoder: EncoderConfig, params, frozen) -> str:
    """Overwrite leaves of the states by the converted SAM of `settings.base`; its SHA-256."""
    method, base = method_of(settings), weights.load_base(settings.base)
    tensors = weights.fit_base(base.tensors, encoder.grid, global_blocks=encoder.global_blocks)
    leaves = flat_paths(params) | flat_paths(frozen)
    shapes = {
        path: leaf.shape
        for path, leaf in leaves.items()
        if not isinstance(leaf, nnx.LoRAParam)
        and any(path == p or path.startswith(p + "/") for p in method.base_tensors)
    }
    chosen = weights.select_base(tensors, shapes, method.base_tensors, method.base_unused)
    for path, value in chosen.items():
        leaves[path].set_value(jnp.asarray(value))
    return base.digest


def base_notice(settings: ConfigDict, workdir) -> str | None:
    """The warning that every print and report of a run with a random backbone carries."""
    if settings.base or backbone.frozen_origin(workdir):
        return None
    if settings.train_encoder == "full":
        return "The backbone was initialised at random and trained from scratch: no SAM weights."
    official = weights.OFFICIAL.get(settings.encoder)
    where = f" Official weights: {official.url}" if official else ""
    return (
        "THE BACKBONE IS RANDOM AND FROZEN (model.base is empty): scores say nothing about "
        f"PGP-SAM on SAM weights.{where}"
    )


def step_config(config: ConfigDict) -> StepConfig:
    return StepConfig(
        augment=AugmentConfig(**config.augment),
        ce_weight=config.train.ce_weight,
        dice_weight=config.train.dice_weight,
        microbatches=config.train.microbatches,
    )


def optimizer_of(config: ConfigDict, epoch_size: int):
    """AdamW with the schedule of the whole run."""
    return make_optimizer(OptimConfig(**config.optim), total_steps(config, epoch_size))


def learning_rates(config: ConfigDict, epoch_size: int) -> np.ndarray:
    """(steps,) float32: the learning rate of every step of the run, for the log."""
    total = total_steps(config, epoch_size)
    schedule = learning_rate_schedule(OptimConfig(**config.optim), total)
    return np.asarray(jax.jit(schedule)(jnp.arange(total)))
