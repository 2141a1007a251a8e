"""Losses against numpy transcriptions, torch gradients and a batch sharded over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgpsam_jax.models import losses
from tests.support.optional import torch

K = 9


def batch(seed=0, shape=(8, 12, 10), classes=K, present=K):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (*shape, classes)).astype(np.float32)
    return logits, rng.integers(0, present, shape).astype(np.int32)


# Compiled once: op by op, each of these took longer.
cross_entropy, soft_dice_loss = jax.jit(losses.cross_entropy), jax.jit(losses.soft_dice_loss)
segmentation_loss = jax.jit(losses.segmentation_loss)


def softmax(logits):
    exponential = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def plain_cross_entropy(logits, labels):
    picked = np.take_along_axis(softmax(logits), labels[..., None], axis=-1)
    return -np.log(picked).mean()


def plain_dice(logits, labels):
    probability, total = softmax(logits), 0.0
    for k in range(logits.shape[-1]):
        p, y = probability[..., k], (labels == k).astype(np.float64)
        total += 1 - 2 * (p * y).sum() / ((p**2).sum() + (y**2).sum() + 1e-5)
    return total / logits.shape[-1]


def torch_loss(logits, labels):
    """0.2 CE + 0.8 Dice on float64 torch tensors, channels last."""
    ce = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), labels)
    p = logits.softmax(-1)
    y = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(p.dtype)
    space = (0, 1, 2)
    dice = 2 * (p * y).sum(space) / ((p * p).sum(space) + (y * y).sum(space) + 1e-5)
    return 0.2 * ce + 0.8 * (1 - dice).mean()


@pytest.mark.parametrize("present", [K, 4])
def test_values_equal_the_plain_transcription(present):
    logits, labels = batch(present=present)
    ce, dice = plain_cross_entropy(logits, labels), plain_dice(logits, labels)
    np.testing.assert_allclose(cross_entropy(logits, labels), ce, rtol=1e-6)
    np.testing.assert_allclose(soft_dice_loss(logits, labels), dice, rtol=1e-6)
    loss, parts = segmentation_loss(logits, labels)
    np.testing.assert_allclose(loss, 0.2 * ce + 0.8 * dice, rtol=1e-6)
    np.testing.assert_allclose([parts["ce"], parts["dice"]], [ce, dice], rtol=1e-6)


@pytest.mark.parametrize("present", [K, 4])
def test_gradients_equal_torch_autograd(present):
    logits, labels = batch(1, present=present)
    gradient, _ = jax.jit(jax.grad(losses.segmentation_loss, has_aux=True))(logits, labels)
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    torch_loss(leaf, torch.tensor(labels, dtype=torch.int64)).backward()
    expected = leaf.grad.numpy()
    error = np.abs(gradient - expected).max()
    assert error <= 1e-6 * np.abs(expected).max(), error


def test_no_precision_is_lost_over_many_pixels():
    # 1.6 million pixels, nearly all confident background: a running float32 sum would stall.
    rng, classes = np.random.default_rng(2), 3
    organs = rng.random((6, 512, 512)) < 0.03
    labels = np.where(organs, rng.integers(0, classes, organs.shape), 0).astype(np.int32)
    logits = rng.normal(0, 0.3, (*labels.shape, classes)).astype(np.float32)
    logits[..., 0] += 4
    ce, dice = cross_entropy(logits, labels), soft_dice_loss(logits, labels)
    np.testing.assert_allclose(ce, plain_cross_entropy(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(dice, plain_dice(logits, labels), rtol=1e-6)


def test_absent_class_costs_its_full_share_and_a_perfect_answer_nothing():
    labels = np.arange(2 * 6 * 6).reshape(2, 6, 6).astype(np.int32) % 3
    perfect = 100 * np.eye(4, dtype=np.float32)[labels]
    np.testing.assert_allclose(soft_dice_loss(perfect[..., :3], labels), 0, atol=1e-6)
    # The fourth class is neither there nor predicted: eps stands below the line only.
    np.testing.assert_allclose(soft_dice_loss(perfect, labels), 0.25, atol=1e-6)
    gradient = jax.jit(jax.grad(losses.soft_dice_loss))(perfect, labels)
    assert np.abs(gradient).max() < 1e-6


def test_bfloat16_logits_are_computed_in_float32():
    logits, labels = batch(3)
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, _ = losses.segmentation_loss(half, labels)
    expected, _ = losses.segmentation_loss(half.astype(jnp.float32), labels)
    assert loss.dtype == jnp.float32 and loss == expected


def test_sharded_batch_gives_the_loss_of_the_whole_batch():
    # Classes are spread unevenly, so that a mean of per-device Dice would be another number.
    logits, labels = batch(4, shape=(8, 16, 16))
    labels = np.where(np.arange(8)[:, None, None] % 2, labels, 0).astype(np.int32)
    function = jax.jit(jax.value_and_grad(lambda x, y: losses.segmentation_loss(x, y)[0]))
    value, gradient = function(logits, labels)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    split = NamedSharding(mesh, PartitionSpec("data"))
    inputs = jax.device_put(logits, split), jax.device_put(labels, split)
    sharded_value, sharded_gradient = function(*inputs)
    assert sharded_gradient.sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-6 * np.abs(gradient).max())
    local = [plain_dice(x[None], y[None]) for x, y in zip(logits, labels, strict=True)]
    assert abs(np.mean(local) - plain_dice(logits, labels)) > 1e-2


@settings(max_examples=60, deadline=None)
@given(source=st.integers(1, 96), target=st.integers(1, 96), other=st.integers(1, 96))
def test_label_resize_equals_torch_nearest(source, target, other):
    labels = np.arange(source * 7).reshape(1, source, 7).astype(np.int32)
    ours = losses.resize_labels_nearest(labels, (target, other))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(labels, dtype=torch.float32)[None], size=(target, other), mode="nearest"
    )[0]
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_label_resize_takes_every_fourth_pixel_from_the_first():
    labels = np.random.default_rng(5).integers(0, K, (2, 64, 64)).astype(np.int32)
    resized = losses.resize_labels_nearest(labels, (16, 16))
    np.testing.assert_array_equal(resized, labels[:, ::4, ::4])


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.6), (100, 0.829), (299, 0.975)])
def test_final_weight_follows_the_published_values(epoch, weight):
    np.testing.assert_allclose(losses.final_weight(epoch), weight, atol=5e-4)
    np.testing.assert_allclose(losses.final_weight(epoch), 0.6 ** (0.99**epoch), rtol=1e-6)


@pytest.mark.parametrize("epoch", [0, 37])
def test_deep_supervision_mixes_the_two_outputs(epoch):
    final, labels = batch(6, shape=(2, 16, 16))
    bootstrap, _ = batch(7, shape=(2, 4, 4))
    function = jax.jit(losses.deep_supervision_loss)
    loss, metrics = function({"bootstrap": bootstrap, "final": final}, labels, epoch)
    weight, small = 0.6 ** (0.99**epoch), labels[:, ::4, ::4]
    parts = {
        "bootstrap_ce": plain_cross_entropy(bootstrap, small),
        "bootstrap_dice": plain_dice(bootstrap, small),
        "final_ce": plain_cross_entropy(final, labels),
        "final_dice": plain_dice(final, labels),
    }
    low = 0.2 * parts["bootstrap_ce"] + 0.8 * parts["bootstrap_dice"]
    high = 0.2 * parts["final_ce"] + 0.8 * parts["final_dice"]
    expected = (1 - weight) * low + weight * high
    assert set(metrics) == {"loss", "final_weight", *parts}
    np.testing.assert_allclose([loss, metrics["loss"]], expected, rtol=1e-6)
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
