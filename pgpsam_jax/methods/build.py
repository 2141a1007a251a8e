"""Model construction: initialized or abstract, split into trainable and frozen parameters."""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods.pretrained import apply_base, apply_cnn
from pgpsam_jax.methods.registry import method_of
from pgpsam_jax.models.initializers import FastRngs, ShapeOnlyRngs
from pgpsam_jax.models.parameters import State, split_model
from pgpsam_jax.models.segmenter import Segmenter

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(settings: ConfigDict, num_classes: int, rngs: nnx.Rngs) -> Segmenter:
    """Builds the module of `config.model`, initialized from `rngs`."""
    if settings.compute_dtype not in DTYPES:
        raise UserError(
            f"model.compute_dtype {settings.compute_dtype!r} unknown; choose {' or '.join(DTYPES)}"
        )
    dtype = DTYPES[settings.compute_dtype]
    method = method_of(settings)
    method.resolve_class_tokens(settings)  # refuses what the method has not
    model = method.from_settings(settings, num_classes, dtype=dtype, rngs=rngs)
    model.describe_attention(dtype)  # refuses what cannot run here
    return model


def resolve_method_defaults(config: ConfigDict, like: ConfigDict | None = None) -> ConfigDict:
    """Returns a copy with `model.colors` and `model.start` resolved, as runs store it.

    like: the same configuration with the paths of its files resolved.
    """
    config, like = config.copy_and_resolve_references(), like or config
    method = method_of(like.model)
    config.model.colors = method.resolve_colors(like.model)
    config.model.start = method.resolve_start(like.model)
    return config


def abstract_model(
    settings: ConfigDict, num_classes: int
) -> tuple[nnx.GraphDef[Segmenter], State, State]:
    """Returns (graphdef, params, frozen) with shapes only: nothing is computed."""
    return _split(_shapes(settings, num_classes), settings)


def _shapes(settings: ConfigDict, num_classes: int) -> Segmenter:
    return nnx.eval_shape(lambda: make_model(settings, num_classes, ShapeOnlyRngs()))


def init_model(
    settings: ConfigDict, num_classes: int, seed: int | None
) -> tuple[nnx.GraphDef[Segmenter], State, State, str | None]:
    """Initializes the model of `config.model`, then copies the weights of its base into it.

    Args:
      settings: `config.model`.
      num_classes: K, with the background.
      seed: of the random numbers; None leaves shapes where the base gives no weights, for a
        workdir to fill in.

    Returns:
      (graphdef, params, frozen, SHA-256 of the base or None).
    """
    if seed is None:
        model = _shapes(settings, num_classes)
    else:
        model = make_model(settings, num_classes, FastRngs(seed))
    graphdef, params, frozen = _split(model, settings)
    digest = None
    if settings.base:
        digest = apply_base(settings, model.image_encoder.config, params, frozen)
    if settings.cnn_base:
        apply_cnn(settings, params, frozen)
    return graphdef, params, frozen, digest


def _split(model: Segmenter, settings: ConfigDict) -> tuple[nnx.GraphDef[Segmenter], State, State]:
    return split_model(model, settings.train_encoder, method_of(settings).frozen)


def attention_of(
    settings: ConfigDict, graphdef: nnx.GraphDef[Segmenter], params: State, frozen: State
) -> str:
    """Returns one line that names the attention kernels of the encoder's blocks."""
    model = nnx.merge(graphdef, params, frozen)
    return model.describe_attention(DTYPES[settings.compute_dtype])
