"""SAM's encoder with LoRA and its decoder without prompts, in JAX, to compare with PyTorch.

LoRA and decoder train (the quality head has no part in the loss and does not); three masks are the
logits of three classes. No augmentation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.benchmark import random_weights
from experiments.benchmark.random_weights import LEARNING_RATE, WEIGHT_DECAY
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.losses import segmentation_loss
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import upsample_logits
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.models.sam.tiny_vit import TinyVitConfig
from weights_conversion.remap import read, write
from weights_conversion.sam import HUGGINGFACE, LITE_MEDSAM
from weights_conversion.tensor_layouts import Layout

LORA = LoraConfig(random_weights.RANK, random_weights.TARGETS)

# `transformers.SamModel` with the encoder of `tiny_vit_torch` in the place of its own.
TINY_VIT = HUGGINGFACE._replace(
    rows=(
        *(row for row in HUGGINGFACE.rows if not row.ours.startswith("image_encoder/")),
        *(
            row._replace(theirs=row.theirs.replace("image_encoder", "vision_encoder", 1))
            for row in LITE_MEDSAM.rows
            if row.ours.startswith("image_encoder/")
        ),
    )
)

TRAINED = nnx.Any(
    nnx.LoRAParam,
    nnx.All(nnx.Param, nnx.PathContains("mask_decoder"), nnx.Not(nnx.PathContains("iou_head"))),
)


def build(config: SamConfig, dtype):
    """Returns (graphdef, params, frozen) with the tensors of `random_weights`."""
    model = nnx.eval_shape(lambda: Sam(config, lora=LORA, dtype=dtype, rngs=ShapeOnlyRngs()))
    graphdef, params, frozen = nnx.split(model, TRAINED, ...)
    leaves = flat_paths(params) | flat_paths(frozen)
    for path in [path for path, leaf in leaves.items() if isinstance(leaf, nnx.LoRAParam)]:
        leaf = leaves.pop(path)
        tensors = random_weights.lora_tensors(path, max(leaf.shape))
        leaf.set_value(jnp.asarray(tensors["ab".index(path[-1])]))
    # Half precision: only the shapes are needed.
    empty = {path: np.broadcast_to(np.float16(0), leaf.shape) for path, leaf in leaves.items()}
    layout = layout_of(config)
    shapes = {name: tensor.shape for name, tensor in write(layout, empty).items()}
    for path, tensor in read(layout, random_weights.sam_tensors(shapes)).items():
        leaves[path].set_value(jnp.asarray(tensor))
    return graphdef, params, frozen


def layout_of(config: SamConfig) -> Layout:
    """Returns the names of the tensors on PyTorch's side."""
    return TINY_VIT if isinstance(config.encoder, TinyVitConfig) else HUGGINGFACE


def encode(graphdef, params, frozen, images):
    """Maps images (B, S, S, 3) to the neck's output (B, H, W, C)."""
    return nnx.merge(graphdef, params, frozen).encode_image(images)


def predict(graphdef, params, frozen, images):
    """Maps images (B, S, S, 3) to the logits of three masks, (B, 4H, 4W, 3)."""
    model = nnx.merge(graphdef, params, frozen)
    embedding = model.encode_image(images)
    prompts = model.prompt_encoder
    grid, (b, *_, c) = prompts.pe_layer.grid(prompts.grid), embedding.shape
    dense = jnp.broadcast_to(prompts.no_mask_embed[...], embedding.shape).astype(embedding.dtype)
    sparse = jnp.zeros((b, 0, c), embedding.dtype)
    positions = grid.astype(embedding.dtype)
    return model.mask_decoder(embedding, positions, sparse, dense, multimask=True)[0]


def loss(graphdef, params, frozen, images, labels):
    """Returns 0.2 CE + 0.8 soft Dice at full size; labels (B, S, S)."""
    logits = upsample_logits(predict(graphdef, params, frozen, images), labels.shape[1:])
    return segmentation_loss(logits, labels)[0]


def make_train_step(graphdef):
    """Returns (optimizer, pure function (params, opt_state, frozen, images, labels) -> (params,
    opt_state))."""
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def train_step(params, opt_state, frozen, images, labels):
        value, gradients = jax.value_and_grad(loss, argnums=1)(
            graphdef, params, frozen, images, labels
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return optimizer, train_step
