"""Trains PGP-SAM on synthetic CT in one file: slices, model, pure train step, loop, Dice.

    python examples/train_minimal.py --steps 400 --size 128

No download, no configuration file, no mesh, no checkpoint; `pgpsam_jax.main` adds those. The
encoder is small enough to be trained from scratch on a CPU: mean Dice 0.75 on four held-out cases.
"""

import argparse

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from flax import nnx

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.data.io.nifti import from_nibabel
from pgpsam_jax.data.layouts.label_table import SYNAPSE8
from pgpsam_jax.data.letterbox import Letterbox, to_model
from pgpsam_jax.data.phantom.generate import make_case
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.metrics.surface import dice
from pgpsam_jax.models.parameters import split_model
from pgpsam_jax.models.pgpsam.model import PgpSam, PgpSamConfig
from pgpsam_jax.models.sam.mask_decoder import upsample_logits
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.training.optimizer import make_optimizer
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.training.train_step import StepConfig, make_train_step

CLASSES = SYNAPSE8.names  # the background and eight organs
WINDOW = (-125, 275)  # HU, mapped to [0, 1]
BATCH = 4


def load_case(case: int, size: int):
    """All slices of one phantom: images (N, S, S) in [0, 1], class ids (N, S, S) uint8."""
    image, label, affine = make_case(0, case)
    image, label = (from_nibabel(nib.Nifti1Image(x, affine)).array for x in (image, label))
    ids = SYNAPSE8.remap(label.astype(np.uint8), f"phantom {case}")
    letterbox = Letterbox.of(image.shape[1:], size)
    images = Preprocessing(size, WINDOW).to_model(image, WINDOW)
    return images, to_model(ids, letterbox, order=0)


def training_slices(cases, size: int):
    """Every third slice with an organ, of all cases: images and class ids (N, S, S)."""
    images, labels = map(np.concatenate, zip(*(load_case(c, size) for c in cases), strict=True))
    rows = np.flatnonzero(labels.any(axis=(1, 2)))[::3]
    return images[rows], labels[rows]


def batches(images, labels, rng):
    """Yields batches without end, in a new order each epoch."""
    while True:
        order = rng.permutation(len(images))
        for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            yield {"image": images[rows], "label": labels[rows]}


def train(images, labels, steps: int, size: int):
    """Returns `predict`, a function from slices (N, S, S) to class ids (N, S, S)."""
    sam = SamConfig.preset("vit_t", size, patch_size=8)
    model = PgpSam(PgpSamConfig(sam, len(CLASSES)), rngs=nnx.Rngs(0))
    graphdef, params, frozen = split_model(model, "full")

    settings = OptimConfig(learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0)
    optimizer = make_optimizer(settings, steps)
    step = make_train_step(graphdef, optimizer, StepConfig(AugmentConfig()))
    step = jax.jit(step, donate_argnums=0)
    state = init_state(params, optimizer, seed=0, epoch_size=len(images))
    stream = batches(images, labels, np.random.default_rng(0))
    for i in range(steps):
        state, metrics = step(state, frozen, next(stream))
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i:4d}  loss {metrics['loss']:.3f}", flush=True)

    @jax.jit
    def predict_batch(params, images):
        logits = nnx.merge(graphdef, params, frozen).predict(to_input(images))
        return jnp.argmax(upsample_logits(logits, images.shape[1:]), axis=-1)

    def predict(images):
        rows = np.arange(-(-len(images) // BATCH) * BATCH).reshape(-1, BATCH) % len(images)
        ids = [predict_batch(state.params, images[r]) for r in rows]
        return np.concatenate(ids)[: len(images)]

    return predict


def main(steps: int, size: int, train_cases: int, test_cases: int) -> None:
    images, labels = training_slices(range(train_cases), size)
    print(f"{len(images)} training slices of {train_cases} cases, {size} px")
    predict = train(images, labels, steps, size)

    scores = []
    for case in range(train_cases, train_cases + test_cases):
        images, labels = load_case(case, size)
        ids = predict(images)
        scores.append([dice(ids == k, labels == k) for k in range(1, len(CLASSES))])
    means = np.nanmean(scores, axis=0)
    for name, value in zip(CLASSES[1:], means, strict=True):
        print(f"{name:<14} Dice {value:.3f}")
    print(f"{'mean':<14} Dice {means.mean():.3f}  ({test_cases} held-out cases)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=128, help="pixels, a multiple of 8")
    parser.add_argument("--train-cases", type=int, default=16)
    parser.add_argument("--test-cases", type=int, default=4)
    main(**vars(parser.parse_args()))
