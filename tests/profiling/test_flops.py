"""The closed form against XLA's and an own count of the traced model, and figures by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pgpsam_jax.models import layers
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import trainable
from pgpsam_jax.models.pgpsam.model import PgpSam, PgpSamConfig
from pgpsam_jax.models.sam import tiny_vit_conv
from pgpsam_jax.models.sam.image_encoder import EncoderConfig, ImageEncoder
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import MaskDecoder
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.profiling import accelerators, flops

LORA = LoraConfig(4, ("q", "v"))


# Figures of the published ViT-b with windows padded before the projections: 227.2 GFLOP at 512 px,
# of which 13.9 % padding, and so on; LoRA, not counted there, adds 0.1 to 0.2 %.
@pytest.mark.parametrize(
    ("size", "gflop", "padding"), [(1024, 972, 0.035), (512, 227, 0.139), (256, 69, 0.33)]
)
def test_published_vit_b(size, gflop, padding):
    config = SamConfig.preset("vit_b", size).encoder
    found = flops.total(flops.encoder(config, None, "frozen", pad_projections=True))
    whole = found.forward + found.forward_padding
    assert whole / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert found.forward_padding / whole == pytest.approx(padding, abs=0.006)
    assert found.training == found.forward  # nothing trains: nothing goes back


def test_padding_after_the_projections_is_in_the_attention_alone():
    config = SamConfig.preset("vit_b", 512).encoder
    ours, theirs = (
        flops.total(flops.encoder(config, LORA, "lora", pad_projections=pad))
        for pad in (False, True)
    )
    assert ours.forward == theirs.forward
    more_rows, d, windowed = 42**2 - 32**2, 768, 8
    projections = windowed * more_rows * 2 * d * 4 * d
    assert theirs.forward_padding - ours.forward_padding == projections
    # Nine windows of 14 x 14 for 1024 cells, of which four have all their cells.
    cells = [14 * 14] * 4 + [14 * 4] * 4 + [4 * 4]
    scores = 4 * d * windowed * (9 * 196**2 - sum(n * n for n in cells))
    position = 2 * d * windowed * (9 * 196 * 28 - 4 * 196 * 28 - 4 * 56 * 18 - 16 * 8)
    assert ours.forward_padding == scores + position


def products(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, two for a multiply-add."""
    total = 0.0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while")
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            zeros = math.prod(equation.params["lhs_dilation"])  # between the numbers of an input
            total += 2 * out * math.prod(shapes[1]) // shapes[1][outputs] / zeros
        total += sum(map(products, jaxprs_in_params(equation.params)))
    return total


def live_products(traced) -> float:
    """Products of the part of a traced program that its results depend on."""
    jaxpr = traced.jaxpr.jaxpr
    live, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return products(live)


# Windows that divide the grid, and the attention whose products are the formula's.
ENCODER = EncoderConfig(
    (8, 12), 4, 64, 3, 4, (1,), window_size=4, out_channels=32, attention="naive"
)


def with_gradients(function):
    """The sum of an output and its gradient to the first argument."""
    return jax.value_and_grad(lambda params, *rest: function(params, *rest).sum())


@pytest.mark.parametrize(("mode", "kind"), [("lora", nnx.LoRAParam), ("full", nnx.Param)])
def test_encoder_against_its_trace(mode, kind):
    """The formula is the products of the traced program; XLA's count has elementwise work too.

    That is a share of about 1 / width: up to 16 % here, 1 to 2 % of the published sizes.
    """
    lora = LORA if mode == "lora" else None
    model = nnx.eval_shape(lambda: ImageEncoder(ENCODER, lora, rngs=ShapeOnlyRngs()))
    graphdef, params, frozen = nnx.split(model, kind, ...)
    images = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)

    def run(params, frozen, images):
        return nnx.merge(graphdef, params, frozen)(images)[0]

    found = flops.total(flops.encoder(ENCODER, lora, mode))
    assert found.forward_padding == found.training_padding == 0
    for expected, function in ((found.forward, run), (found.training, with_gradients(run))):
        traced = jax.jit(function).trace(params, frozen, images)
        own, xla = live_products(traced), traced.lower().cost_analysis()["flops"]
        assert expected == pytest.approx(own, rel=1e-9)
        assert own < xla < 1.2 * own


def grouped(x, kernel, dilation=1, stride=1, halo=0):
    """`layers.depthwise` as one convolution, which `products` sees."""
    assert dilation == 1 and halo == 0
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=names,
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(
    ("patch", "size", "mode", "tolerance"),
    [
        (4, (56, 112), "lora", 1e-9),
        (16, (224, 448), "full", 1e-9),
        # Windows overhang: the cells outside have one key and value per block, left out.
        (4, (40, 72), "lora", 6e-4),
    ],
)
def test_tiny_vit_against_its_trace(patch, size, mode, tolerance, monkeypatch):
    monkeypatch.setattr(layers, "depthwise", grouped)
    config = SamConfig.preset("tiny_vit", size, patch, depths=(1, 2, 1, 1)).encoder
    lora, kind = (LORA, nnx.LoRAParam) if mode == "lora" else (None, nnx.Param)
    model = nnx.eval_shape(lambda: config.make(lora, rngs=ShapeOnlyRngs()))
    graphdef, params, frozen = nnx.split(model, kind, ...)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)

    def run(params, frozen, images):
        return nnx.merge(graphdef, params, frozen)(images)[0]

    found = flops.total(flops.encoder(config, lora, mode))
    assert found.forward_padding == found.training_padding == 0
    for expected, function in ((found.forward, run), (found.training, with_gradients(run))):
        own = live_products(jax.jit(function).trace(params, frozen, images))
        assert expected == pytest.approx(own, rel=tolerance)


def test_lite_medsam_against_xla(monkeypatch):
    """71.2 GFLOP an image of 256 px; XLA counts 1.4 % more, the elementwise work."""
    monkeypatch.setattr(tiny_vit_conv, "STRIP", 2**40)  # XLA counts the body of a loop once
    config = SamConfig.preset("tiny_vit", 256, 4).encoder
    model = nnx.eval_shape(lambda: config.make(None, rngs=ShapeOnlyRngs()))
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, images)
    needed = flops.total(flops.encoder(config, None, "frozen")).forward
    assert needed / 1e9 == pytest.approx(71.18, abs=0.01)
    assert 1.01 < lowered.cost_analysis()["flops"] / needed < 1.02


def test_published_sizes_against_xla():
    """At 224 px there is no padding: XLA counts 0.1 % more, the elementwise work, in blocks of a
    ViT-b, and 7 % more in the decoder, whose upscaling is thin."""
    config = SamConfig.preset("vit_b", 224, attention="naive", depth=3, global_blocks=(2,))
    model = nnx.eval_shape(lambda: ImageEncoder(config.encoder, LORA, rngs=ShapeOnlyRngs()))
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, images)
    needed = flops.total(flops.encoder(config.encoder, LORA, "lora")).forward
    assert 1 < lowered.cost_analysis()["flops"] / needed < 1.002

    decoder = SamConfig.preset("vit_b", 512).decoder
    model = nnx.eval_shape(
        lambda: MaskDecoder(decoder, 4, iou_head=True, dtype=jnp.float32, rngs=ShapeOnlyRngs())
    )
    graphdef, state = nnx.split(model)
    image, sparse = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in
                     ((1, 32, 32, 256), (1, 0, 256)))  # fmt: skip

    def logits(state, image, sparse):
        return nnx.merge(graphdef, state)(image, image[0], sparse, image, multimask=True)[0]

    lowered = jax.jit(logits).lower(state, image, sparse)
    parts = [*flops.two_way_transformer(decoder, 1024, 5), *flops.masks(decoder, 1024, 4)]
    assert 1.0 < lowered.cost_analysis()["flops"] / flops.total(parts).forward < 1.1


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 5))
def test_attention_of_windows_cell_by_cell(grid, window):
    """Against an enumeration of every pair of cells that share a window."""
    config = dataclasses.replace(ENCODER, grid=grid, window_size=window, depth=1, global_blocks=())
    h, w = (-(-n // window) * window for n in grid)
    owner = np.arange(h)[:, None] // window * w + np.arange(w) // window
    real = (np.arange(h)[:, None] < grid[0]) & (np.arange(w) < grid[1])
    together = owner.reshape(-1, 1) == owner.reshape(1, -1)
    both_real = real.reshape(-1, 1) & real.reshape(1, -1)
    column, row = (np.indices((h, w))[axis].reshape(-1) for axis in (1, 0))
    first_column, first_row = (together & (place % window == 0)[None, :] for place in (column, row))
    needed = 4 * config.width * np.sum(together & both_real)
    every = 4 * config.width * np.sum(together)
    # A query meets as many rows (columns) of keys as there are in the first column (row).
    needed += 2 * config.width * np.sum(first_column & both_real)
    needed += 2 * config.width * np.sum(first_row & both_real)
    every += 2 * config.width * (np.sum(first_column) + np.sum(first_row))
    found = flops.encoder(config, None, "frozen")
    without = flops.encoder(dataclasses.replace(config, depth=0), None, "frozen")
    cells, d = grid[0] * grid[1], config.width
    linear = 2 * cells * d * 12 * d
    assert flops.total(found).forward - flops.total(without).forward == linear + needed
    assert flops.total(found).forward_padding == every - needed


def test_chips():
    assert accelerators.utilization(494.5e12, "NVIDIA H100 80GB HBM3", "bfloat16") == 0.5
    assert accelerators.utilization(1e12, "NVIDIA H100 80GB HBM3", "float32") is None
    assert accelerators.find_chip("cpu") is None
    assert accelerators.utilization(1e12, "cpu", "bfloat16") is None
    assert accelerators.find_chip("TPU v5 lite") == accelerators.find_chip("TPU v5e")
    for (
        chip
    ) in accelerators.CHIPS.values():  # 150 to 600 FLOPs a byte: no unit is off by a thousand
        assert 100 < chip.bf16_flops / chip.memory_bandwidth < 600
        assert 16e9 <= chip.memory_bytes <= 150e9


def traced_pgpsam(taps, parts):
    """(configuration, function that merges the model, its abstract arguments)."""
    depth = max(taps) + 1
    sam = SamConfig.preset(
        "vit_t", 64, 8, attention="naive", depth=depth, global_blocks=(depth - 1,)
    )
    config = PgpSamConfig(sam, num_classes=9, stage_taps=taps, lora=LORA, **parts)
    model = nnx.eval_shape(lambda: PgpSam(config, rngs=ShapeOnlyRngs()))
    graphdef, params, frozen = nnx.split(model, trainable("lora"), ...)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return config, lambda *states: nnx.merge(graphdef, *states), (params, frozen, images)


WITHOUT_PPR = {"ppr": False}
BARE = {"ppr": False, "ppg": False, "cfm": False}


@pytest.mark.parametrize(
    ("taps", "parts"),
    [
        ((2, 1, 0), {}),
        pytest.param((1, 0), WITHOUT_PPR, marks=pytest.mark.slow),
        pytest.param((1,), BARE, marks=pytest.mark.slow),
    ],
)
def test_pgpsam_against_its_trace(taps, parts):
    """Three stages have a pass whose masks nobody asks for."""
    config, merge, arguments = traced_pgpsam(taps, parts)

    def final(params, frozen, images):
        return merge(params, frozen)(images)["final"]

    found = flops.total(flops.pgpsam(config, "lora", training=False)).forward
    own = live_products(jax.jit(final).trace(*arguments))
    assert found == pytest.approx(own, rel=0.005)  # without the code of positions


@pytest.mark.parametrize(
    ("taps", "parts"),
    [
        pytest.param((2, 1, 0), {}, marks=pytest.mark.slow),
        pytest.param((1, 0), WITHOUT_PPR, marks=pytest.mark.slow),
        ((0,), {}),
        pytest.param((1,), BARE, marks=pytest.mark.slow),
    ],
)
def test_step_of_pgpsam_against_its_trace(taps, parts):
    """A step whose loss is the sum of both outputs.

    Without PPR the bootstrap is for its own loss alone.
    """
    config, merge, arguments = traced_pgpsam(taps, parts)

    def both(params, frozen, images):
        outputs = merge(params, frozen)(images)
        return outputs["final"].sum() + outputs["bootstrap"].sum()

    found = flops.total(flops.pgpsam(config, "lora", training=True)).training
    own = live_products(jax.jit(with_gradients(both)).trace(*arguments))
    assert found == pytest.approx(own, rel=0.005)
