"""Trains a small SAM on phantoms, to segment the object at a point or in a box.

No published SAM is small enough to train with on two CPU cores, and half of the compared methods
freeze the encoder. This makes their backbone for rehearsals: all of SAM is trained, on phantoms of
another seed than those of `configs/phantom.py`, with the prompts of SAM's paper (a point or a box,
sampled from the mask) and no classes. Unlike Meta's SAM it has seen such organs: results with it
say nothing about Meta's weights.

Examples:
  python -m experiments.pretrain --output weights/sam_vit_t
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pgpsam_jax.config import default_config, use_small_encoder
from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.data import dataset
from pgpsam_jax.data.augmentation.augment import augment, sample_keys
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.data.cache import build_cache
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.mask_decoder import upsample_logits
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.models.sam.weights import base_files, load_base
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.runtime.compilation_cache import start
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.training.optimizer import make_optimizer
from weights_conversion import sam

SEED = 1000  # of the phantoms; configs/phantom.py has 0
SMALLEST = 20  # pixels of a prompted mask
BATCH = 8
_SOURCE = "experiments.pretrain: phantoms, no published SAM"
_OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0)


def main(arguments: list[str] | None = None) -> int:
    """Trains and writes `<output>.safetensors` and `<output>.json`."""
    parser = Parser("experiments.pretrain", __doc__)
    parser.add_argument("--output", default="weights/sam_vit_t", help="stem of the two files")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of 8 slices")
    parser.add_argument("--root", default="datasets/phantom_pretrain", help="folder of phantoms")
    with running():
        options = parser.parse_args(arguments)
        start()
        if options.steps < 1:
            raise UserError(f"--steps is {options.steps}; give 1 or more training steps")
        _refuse_other(options.output)
        images, labels = slices(options.root)
        model = pretrain(sam_config(images.shape[1]), images, labels, options.steps)
        store(model, options.output)
    return 0


def sam_config(size: int) -> SamConfig:
    """Returns the small SAM for square images (pixels), with the colors that `store` records."""
    return SamConfig.preset("vit_t", size, 8, colors="normalized")


def slices(root) -> tuple[np.ndarray, np.ndarray]:
    """Returns all slices with organs of thirty phantoms: images and class ids, both (N, S, S)."""
    config = default_config()
    use_small_encoder(config)
    config.data.layout, config.data.root, config.data.phantom_seed = "phantom", str(root), SEED
    config.fewshot.rule = "all"
    split = dataset.find_split(config.data)
    cases = split.train + split.test
    config.data.axis = dataset.axis_of(config.data, cases)
    preprocessing = Preprocessing.from_config(config.data, config.model.image_size)
    cached = build_cache(cases, split.table, preprocessing, Path(root) / "cache")
    data = dataset.few_shot_data(cached, config.fewshot, split.table.names)
    return data.images, data.labels


def pretrain(config: SamConfig, images, labels, steps: int, seed: int = 0) -> Sam:
    """Trains SAM from random weights on images (N, S, S) and class ids (N, S, S)."""
    model = Sam(config, rngs=nnx.Rngs(seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(_OPTIM, steps)
    step = jax.jit(make_step(graphdef, optimizer, seed), donate_argnums=(0, 1))
    state, data = optimizer.init(params), jax.device_put((images, labels))
    loader = make_loader(len(images), batch_size=BATCH, seed=seed)
    for i in range(steps):
        params, state, loss, overlap = step(params, state, rest, *data, next(loader), i)
        if (i + 1) % 100 == 0 or i + 1 == steps:
            print(f"step {i + 1} of {steps}: loss {loss:.3f}, IoU {overlap:.3f}", flush=True)
    loader.close()
    return nnx.merge(graphdef, params, rest)


def make_step(graphdef, optimizer, seed: int):
    """Returns a pure step (params, opt_state, rest, images, labels, rows, step) -> (params,
    opt_state, loss, mean IoU of the masks)."""

    def of(params, rest, images, masks, points, boxes):
        model = nnx.merge(graphdef, params, rest)
        embedding = model.encode_image(to_input(images))
        asked = jnp.ones((len(points), 1), jnp.int32)
        by_point = model.predict(embedding, points=points[:, None], labels=asked)
        by_box = model.predict(embedding, boxes=boxes, multimask=False)
        losses, overlaps = [], []
        for logits, quality in (by_point, by_box):
            value, overlap = mask_loss(logits, masks)
            best = jnp.argmin(value, axis=-1, keepdims=True)  # a point is ambiguous: one of three
            losses.append(jnp.take_along_axis(value, best, -1).mean())
            losses.append(jnp.square(quality - jax.lax.stop_gradient(overlap)).mean())
            overlaps.append(jnp.take_along_axis(overlap, best, -1).mean())
        return sum(losses), sum(overlaps) / 2

    def step(params, state, rest, images, labels, rows, number):
        keys = sample_keys(jax.random.key(seed), number, jnp.arange(len(rows)))
        images, labels = augment(
            keys, images[rows].astype(jnp.float32), labels[rows].astype(jnp.int32), AugmentConfig()
        )
        masks, points, boxes = jax.vmap(sample_prompts)(keys, labels)
        (loss, overlap), gradients = jax.value_and_grad(of, has_aux=True)(
            params, rest, images, masks, points, boxes
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, overlap

    return step


def sample_prompts(key, labels):
    """Samples a binary mask (S, S), a point (x, y) inside and a box (4,) from class ids (S, S).

    The mask is a class of the slice, or the background if no class is large enough. Each side of
    the box is off by up to a tenth of its length.
    """
    which, where, how = jax.random.split(jax.random.fold_in(key, 1), 3)
    areas = jnp.bincount(labels.reshape(-1), length=256).at[0].set(0)
    chosen = jax.random.categorical(which, jnp.where(areas >= SMALLEST, 0.0, -jnp.inf))
    chosen = jnp.where((areas >= SMALLEST).any(), chosen, 0)
    mask = labels == chosen
    flat = jax.random.categorical(where, jnp.where(mask.reshape(-1), 0.0, -jnp.inf))
    point = jnp.stack([flat % mask.shape[1], flat // mask.shape[1]]).astype(jnp.float32)
    ends = []
    for axis in (0, 1):  # columns first: x, y
        line = mask.any(axis)
        ends.append((jnp.argmax(line), len(line) - 1 - jnp.argmax(line[::-1])))
    (x0, x1), (y0, y1) = ends
    box = jnp.stack([x0, y0, x1, y1]).astype(jnp.float32)
    sides = jnp.stack([x1 - x0, y1 - y0, x1 - x0, y1 - y0]).astype(jnp.float32)
    box += sides * jax.random.uniform(how, (4,), minval=-0.1, maxval=0.1)
    return mask.astype(jnp.int32), point, box


def mask_loss(logits, masks):
    """Returns cross-entropy + soft Dice and IoU (B, M) of logits (B, h, w, M), masks (B, S, S)."""
    logits, target, pixels = upsample_logits(logits, masks.shape[1:]), masks[..., None], (1, 2)
    entropy = optax.sigmoid_binary_cross_entropy(logits, target).mean(pixels)
    found = jax.nn.sigmoid(logits)
    dice = (2 * (found * target).sum(pixels) + 1) / (found.sum(pixels) + target.sum(pixels) + 1)
    hard = logits > 0
    shared, either = (hard & (target > 0)).sum(pixels), (hard | (target > 0)).sum(pixels)
    return entropy + 1 - dice, shared / jnp.maximum(either, 1)


def _refuse_other(output) -> None:
    """Raises `UserError` before the training if weights of another source would be replaced."""
    weights, _ = base_files(output)
    if weights.exists() and load_base(output).meta.get("source") != _SOURCE:
        raise UserError(
            f"{weights} exists and was not written by this program; choose another --output"
        )


def store(model: Sam, output) -> None:
    """Writes a SAM for `model.base`."""
    tensors = {path: np.asarray(leaf[...]) for path, leaf in flat_paths(nnx.state(model)).items()}
    sam.store(output, tensors, {"source": _SOURCE}, overwrite=True)
    weights, sidecar = base_files(output)
    print(f"wrote {weights} and {sidecar.name}")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
