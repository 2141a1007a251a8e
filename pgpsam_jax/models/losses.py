"""Segmentation losses: cross-entropy, soft Dice, their weighted sums, and each method's loss.

The loss of a method takes (outputs of its model, labels (B, H, W), epoch, `StepConfig`) and returns
the scalar and a flat dictionary of float32 scalars to log.

Letters: `B` batch, `H W` pixels, `K` classes with background. Everything is computed in float32
(float64 for float64 logits).
All means and sums run over the whole array, so under `jax.jit` with a sharded batch they are those
of the *global* batch. Class masks are comparisons inside a reduction, which XLA fuses: no one-hot
array is stored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.sam.mask_decoder import upsample_logits

_DICE_EPS = 1e-5


def cross_entropy(logits, labels):
    """Returns the mean of -log softmax(logits)[label]: (B, H, W, K), (B, H, W) -> scalar."""
    log_probability = jax.nn.log_softmax(logits.astype(wide(logits.dtype)))
    return -jnp.sum(_where_class(labels, log_probability)) / labels.size


def soft_dice_loss(logits, labels):
    """1 - soft Dice, averaged over all K classes, background included.

    Source: docs/release_code.md#loss-schedule-and-selection.
    Dice_k = 2 sum(p y) / (sum p^2 + sum y^2 + 1e-5), sums over batch and pixels together. A class
    absent from the batch has Dice 0, so it adds 1 / K to the loss with almost no gradient.

    Args:
      logits: (B, H, W, K).
      labels: (B, H, W) integer class ids below K.

    Returns:
      float32 scalar.
    """
    overlap, sizes = _overlap_and_sizes(logits, labels)
    return jnp.mean(1 - 2 * overlap / (sizes + _DICE_EPS))


def foreground_dice_loss(logits, labels):
    """1 - soft Dice, averaged over the foreground classes: AutoSAM's.

    Dice_k = (2 sum(p y) + 1) / (sum p^2 + sum y^2 + 1), sums over batch and pixels together. A
    class absent from the batch has Dice 1 where it is not predicted.
    """
    overlap, sizes = _overlap_and_sizes(logits, labels)
    return jnp.mean(1 - (2 * overlap + 1) / (sizes + 1), where=jnp.arange(len(sizes)) > 0)


def _overlap_and_sizes(logits, labels):
    """(K,) sum(p y) and sum(p^2) + sum(y^2) over batch and pixels, p the softmax."""
    probability = jax.nn.softmax(logits.astype(wide(logits.dtype)))
    pixels = (0, 1, 2)
    overlap = jnp.sum(_where_class(labels, probability), axis=pixels)
    predicted = jnp.sum(jnp.square(probability), axis=pixels)
    actual = jnp.sum(_where_class(labels, jnp.ones_like(probability)), axis=pixels)
    return overlap, predicted + actual


def _where_class(labels, values):
    """`values` (..., K) where the label is that class, else 0."""
    return jnp.where(labels[..., None] == jnp.arange(values.shape[-1]), values, 0)


def segmentation_loss(logits, labels, ce_weight: float = 0.2, dice_weight: float = 0.8):
    """(ce_weight * CE + dice_weight * Dice, {"ce": ..., "dice": ...}) for one output."""
    parts = {"ce": cross_entropy(logits, labels), "dice": soft_dice_loss(logits, labels)}
    return ce_weight * parts["ce"] + dice_weight * parts["dice"], parts


def class_shares(labels, shape: tuple[int, int], classes: int):
    """Returns the share of each foreground class in each cell, (B, H, W) -> (B, *shape, M).

    The target of outputs that are smaller than the labels and too costly to upsample. Unlike a
    single pixel of a cell of even size, it is centered where bilinear upsampling puts the logit.

    Args:
      labels: (B, H, W) class ids.
      shape: (h, w), which divide H and W.
      classes: M, the number of foreground classes, 1 to M.
    """
    b, (h, w) = len(labels), shape
    cells = labels.reshape(b, h, labels.shape[1] // h, w, labels.shape[2] // w, 1)
    return jnp.mean(cells == jnp.arange(1, classes + 1), axis=(2, 4), dtype=jnp.float32)


def resize_labels_nearest(labels, shape: tuple[int, int]):
    """(B, H, W) -> (B, *shape) by PyTorch's nearest rule: row i comes from floor(i * (H / h)).

    That is the first pixel of a cell, while bilinear upsampling puts a logit at its center: masks
    learned from such labels are shifted by half a cell less half a pixel. Only the authors' code
    does this, which preset `release` reproduces.
    """
    if labels.shape[1:] == tuple(shape):
        return labels
    rows, columns = (_source_index(*sizes) for sizes in zip(labels.shape[1:], shape, strict=True))
    return labels[:, rows[:, None], columns]


def _source_index(source: int, target: int):
    # float32 like PyTorch: for some size pairs the rounding decides which pixel is read.
    scale = np.float32(source) / np.float32(target)
    index = np.floor(np.arange(target, dtype=np.float32) * scale).astype(np.int32)
    return np.minimum(index, source - 1)


def final_weight(epoch):
    """Share of the final output in the loss, 0.6^(0.99^epoch): 0.6 at first, toward 1."""
    return jnp.float32(0.6) ** (jnp.float32(0.99) ** epoch)


def deep_supervision_loss(outputs, labels, epoch, ce_weight: float = 0.2, dice_weight: float = 0.8):
    """L = (1 - w) L_bootstrap + w L_final, with w = `final_weight(epoch)`.

    Args:
      outputs: {"bootstrap": (B, h, w, K), "final": (B, H, W, K)} logits; each is compared with
        the labels at its own resolution (`resize_labels_nearest`).
      labels: (B, H, W) integer class ids.
      epoch: scalar, may be traced.

    Returns:
      The scalar loss, and a flat dictionary of float32 scalars to log.
    """
    weight = final_weight(epoch)
    loss = 0
    metrics = {"final_weight": weight}
    for name, share in (("bootstrap", 1 - weight), ("final", weight)):
        logits = outputs[name]
        target = resize_labels_nearest(labels, logits.shape[1:3])
        value, parts = segmentation_loss(logits, target, ce_weight, dice_weight)
        loss += share * value
        metrics |= {f"{name}_{part}": part_value for part, part_value in parts.items()}
    return loss, {"loss": loss} | metrics


def deep_supervision(outputs, labels, epoch, config):
    """`deep_supervision_loss` with both outputs at the labels' size: PGP-SAM and H-SAM."""
    outputs = {name: upsample_logits(logits, labels.shape[1:]) for name, logits in outputs.items()}
    return deep_supervision_loss(outputs, labels, epoch, config.ce_weight, config.dice_weight)


def released_deep_supervision(outputs, labels, epoch, config):
    """Computes the same with the bootstrap at its own size and the labels resized to it."""
    outputs = outputs | {"final": upsample_logits(outputs["final"], labels.shape[1:])}
    return deep_supervision_loss(outputs, labels, epoch, config.ce_weight, config.dice_weight)


def final_only(outputs, labels, epoch, config):
    """`segmentation_loss` of the final output at the labels' size: SAMed and SAM-LST."""
    logits = upsample_logits(outputs["final"], labels.shape[1:])
    loss, parts = segmentation_loss(logits, labels, config.ce_weight, config.dice_weight)
    return loss, {"loss": loss} | parts


def entropy_and_foreground_dice(outputs, labels, epoch, config):
    """Weighted cross-entropy + `foreground_dice_loss` at the labels' own size: AutoSAM."""
    logits = upsample_logits(outputs["final"], labels.shape[1:])
    parts = {"ce": cross_entropy(logits, labels), "dice": foreground_dice_loss(logits, labels)}
    loss = config.ce_weight * parts["ce"] + config.dice_weight * parts["dice"]
    return loss, {"loss": loss} | parts


def prototype_prompts(outputs, labels, epoch, config):
    """Soft Dice of every class against all else + `prototype_contrast`, 1:1: SurgicalSAM.

    Dice_k = 2 sum(p y) / (sum p^2 + sum y^2 + 2e-3) with p = sigmoid, at the labels' size, sums
    over batch and pixels together: an image without the class counts as long as another has it.
    """
    logits = upsample_logits(outputs["final"], labels.shape[1:])[..., 1:]
    probability, pixels = jax.nn.sigmoid(logits), (0, 1, 2)
    there = labels[..., None] == jnp.arange(1, logits.shape[-1] + 1)
    overlap = jnp.sum(jnp.where(there, probability, 0), axis=pixels)
    sizes = jnp.sum(jnp.square(probability), axis=pixels) + jnp.sum(there, axis=pixels)
    dice = jnp.mean(1 - 2 * overlap / (sizes + 2e-3))
    contrast = prototype_contrast(outputs["prototypes"], outputs["features"], labels)
    loss = dice + contrast
    return loss, {"loss": loss, "dice": dice, "contrast": contrast}


def prototype_contrast(prototypes, features, labels, temperature: float = 0.07):
    """NT-Xent between each prototype and the mean features of its class in the images.

    Args:
      prototypes: (M, C), of classes 1 to M.
      features: (B, h, w, C).
      labels: (B, H, W) class ids; a class counts in an image that has a pixel of it.

    Returns:
      float32 scalar, the mean over (image, class) of -log of the pair's share, exp(cosine / t),
      among itself and those of this prototype with other classes; 0 without any.
    """
    features = features.astype(wide(features.dtype))
    shares = class_shares(labels, features.shape[1:3], len(prototypes))
    areas = jnp.sum(shares, axis=(1, 2))
    there = areas > 0
    means = jnp.einsum("bhwk,bhwc->bkc", shares, features, precision="highest")
    means = _unit(means / jnp.where(there, areas, 1)[..., None])
    similar = jnp.einsum("mc,bkc->mbk", _unit(prototypes), means, precision="highest")
    similar /= temperature
    same = jnp.eye(len(prototypes), dtype=bool)[:, None]  # prototype, image, class
    others = jnp.where(there & ~same, similar, -1e30)
    others = jax.nn.logsumexp(others, axis=(1, 2), keepdims=True)
    losses = jnp.where(there & same, jax.nn.softplus(others - similar), 0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(there), 1)


def _unit(x):
    """Vectors on the last axis at length 1; zeros stay, with a slope."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def one_against_rest(outputs, labels, epoch, config):
    """Logistic regression of every class against all else, as scikit-learn's: FSSP-SAM.

    `coarse` logits (B, h, w, M) of classes 1 to M and the `kernel` they came from. labels: class
    ids, or their precomputed `class_shares` (B, h, w, M), where cells below 0 do not count. Each
    class has the mean loss of its cells and |w|^2 / 2 over their number (C 1).
    """
    logits = outputs["coarse"].astype(wide(outputs["coarse"].dtype))
    shares = (
        labels if labels.ndim == 4 else class_shares(labels, logits.shape[1:3], logits.shape[3])
    )
    entropy = jax.nn.softplus(logits) - shares * logits
    known = shares >= 0
    count = jnp.maximum(jnp.sum(known[..., 0]), 1)
    entropy = jnp.sum(jnp.where(known, entropy, 0)) / count
    loss = entropy + 0.5 * jnp.sum(jnp.square(outputs["kernel"])) / count
    return loss, {"loss": loss, "ce": entropy}
