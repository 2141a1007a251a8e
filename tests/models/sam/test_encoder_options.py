"""How the encoder is computed changes no number: rematerialisation, scan over blocks, reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.config import defaults, serialization
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.sam.image_encoder import REMAT, EncoderConfig, ImageEncoder
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.sharding import context, device_mesh

TAPS = (3, 0, 1)
# Folded is the backend whose scores wait for the backward pass, unless remat says otherwise.
SIZES = dict(width=24, heads=3, window_size=4, out_channels=8, attention="folded")


def encoder(image_size=128, **options):
    """(graphdef, LoRA parameters, the rest) of vit_t's pattern, small, every parameter random."""
    sizes = SamConfig.preset("vit_t", image_size, **(SIZES | options)).encoder
    model = nnx.eval_shape(lambda: ImageEncoder(sizes, LoraConfig(2), rngs=ShapeOnlyRngs()))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(0.2 * rng.standard_normal(p.shape), p.dtype) for p in leaves]
    state = jax.tree.unflatten(tree, leaves)
    return graph, *nnx.split_state(state, nnx.LoRAParam, ...)


def loss_of(graph):
    """f(lora, rest, images) -> (loss, (embedding, taps)), every output in the loss."""

    def loss(lora, rest, images):
        embedding, taps = nnx.merge(graph, lora, rest)(images, TAPS)
        return sum(jnp.sin(x).mean() for x in (embedding, *taps)), (embedding, taps)

    return loss


def results(**options):
    """Loss, outputs, taps and the gradients to LoRA."""
    graph, *states = encoder(**options)
    images = jax.random.normal(jax.random.key(0), (2, 128, 128, 3))
    run = jax.jit(jax.value_and_grad(loss_of(graph), has_aux=True))
    return jax.tree.leaves(run(*states, images))


@pytest.fixture(scope="module")
def plain():
    return results()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(remat="attention"),
        dict(remat="dots"),
        dict(scan_blocks=True),
        dict(scan_blocks=True, remat="blocks"),
    ],
    ids=str,
)
def test_options_change_no_number(plain, options):
    """Outputs, taps and gradients to LoRA, to rounding: a loop and a recomputation fuse otherwise.

    Measured 6e-7 at most.
    """
    for got, wanted in zip(results(**options), plain, strict=True):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * scale)


def test_a_loop_over_blocks_changes_no_output():
    """Embedding and taps: a loop goes over groups of blocks."""

    def outputs(**options):
        graph, *states = encoder(**options)
        images = jax.random.normal(jax.random.key(0), (1, 128, 128, 3))
        return jax.tree.leaves(jax.jit(loss_of(graph))(*states, images))

    got = outputs(scan_blocks=True, remat="blocks")
    for one, wanted in zip(got, outputs(), strict=True):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(one, wanted, rtol=0, atol=2e-6 * scale)


def kept_bytes(remat: str) -> int:
    """What the forward pass hands to the backward pass, parameters aside."""
    graph, *states = encoder(remat=remat)
    images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)

    def residuals(lora, rest, images):
        return jax.vjp(lambda lora: loss_of(graph)(lora, rest, images)[0], lora)[1]

    kept = jax.eval_shape(residuals, *states, images)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_policies_keep_less_and_less():
    kept = [kept_bytes(name) for name in REMAT]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept


def test_scan_compiles_one_group_of_blocks():
    def products(**options):
        graph, *states = encoder(**options)
        images = jnp.zeros((1, 128, 128, 3))
        return jax.jit(loss_of(graph)).lower(*states, images).as_text().count("dot_general")

    loop, written_out = products(scan_blocks=True), products()
    blocks = written_out - 2 * loop  # patch embedding, neck and the like twice, blocks not at all
    assert -6 <= blocks <= 0, (loop, written_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(remat="some"), "model.remat 'some' unknown; choose one of none, attention, dots"),
        (dict(scan_blocks=True, global_blocks=(0, 3)), r"blocks that repeat, not 4 .* \(0, 3\)"),
        (dict(scan_blocks=True, depth=5), "blocks that repeat, not 5"),
        (dict(attention="flash"), "model.attention 'flash' unknown"),
    ],
)
def test_options_that_cannot_be(options, message):
    sizes = SIZES | dict(grid=(6, 6), patch_size=16, depth=4, global_blocks=(1, 3))
    with pytest.raises(UserError, match=message):
        EncoderConfig(**(sizes | options))


def test_backend_that_cannot_run_here_is_refused_before_anything_is_built():
    settings = defaults.default_config()
    settings.model.attention = "cudnn"
    with pytest.raises(UserError, match=r"'cudnn' needs an NVIDIA GPU .* here are cpu"):
        build.abstract_model(settings.model, 9)


@pytest.mark.parametrize(("stored", "name"), [(False, "none"), (True, "blocks")])
def test_stored_remat_of_before_it_had_names(stored, name):
    value = serialization.to_json(defaults.default_config())
    value["model"]["remat"] = stored
    assert serialization.from_json(value).model.remat == name


def test_report_of_what_was_picked():
    vit_b = SamConfig.preset("vit_b", 512).encoder
    folded = dataclasses.replace(vit_b, attention="folded")
    assert folded.describe_attention(jnp.float32) == (
        "folded for global 32x32, windows 14x14, windows 14x4, windows 4x14, windows 4x4"
    )
    with context.traced_for(context.TracingContext("tpu")):
        assert vit_b.describe_attention(jnp.bfloat16).startswith("splash for global 32x32; ")
    with context.traced_for(context.TracingContext("gpu", 8.0)):
        large = SamConfig.preset("vit_b", 1024).encoder
        assert "; cudnn for windows 14x14, " in large.describe_attention(jnp.bfloat16)


@pytest.mark.slow
def test_whole_encoder_on_a_mesh_equals_one_device():
    """A fused kernel between what the compiler partitions: 16x8 tokens, LoRA gradients."""
    sizes = dict(width=16, heads=2, depth=2, global_blocks=(1,), window_size=8, out_channels=8)
    graph, *states = encoder((128, 64), attention="splash", **sizes)
    images = jax.random.normal(jax.random.key(0), (4, 128, 64, 3))

    def gradients(lora, rest, images):
        def loss(lora):
            embedding, _ = nnx.merge(graph, lora, rest)(images)
            return jnp.sin(embedding).mean()

        return jax.value_and_grad(loss)(lora)

    wanted = jax.jit(gradients)(*states, images)
    mesh = device_mesh.make_mesh(data=2, fsdp=2, tensor=2)
    placed = [device_mesh.state_shardings(state, mesh) for state in states]
    split = jax.jit(
        device_mesh.traced_on(mesh)(gradients),
        in_shardings=(*placed, device_mesh.batch_sharding(mesh)),
    )
    got = split(*states, images)
    for pair in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        scale = float(jnp.abs(pair[1]).max())
        np.testing.assert_allclose(*pair, rtol=0, atol=2e-6 * scale)
