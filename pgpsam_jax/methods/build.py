"""From a configuration to objects: model, optimiser, step; and the backbone it starts from."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.config import exclusive
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data.augmentation.augment import AugmentConfig
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods.registry import colors_of, key_of, method_of, name_of, start_of
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.initializers import Draws, NoDraws
from pgpsam_jax.models.parameters import flat_paths, under
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.image_encoder import EncoderConfig, attention_report
from pgpsam_jax.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from pgpsam_jax.training.train_step import StepConfig, split_model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


def settled(config: ConfigDict, like: ConfigDict | None = None) -> ConfigDict:
    """A copy in which what the base or the method decides is written out, as runs keep it.

    like: the same configuration, settled where its files were found.
    """
    config, like = config.copy_and_resolve_references(), like or config
    config.model.colors, config.model.start = colors_of(like.model), start_of(like.model)
    return config


def abstract_model(config: ConfigDict, num_classes: int):
    """(graphdef, params, frozen) with shapes only: nothing is computed."""
    return _split(_shapes(config, num_classes), config.model)


def _shapes(config: ConfigDict, num_classes: int) -> nnx.Module:
    return nnx.eval_shape(lambda: make_model(config.model, num_classes, NoDraws()))


def init_model(config: ConfigDict, num_classes: int, *, drawn: bool = True):
    """(graphdef, params, frozen, base digest or None): random, then the backbone's weights.

    drawn: False where a workdir gives what the backbone does not; that has shapes only.
    """
    if drawn:
        model = make_model(config.model, num_classes, Draws(config.seed))
    else:
        model = _shapes(config, num_classes)
    graphdef, params, frozen = _split(model, config.model)
    digest = None
    if config.model.base:
        digest = apply_base(config.model, model.image_encoder.config, params, frozen)
    if config.model.cnn_base:
        apply_cnn(config.model, params, frozen)
    return graphdef, params, frozen, digest


def _split(model: nnx.Module, settings: ConfigDict):
    return split_model(model, settings.train_encoder, method_of(settings).frozen)


def attention_of(config: ConfigDict, graphdef, params, frozen) -> str:
    """One line: which attention kernels the encoder's blocks are computed with."""
    encoder = nnx.merge(graphdef, params, frozen).image_encoder
    return attention_report(encoder.config, DTYPES[config.model.compute_dtype])


def apply_base(settings: ConfigDict, encoder: EncoderConfig, params, frozen) -> str:
    """Overwrite leaves of the states by the converted SAM of `settings.base`; its SHA-256."""
    method, base = method_of(settings), weights.load_base(settings.base)
    tensors = weights.fit_base(base.tensors, encoder.grid, global_blocks=encoder.global_blocks)
    tensors |= {
        name: tensor[:rows]
        for prefix, rows in method.base_rows.items()
        for name, tensor in tensors.items()
        if under(name, (prefix,))
    }
    leaves = flat_paths(params) | flat_paths(frozen)
    taken = dict(method.base_tensors)
    if start_of(settings) == "sam":
        taken |= {
            path: match.expand(source)
            for path in leaves
            for pattern, source in method.sam_start.items()
            if (match := re.fullmatch(pattern, path))
        }
    shapes = {
        path: leaf.shape
        for path, leaf in leaves.items()
        if not isinstance(leaf, nnx.LoRAParam) and under(path, taken)
    }
    chosen = weights.select_base(tensors, shapes, taken, method.base_unused)
    for path, value in chosen.items():
        leaves[path].set_value(jax.device_put(value))
    return base.digest


def drawn(settings: ConfigDict, frozen) -> dict:
    """The frozen leaves, by path, that no converted SAM gives: random numbers of this run."""
    given = method_of(settings).base_tensors
    return {path: leaf for path, leaf in flat_paths(frozen).items() if not under(path, given)}


def apply_cnn(settings: ConfigDict, params, frozen) -> None:
    """Overwrite the leaves of the CNN beside the encoder by the file `settings.cnn_base`."""
    cnn = method_of(settings).cnn
    if not cnn:
        raise UserError(
            f"model.cnn_base is for a method with a CNN, which {name_of(key_of(settings))} lacks; "
            "leave it empty"
        )
    leaves = flat_paths(params) | flat_paths(frozen)
    ours = {
        path.removeprefix(f"{cnn}/"): leaf for path, leaf in leaves.items() if under(path, (cnn,))
    }
    tensors = resnet_weights.load_cnn(
        settings.cnn_base, {path: leaf.shape for path, leaf in ours.items()}
    )
    for path, leaf in ours.items():
        leaf.set_value(jax.device_put(tensors[path]))


def base_notice(settings: ConfigDict, workdir) -> str | None:
    """The warning that every print and report of a run with a random backbone, or CNN, carries."""
    notices = [_backbone_notice(settings, workdir)]
    if method_of(settings).cnn and not settings.cnn_base:
        notices.append(
            "THE CNN BESIDE THE ENCODER STARTED AT RANDOM (model.cnn_base is empty), not from "
            f"ImageNet as the method's authors have it; {resnet_weights.HOW_TO_GET}"
        )
    return " ".join(filter(None, notices)) or None


def _backbone_notice(settings: ConfigDict, workdir) -> str | None:
    if settings.base or frozen_weights.frozen_origin(workdir):
        return None
    if settings.train_encoder == "full":
        return "The backbone was initialised at random and trained from scratch: no SAM weights."
    official = weights.OFFICIAL.get(settings.encoder)
    where = f" Official weights: {official.url}" if official else ""
    return (
        "THE BACKBONE IS RANDOM AND FROZEN (model.base is empty): scores say nothing about "
        f"{method_of(settings).label.partition(',')[0]} on SAM weights.{where}"
    )


def check(config: ConfigDict) -> None:
    """Refuse settings with which no step can be made, before anything is read or claimed."""
    step_config(config)
    OptimConfig(**config.optim)
    exclusive.check(config.fewshot)
    exclusive.check_complete(config.fewshot)
    _check_used(config.data)
    copies, trains = config.train.encoded_copies, config.model.train_encoder
    if copies and trains != "frozen":
        raise UserError(
            f"train.encoded_copies is {copies}, but model.train_encoder is {trains!r}: what trains "
            "cannot be encoded beforehand; set train.encoded_copies=0, or "
            "model.train_encoder=frozen"
        )


def _check_used(data: ConfigDict) -> None:
    """Refuse paths that the layout or the split would leave aside."""
    unused = {"split_file": data.split != "file" and ("split", data.split, "file")}
    pairs = data.layout != "pairs" and ("layout", data.layout, "pairs")
    for field, used_by in (unused | dict.fromkeys(("image_glob", "label_glob"), pairs)).items():
        if used_by and data[field]:
            other, value, needed = used_by
            raise UserError(
                f"data.{field} is {data[field]!r}, but data.{other} {value!r} does not use it; set "
                f"data.{other}={needed}, or leave it empty"
            )


def step_config(config: ConfigDict) -> StepConfig:
    return StepConfig(
        augment=AugmentConfig(**config.augment),
        ce_weight=config.train.ce_weight,
        dice_weight=config.train.dice_weight,
        microbatches=config.train.microbatches,
        loss=method_of(config.model).loss,
        encoded=config.train.encoded_copies,
    )


def total_steps(config: ConfigDict, epoch_size: int) -> int:
    """Steps of the whole run: 1 of a method that is fitted, 0 of one of which nothing trains."""
    fixed = method_of(config.model).steps
    return configuration.total_steps(config, epoch_size) if fixed is None else fixed


def slices_of_step(config: ConfigDict, epoch_size: int) -> int:
    """How many slices a step of the run takes: a batch, or the whole list to be fitted to."""
    return config.train.batch_size if method_of(config.model).steps is None else epoch_size


def optimizer_of(config: ConfigDict, epoch_size: int):
    """The optimiser with the schedule of the whole run."""
    steps = max(1, total_steps(config, epoch_size))  # where nothing trains, it has no parameters
    return make_optimizer(OptimConfig(**config.optim), steps)


def learning_rates(config: ConfigDict, epoch_size: int) -> np.ndarray:
    """(steps,) float32: the learning rate of every step of the run, for the log; NaN of a fit."""
    total = total_steps(config, epoch_size)
    if method_of(config.model).steps is not None:
        return np.full(total, np.nan, np.float32)
    schedule = learning_rate_schedule(OptimConfig(**config.optim), total)
    return np.asarray(jax.jit(schedule)(jnp.arange(total)))
