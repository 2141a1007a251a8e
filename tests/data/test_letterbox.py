"""Slices to the size of the network and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.letterbox import Letterbox, logits_to_native, to_model
from pgpsam_jax.data.preprocessing import Preprocessing, quantize
from tests.support.optional import torch


@pytest.mark.parametrize("window", [(-125, 275), (10, 90)])
def test_256_levels_are_the_bytes_that_the_release_stores(window):
    """Its pictures hold the integer part of 255 times the share of the window."""
    low, high = window
    values = np.arange(-1100, 1500, dtype=np.int16).reshape(1, 20, 130)
    clipped = np.clip(values, low, high).astype(int)
    stored = 255 * (clipped - low) // (high - low)
    letterbox = Letterbox.of((20, 130), 130)
    inside = np.s_[:, letterbox.top : letterbox.top + 20, letterbox.left : letterbox.left + 130]
    seen = Preprocessing(130, window, levels=256).to_model(values, window)
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen[inside], stored.astype(np.float32) / 255)
    np.testing.assert_array_equal(np.round(255 * seen.astype(np.float16))[inside], stored)
    continuous = Preprocessing(130, window).to_model(values, window)[inside]
    assert 0 < (continuous - seen[inside]).max() < 1 / 255


@given(st.integers(2, 300), st.integers(0, 2**31 - 1))
def test_levels_never_raise_an_intensity(levels, seed):
    images = np.random.default_rng(seed).random(200, np.float32)
    images[:2] = 0, 1
    seen = quantize(images, levels)
    assert seen.dtype == np.float32 and (seen - images).max() < 1e-6
    assert (images - seen).max() < 1.001 / (levels - 1)
    assert len(np.unique(seen)) <= levels and seen[0] == 0 and seen[1] == 1
    assert quantize(images, 0) is images


@given(st.integers(1, 600), st.integers(1, 600), st.integers(16, 1024))
def test_fit_is_centered_and_fills_the_longer_side(height, width, size):
    letterbox = Letterbox.of((height, width), size)
    assert max(letterbox.height, letterbox.width) == size
    exact = (height * size / max(height, width), width * size / max(height, width))
    for side, wanted, start in zip(
        (letterbox.height, letterbox.width), exact, (letterbox.top, letterbox.left), strict=True
    ):
        assert 1 <= side <= size and abs(side - max(wanted, 1)) <= 0.5
        assert 0 <= (size - side) - 2 * start <= 1


@pytest.mark.parametrize("shape", [(20, 31), (64, 64), (90, 40), (200, 130), (7, 300)])
def test_images_match_jax_resize(shape):
    images = np.random.default_rng(0).random((3, *shape), np.float32)
    letterbox = Letterbox.of(shape, 64)
    out = to_model(images, letterbox, order=1)
    inside = out[
        :,
        letterbox.top : letterbox.top + letterbox.height,
        letterbox.left : letterbox.left + letterbox.width,
    ]
    oracle = jax.image.resize(
        images, (3, letterbox.height, letterbox.width), "linear", antialias=True
    )
    np.testing.assert_allclose(inside, oracle, atol=2e-6)
    assert out.dtype == np.float32 and out.sum() == pytest.approx(inside.sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 31), (64, 64), (90, 40), (200, 130)])
def test_labels_take_the_nearest_pixel(shape):
    labels = np.random.default_rng(0).integers(0, 9, (2, *shape)).astype(np.uint8)
    letterbox = Letterbox.of(shape, 64)
    out = to_model(labels, letterbox, order=0)
    expected = np.zeros((2, 64, 64), np.uint8)
    for i in range(letterbox.height):
        for j in range(letterbox.width):
            y = math.floor((i + 0.5) * shape[0] / letterbox.height)
            x = math.floor((j + 0.5) * shape[1] / letterbox.width)
            expected[:, letterbox.top + i, letterbox.left + j] = labels[:, y, x]
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "shape,h", [((64, 64), 16), ((64, 64), 64), ((50, 64), 64), ((150, 300), 32)]
)
def test_logits_match_torch_interpolate(shape, h):
    """Crop, then torch's half-pixel bilinear (align_corners False), where the crop is whole."""
    letterbox = Letterbox.of(shape, 64)
    logits = np.random.default_rng(1).normal(size=(2, h, h, 3)).astype(np.float32)
    rows = slice(letterbox.top * h // 64, (letterbox.top + letterbox.height) * h // 64)
    assert letterbox.top * h % 64 == 0 and letterbox.height * h % 64 == 0 and letterbox.width == 64
    cropped = torch.from_numpy(logits[:, rows].transpose(0, 3, 1, 2).copy())
    oracle = torch.nn.functional.interpolate(cropped, shape, mode="bilinear", align_corners=False)
    out = jax.jit(lambda x: logits_to_native(x, letterbox, shape))(logits)
    np.testing.assert_allclose(out, oracle.numpy().transpose(0, 2, 3, 1), atol=2e-5)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize(
    "shape,size", [((101, 122), 256), ((150, 67), 48), ((23, 90), 92), ((80, 80), 80)]
)
def test_logits_keep_linear_ramps(shape, size, stride):
    """A ramp over the input comes back as that ramp at the native pixel centers, at any stride."""
    letterbox = Letterbox.of(shape, size)
    centers = (np.arange(size // stride) + 0.5) * stride
    y, x = np.meshgrid(centers, centers, indexing="ij")
    out = np.asarray(logits_to_native(jnp.stack([y, x], -1)[None], letterbox, shape))[0]
    sides = [(letterbox.top, letterbox.height), (letterbox.left, letterbox.width)]
    for axis, (start, length) in enumerate(sides):
        wanted = start + (np.arange(shape[axis]) + 0.5) * length / shape[axis]
        got = out[..., axis].mean(axis=1 - axis)
        free = (wanted >= start + 1.5 * stride) & (wanted <= start + length - 1.5 * stride)
        np.testing.assert_allclose(got[free], wanted[free], atol=1e-3)


def test_padding_never_leaks_into_native_pixels():
    letterbox = Letterbox.of((37, 101), 64)
    for h in (16, 64):
        logits = np.full((1, h, h, 1), np.nan, np.float32)
        first, last = (
            math.ceil(letterbox.top * h / 64),
            (letterbox.top + letterbox.height) * h // 64,
        )
        logits[:, first:last] = 1
        weighted = jnp.where(jnp.isnan(logits), 1e9, logits)
        np.testing.assert_allclose(logits_to_native(weighted, letterbox, (37, 101)), 1, atol=1e-6)


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


# (native shape, input side): enlarged, shrunk twofold, wide, shrunk, the same size.
GRIDS = [
    ((101, 122), 256),
    ((300, 211), 150),
    ((64, 200), 200),
    ((250, 180), 160),
    ((128, 128), 128),
]


@given(st.integers(0, 10**6), st.sampled_from(GRIDS))
@settings(max_examples=60, deadline=None)
def test_label_round_trip(seed, grid):
    """Native -> input -> one-hot logits -> native; the blobs keep Dice > 0.97."""
    (height, width), size = grid
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    radii = rng.uniform(0.25, 0.45, 2) * (height, width)
    center = np.array([height, width]) * rng.uniform(0.45, 0.55, 2)
    blob = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1
    labels = np.where(blob, 1 + (x > center[1]), 0).astype(np.uint8)[None]
    letterbox = Letterbox.of((height, width), size)
    logits = jax.nn.one_hot(to_model(labels, letterbox, order=0), 3)
    back = np.asarray(logits_to_native(logits, letterbox, (height, width))).argmax(-1)
    assert min(dice(back == k, labels == k) for k in (1, 2)) > 0.97
    if (letterbox.height, letterbox.width) == (height, width):
        np.testing.assert_array_equal(back, labels)


@pytest.mark.parametrize("shape", [(96, 96), (50, 96), (96, 51)])
def test_label_round_trip_is_exact_at_the_same_size(shape):
    labels = np.random.default_rng(0).integers(0, 5, (2, *shape)).astype(np.uint8)
    letterbox = Letterbox.of(shape, 96)
    logits = jax.nn.one_hot(to_model(labels, letterbox, order=0), 5)
    native = logits_to_native(logits, letterbox, shape)
    np.testing.assert_array_equal(native, jax.nn.one_hot(labels, 5))
