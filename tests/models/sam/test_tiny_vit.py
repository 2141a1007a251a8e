"""TinyViT against an independent transcription on torch, and what must hold of it.

Tolerances are relative L2 errors, about three times what was measured on CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import layers
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam import tiny_vit, tiny_vit_conv
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.sharding import device_mesh
from tests.reference import tiny_vit_torch
from weights_conversion.remap import read, write
from weights_conversion.sam import LAYOUTS
from weights_conversion.tensor_layouts import Layout

TOLERANCE = 3e-6
DEPTHS = (1, 2, 1, 1)  # compiling is what these tests cost; `test_golden_lite` has all blocks
SIZES = {"lite_medsam": (40, 72), "mobile_sam": (160, 288)}  # tokens: 10 x 18; windows overhang


def encoder_layout(layout: Layout) -> Layout:
    rows = tuple(row for row in layout.rows if row.ours.startswith("image_encoder/"))
    return layout._replace(rows=rows)


@functools.cache
def state_of(name: str):
    return tiny_vit_torch.random_state(name == "lite_medsam", DEPTHS)


@functools.cache
def tensors_of(name: str):
    return read(encoder_layout(LAYOUTS[name]), state_of(name))


def build(name: str, size, lora=None, dtype=jnp.float32, **options):
    """An encoder with the random state of a checkpoint; LoRA's B is random, too."""
    patch = 4 if name == "lite_medsam" else 16
    config = SamConfig.preset("tiny_vit", size, patch, depths=DEPTHS, **options).encoder
    model = nnx.eval_shape(lambda: config.make(lora, dtype=dtype, rngs=ShapeOnlyRngs()))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(3)
    for path, leaf in flat_paths(state).items():
        tensor = tensors_of(name).get(f"image_encoder/{path}")
        if tensor is None:
            tensor = 0.1 * rng.standard_normal(leaf.shape)
        assert tensor.shape == leaf.shape, path
        leaf.set_value(jnp.asarray(tensor, jnp.float32))
    return nnx.merge(graph, state)


def images_of(size, batch=2):
    return np.random.default_rng(1).random((batch, *size, 3), np.float32)


@nnx.jit
def run(model, images):
    return model.pyramid(images, (0, 1, 2, 3))


def error(found, expected) -> float:
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_transcription(name):
    """Embedding and all four taps, on a grid whose windows overhang on both sides; the fine maps
    are what the first tap is made of."""
    images, model = images_of(SIZES[name]), build(name, SIZES[name])
    found, taps, fine = run(model, images)
    expected, maps = tiny_vit_torch.encode(state_of(name), images.transpose(0, 3, 1, 2))
    for ours, theirs in zip((found, *taps), (expected, *maps), strict=True):
        assert error(np.moveaxis(np.asarray(ours), -1, 1), theirs) < TOLERANCE
    assert error(model.merges[1](fine[0]), np.asarray(taps[0])) < TOLERANCE
    second = model.merges[0](fine[1])
    for block in model.stages[1]:
        second = block(second)
    assert error(second, np.asarray(fine[0])) < TOLERANCE
    assert tuple(each.shape[-1] for each in fine) == model.config.fine_widths


@pytest.mark.parametrize("name", SIZES)
def test_conversion_is_exact_both_ways(name):
    """But for the counters of batch norms, which are dropped."""
    back = write(encoder_layout(LAYOUTS[name]), tensors_of(name))
    kept = {k: v for k, v in state_of(name).items() if not k.endswith("num_batches_tracked")}
    assert back.keys() == kept.keys()
    assert all(np.array_equal(back[name], kept[name]) for name in kept)


def test_lora_starts_as_the_base_and_changes_q_and_v():
    size = (28, 28)
    plain, adapted = build("lite_medsam", size), build("lite_medsam", size, LoraConfig(4))
    blocks = [block for stage in adapted.stages[1:] for block in stage]
    assert sum(hasattr(block.attn, "lora") for block in blocks) == len(blocks) == 4
    images = images_of(size, 1)
    assert error(run(adapted, images)[0], np.asarray(run(plain, images)[0])) > 1e-3
    for block in blocks:
        block.attn.lora.b.set_value(jnp.zeros_like(block.attn.lora.b[...]))
    assert np.array_equal(run(adapted, images)[0], run(plain, images)[0])
    attention = blocks[0].attn
    attention.lora.b.set_value(jnp.ones_like(attention.lora.b[...]))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 128)), jnp.float32)
    changed = attention.project(x) - plain.stages[1][0].attn.project(x)
    assert np.abs(changed[..., 1, :]).max() == 0
    assert np.abs(changed[..., [0, 2], :]).min(initial=1) > 0


@pytest.mark.parametrize("remat", ["blocks", pytest.param("dots", marks=pytest.mark.slow)])
def test_recomputing_changes_no_gradient(remat):
    size = (28, 28)

    @nnx.jit
    def gradient(model, images):
        def loss(model):
            return jnp.square(model(images)[0]).mean()

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    images = images_of(size, 1)
    one, other = (
        flat_paths(gradient(build("lite_medsam", size, LoraConfig(2), remat=kind), images))
        for kind in ("none", remat)
    )
    assert len(one) == 8
    for path in one:
        np.testing.assert_allclose(one[path][...], other[path][...], rtol=1e-4, atol=1e-7)


def test_bfloat16_is_close_and_its_softmax_is_float32():
    images = images_of((28, 28), 1)
    half = run(build("lite_medsam", (28, 28), dtype=jnp.bfloat16), images)[0]
    full = run(build("lite_medsam", (28, 28)), images)[0]
    assert half.dtype == jnp.bfloat16 and error(half.astype(jnp.float32), np.asarray(full)) < 0.05


def on_a_mesh(function, images):
    """function(graph, trained, rest, images), in parts on 2 x 2 devices and on one."""
    model = build("lite_medsam", (28, 28), LoraConfig(2))
    graph, *states = nnx.split(model, nnx.Param, ...)

    def run(*arguments):  # traced anew for each placement
        return jax.jit(lambda *given: function(graph, *given))(*arguments)

    mesh = device_mesh.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    with device_mesh.traced_on(mesh):
        places = device_mesh.state_shardings(states, mesh)
        stored = jax.device_put(states, places)
        assert any(not place.is_fully_replicated for place in jax.tree.leaves(places))
        parts = run(*stored, jax.device_put(images, device_mesh.batch_sharding(mesh)))
    return parts, run(*states, images)


def test_the_same_on_a_mesh():
    """Kernels and images in parts."""

    def embedding(graph, trained, rest, images):
        return nnx.merge(graph, trained, rest)(images)[0]

    found, expected = on_a_mesh(embedding, images_of((28, 28), 4))
    assert error(found, np.asarray(expected)) < TOLERANCE


@pytest.mark.slow
def test_the_same_gradients_on_a_mesh():
    """Of all parameters, LoRA's among them."""

    def gradients(graph, trained, rest, images):
        def loss(trained):
            return jnp.square(nnx.merge(graph, trained, rest)(images)[0]).mean()

        return jax.grad(loss)(trained)

    parts, whole = on_a_mesh(gradients, images_of((28, 28), 4))
    for (path, found), expected in zip(
        flat_paths(parts).items(), flat_paths(whole).values(), strict=True
    ):
        assert error(found[...], np.asarray(expected[...])) < 1e-4, path


def test_strips_of_a_map_give_the_whole(monkeypatch):
    """Values, and gradients of input and kernels; four strips, whose halos cross borders."""
    block = tiny_vit_conv.MBConv(3, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(block)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 5, 3)), jnp.float32)

    def run(rows):
        monkeypatch.setattr(tiny_vit_conv, "STRIP", rows * 2 * 5 * 8)
        assert tiny_vit_conv.strip_rows(12, 2 * 5 * 8) == rows

        def loss(kernels, x):
            out = nnx.merge(graph, kernels, rest)(x)
            return jnp.sin(out).sum(), out

        kernels, rest = nnx.split_state(state, nnx.Param, ...)
        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(kernels, x)
        return jax.tree.leaves((out, gradients))

    for whole, strips in zip(run(12), run(3), strict=True):
        np.testing.assert_allclose(strips, whole, rtol=1e-5, atol=1e-6)


def test_strided_depthwise_convolution():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 6, 8, 5)), rng.standard_normal((3, 3, 5))
    expected = np.zeros((2, 3, 4, 5))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        for j in range(4):
            part = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[:, i, j] = (part * kernel).sum((1, 2))
    found = layers.depthwise(jnp.asarray(x), jnp.asarray(kernel), stride=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "options"),
    [((3, 3), ()), ((3, 3), (1, 2)), ((3, 5), (2, 3)), ((3, 3), (1, 1, 1)), ((1, 7), ())],
)
def test_gradients_of_a_depthwise_convolution(size, options):
    """It is linear in x and in the kernel: the gradients are its adjoints."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x, kernel = draw(2, 9, 12, 3), draw(*size, 3)
    out, pullback = jax.vjp(lambda x, kernel: layers.depthwise(x, kernel, *options), x, kernel)
    slope, other_x, other_kernel = draw(*out.shape), draw(*x.shape), draw(*kernel.shape)
    by_x, by_kernel = pullback(slope)
    for gradient, other, changed in (
        (by_x, other_x, layers.depthwise(other_x, kernel, *options)),
        (by_kernel, other_kernel, layers.depthwise(x, other_kernel, *options)),
    ):
        np.testing.assert_allclose((gradient * other).sum(), (changed * slope).sum(), rtol=1e-4)


def test_settings_that_tiny_vit_has_not():
    with pytest.raises(UserError, match=r"patch_size is 8; TinyViT has 4 .* or 16"):
        SamConfig.preset("tiny_vit", 64, 8)
    with pytest.raises(UserError, match="not divisible by the patch size 4"):
        SamConfig.preset("tiny_vit", 66, 4)
    with pytest.raises(UserError, match="scan_blocks"):
        SamConfig.preset("tiny_vit", 64, 4, scan_blocks=True)
    with pytest.raises(UserError, match="'splash' is not for TinyViT"):
        SamConfig.preset("tiny_vit", 64, 4, attention="splash")
    assert tiny_vit.TinyVitConfig((16, 16), 4).describe_attention(jnp.float32).startswith("einsum")
