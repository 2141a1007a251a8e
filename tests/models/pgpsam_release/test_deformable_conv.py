"""Modulated deformable convolution against its definition, finite differences and plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import layers
from pgpsam_jax.models.pgpsam_release.deformable_conv import (
    TAPS,
    DeformableConv,
    deformable_depthwise,
    tap_points,
)

compiled = jax.jit(deformable_depthwise, static_argnums=4)
FORWARD_TOLERANCE = 2e-6  # absolute, float32, values of order one
DIFFERENCE_TOLERANCE = 1e-7  # relative, float64 central differences


def draw(seed, b=2, h=5, w=7, c=3, spread=3.0, dtype=np.float32):
    """x, kernel, offsets, modulation."""
    rng = np.random.default_rng(seed)
    shapes = (b, h, w, c), (3, 3, c), (b, h, w, TAPS, 2), (b, h, w, TAPS)
    x, kernel, offsets, modulation = (rng.standard_normal(shape) for shape in shapes)
    return tuple(a.astype(dtype) for a in (x, kernel, spread * offsets, 0.5 + 0.2 * modulation))


def by_definition(x, kernel, offsets, modulation, dilation):
    """Every output by hand: all pixels weighed by their distance to the point, none outside."""
    x, kernel, offsets, modulation = (np.float64(a) for a in (x, kernel, offsets, modulation))
    out = np.zeros_like(x)
    b, h, w, _ = x.shape
    rows, columns = np.arange(h)[:, None], np.arange(w)[None, :]
    for n, i, j, tap in np.ndindex(b, h, w, TAPS):
        y = i + dilation * (tap // 3 - 1) + offsets[n, i, j, tap, 0]
        z = j + dilation * (tap % 3 - 1) + offsets[n, i, j, tap, 1]
        near = np.clip(1 - abs(rows - y), 0, None) * np.clip(1 - abs(columns - z), 0, None)
        sample = (near[..., None] * x[n]).sum((0, 1))
        out[n, i, j] += modulation[n, i, j, tap] * kernel[tap // 3, tap % 3] * sample
    return out


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), dilation=st.sampled_from([1, 3]), spread=st.sampled_from([0.3, 4]))
def test_is_its_definition(seed, dilation, spread):
    given = draw(seed, spread=spread)
    got = compiled(*given, dilation)
    np.testing.assert_allclose(
        got, by_definition(*given, dilation), rtol=0, atol=20 * FORWARD_TOLERANCE
    )


@pytest.mark.parametrize("dilation", [1, 3])
def test_without_offsets_it_is_the_plain_convolution(dilation):
    x, kernel, offsets, _ = draw(1)
    half = np.full(offsets.shape[:-1], 0.5, np.float32)
    got = compiled(x, kernel, np.zeros_like(offsets), half, dilation)
    plain = layers.depthwise(jnp.asarray(x), kernel, dilation)
    np.testing.assert_allclose(got, plain / 2, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize(("size", "dilation"), [((3, 3), 1), ((3, 3), 3), ((1, 5), 1), ((5, 1), 1)])
def test_plain_convolution_is_that_of_xla(size, dilation):
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal((2, 6, 7, 4)), rng.standard_normal((*size, 4))
    x, kernel = jnp.float32(x), jnp.float32(kernel)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    got = layers.depthwise(x, kernel, dilation)
    np.testing.assert_allclose(got, expected, rtol=0, atol=FORWARD_TOLERANCE)


def test_gradient_to_every_input_against_finite_differences():
    with jax.enable_x64(True):
        given = [jnp.asarray(a) for a in draw(3, b=1, h=4, w=5, c=2, dtype=np.float64)]
        # Bilinear weights have a kink at whole pixels: keep the points away from them.
        points = tap_points((4, 5), 3) + given[2]
        given[2] += 0.25 * ((points % 1 < 0.1) | (points % 1 > 0.9))
        probe = jnp.asarray(np.random.default_rng(4).standard_normal((1, 4, 5, 2)))

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
        def both(*inputs):
            return (probe * deformable_depthwise(*inputs, 3)).sum()

        def value(*inputs):
            return both(*inputs)[0]

        gradients = both(*given)[1]
        rng, step = np.random.default_rng(5), 1e-4
        for n, gradient in enumerate(gradients):
            direction = jnp.asarray(rng.standard_normal(gradient.shape))
            ends = [
                value(*given[:n], given[n] + sign * step * direction, *given[n + 1 :])
                for sign in (1, -1)
            ]
            difference = (ends[0] - ends[1]) / (2 * step)
            product = float((gradient * direction).sum())
            assert product == pytest.approx(float(difference), rel=DIFFERENCE_TOLERANCE), n


def test_points_far_outside_read_zero_and_pull_nothing():
    x, kernel, offsets, modulation = draw(6)

    def value(x, offsets):
        return jnp.abs(deformable_depthwise(x, kernel, offsets, modulation, 1)).sum()

    far = np.where(offsets > 0, np.float32(50), np.float32(-50))
    found, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(jnp.asarray(x), far)
    assert found == 0 and not any(np.any(gradient) for gradient in gradients)


def test_the_module_starts_as_half_the_plain_convolution():
    x = jnp.float32(np.random.default_rng(7).standard_normal((1, 6, 6, 4)))
    kinds = ("deformable", "plain")
    moving, plain = (
        DeformableConv(4, 3, kind=kind, dtype=jnp.float32, rngs=nnx.Rngs(0)) for kind in kinds
    )
    both = jax.jit(lambda modules, x: [module(x) for module in modules])
    got, expected = both([moving, plain], x)
    np.testing.assert_allclose(2 * got, expected, rtol=0, atol=FORWARD_TOLERANCE)
    assert not hasattr(plain, "offset")
    with pytest.raises(UserError, match=r"model\.dcn is 'cubic'; choose deformable or plain"):
        DeformableConv(4, 3, kind="cubic", dtype=jnp.float32, rngs=nnx.Rngs(0))
