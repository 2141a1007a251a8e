"""A small SAM, trained to segment whatever a point or a box asks for, on phantoms of its own.

There are no published SAM weights of a size that two CPU cores can train with, yet half of the
compared methods do not train the encoder. This makes a backbone for rehearsals of them: all of SAM
trains, on phantoms of another seed than those of `configs/phantom.py`, with the prompts of SAM's
paper (a point or a box, drawn from the mask) and no class. It has seen organs of this kind, which
Meta's SAM has not: nothing that is measured with it says anything about Meta's weights.

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

SEED = 1000  # of the phantoms; those of configs/phantom.py have 0
SMALLEST = 20  # pixels of a mask that may be asked for
BATCH = 8
_SOURCE = "experiments.pretrain: phantoms, no published SAM"
_OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0)


def main(arguments: list[str] | None = None) -> int:
    """Train, and write `<output>.safetensors` and `<output>.json`."""
    parser = Parser("experiments.pretrain", __doc__)
    parser.add_argument("--output", default="weights/sam_vit_t", help="stem of the two files")
    parser.add_argument("--steps", type=int, default=2500, help="of 8 slices each")
    parser.add_argument("--root", default="datasets/phantom_pretrain", help="its phantoms")
    with running():
        options = parser.parse_args(arguments)
        start()
        if options.steps < 1:
            raise UserError("--steps is the number of training steps; give 1 or more")
        _refuse_other(options.output)
        images, labels = slices(options.root)
        model = pretrain(sam_config(images.shape[1]), images, labels, options.steps)
        store(model, options.output)
    return 0


def sam_config(size: int) -> SamConfig:
    """The small SAM at a square size (pixels), shown the colors that `store` says it was."""
    return SamConfig.preset("vit_t", size, 8, colors="normalized")


def slices(root) -> tuple[np.ndarray, np.ndarray]:
    """All slices with organs of thirty phantoms: images (N, S, S), class ids (N, S, S)."""
    config = default_config()
    use_small_encoder(config)
    config.data.layout, config.data.root, config.data.phantom_seed = "phantom", str(root), SEED
    config.fewshot.rule = "all"
    split = dataset.find_split(config.data)
    cases = split.train + split.test
    config.data.axis = dataset.axis_of(config.data, cases)
    data = dataset.few_shot_data(
        config.data,
        config.fewshot,
        config.model.image_size,
        cases,
        split.table,
        Path(root),
        resume=False,
    )
    return data.images, data.labels


def pretrain(config: SamConfig, images, labels, steps: int, seed: int = 0) -> Sam:
    """SAM after `steps` steps from random weights on images (N, S, S) and class ids (N, S, S)."""
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
    """Pure function (params, opt_state, rest, images, labels, rows, step) -> the first two, loss
    and mean IoU of the masks."""

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
        masks, points, boxes = jax.vmap(ask)(keys, labels)
        (loss, overlap), gradients = jax.value_and_grad(of, has_aux=True)(
            params, rest, images, masks, points, boxes
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, overlap

    return step


def ask(key, labels):
    """(mask (S, S) of 0 and 1, a point (x, y) within, a box (4,) about it) of class ids (S, S).

    Of the classes of the slice one is drawn, of all that is no organ where none is large enough.
    A side of the box is off by up to a tenth of its length.
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
    """(cross-entropy + soft Dice, IoU), each (B, M): logits (B, h, w, M), masks (B, S, S)."""
    logits, target, pixels = upsample_logits(logits, masks.shape[1:]), masks[..., None], (1, 2)
    entropy = optax.sigmoid_binary_cross_entropy(logits, target).mean(pixels)
    found = jax.nn.sigmoid(logits)
    dice = (2 * (found * target).sum(pixels) + 1) / (found.sum(pixels) + target.sum(pixels) + 1)
    hard = logits > 0
    shared, either = (hard & (target > 0)).sum(pixels), (hard | (target > 0)).sum(pixels)
    return entropy + 1 - dice, shared / jnp.maximum(either, 1)


def _refuse_other(output) -> None:
    """A `UserError`, before minutes of training, where weights from elsewhere would be lost."""
    weights, _ = base_files(output)
    if weights.exists() and load_base(output).meta.get("source") != _SOURCE:
        raise UserError(
            f"{weights} is there and was not made by this program; choose another --output"
        )


def store(model: Sam, output) -> None:
    """Write a SAM as the weights that `model.base` takes."""
    tensors = {path: np.asarray(leaf[...]) for path, leaf in flat_paths(nnx.state(model)).items()}
    sam.store(output, tensors, {"source": _SOURCE}, overwrite=True)
    weights, sidecar = base_files(output)
    print(f"wrote {weights} and {sidecar.name}")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
