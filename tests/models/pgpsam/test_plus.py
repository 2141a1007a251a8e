"""Preset plus: parity with its equations in NumPy, what starts as preset paper, both encoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.initializers import FastRngs, ShapeOnlyRngs
from pgpsam_jax.models.parameters import flat_paths, trainable
from pgpsam_jax.models.pgpsam.model import PgpSamConfig
from pgpsam_jax.models.pgpsam.plus import ImageStem, PlusPgpSam
from pgpsam_jax.models.sam.sam import SamConfig
from tests.reference import decoder_numpy
from tests.reference import equations_numpy as eq
from tests.support import jaxprs
from tests.support.small_pgpsam import build, inputs_for, small

TOLERANCE = 1e-5  # relative L2 error of logits, about three times what was measured
CONFIG = small((32, 48))


def conv3x3(x, p):
    """Zero padding, (H, W, in) to (H, W, out)."""
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    shifts = ((dy, dx) for dy in range(3) for dx in range(3))
    parts = (padded[dy : dy + h, dx : dx + w] @ p["kernel"][dy, dx] for dy, dx in shifts)
    return sum(parts) + p["bias"]


def patches(x, p):
    """Non-overlapping patches to tokens."""
    size, (h, w, c) = len(p["kernel"]), x.shape
    x = x.reshape(h // size, size, w // size, size, c)
    return np.einsum("asbtc,stcd->abd", x, p["kernel"]) + p["bias"]


def image_stem(image, p):
    x = eq.gelu(eq.layer_norm(patches(image, eq.sub(p, "embed")), eq.sub(p, "norm1")))
    x = eq.gelu(eq.layer_norm(conv3x3(x, eq.sub(p, "conv")), eq.sub(p, "norm2")))
    return patches(x, eq.sub(p, "shrink")), x


def refinement(fine, p, up):
    x = np.concatenate([up, eq.linear(fine, eq.sub(p, "project_in"))], axis=-1)
    x = eq.gelu(eq.layer_norm(conv3x3(x, eq.sub(p, "conv")), eq.sub(p, "norm")))
    return up + eq.linear(x, eq.sub(p, "project_out"))


def encoded_for(config):
    """Neck and taps, drawn, and images."""
    images = np.random.default_rng(6).random((2, *config.sam.image_size, 3), np.float32)
    return *inputs_for(config), [images]


@functools.cache
def compiled():
    graphdef = nnx.graphdef(build(CONFIG, kind=PlusPgpSam)[0])
    return jax.jit(lambda state, encoded: nnx.merge(graphdef, state).segment(encoded))


def test_logits_equal_the_equations():
    model, p = build(CONFIG, kind=PlusPgpSam)
    encoded = encoded_for(CONFIG)
    outputs = compiled()(nnx.state(model), encoded)
    pe = decoder_numpy.fourier_positions(p["pe_layer.gaussian_matrix"], CONFIG.sam.encoder.grid)
    neck, taps, (images,) = jax.tree.map(lambda x: np.asarray(x, np.float64), encoded)
    sizes = CONFIG.sam.decoder
    for b in range(len(neck)):
        fine = image_stem(images[b], eq.sub(p, "stem"))
        refine = [
            functools.partial(refinement, x, eq.sub(p, f"refine.{i}")) for i, x in enumerate(fine)
        ]
        rest = pe, eq.sub(p, "mask_decoder"), sizes.depth, sizes.heads, refine
        passes = eq.pgp_sam(
            neck[b],
            [x[b] for x in taps],
            lambda *x, r=rest: decoder_numpy.decode(*x, *r),
            p,
            stages=2,
            k=CONFIG.k,
        )
        for key, expected in (("bootstrap", passes[0]), ("final", passes[-1])):
            error = np.linalg.norm(outputs[key][b] - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE


def test_without_the_refinements_it_is_preset_paper():
    model, _ = build(CONFIG, kind=PlusPgpSam)
    state = nnx.clone(nnx.state(model))
    for path, leaf in flat_paths(state).items():
        if "project_out" in path:
            leaf.set_value(jnp.zeros_like(leaf[...]))
    paper, _ = build(CONFIG)
    shared = flat_paths(nnx.state(paper))
    for path, leaf in flat_paths(state).items():
        if path in shared:
            shared[path].set_value(leaf[...])
    neck, taps, images = encoded_for(CONFIG)
    outputs = compiled()(state, (neck, taps, images))
    expected = paper((neck, taps))
    for key, logits in expected.items():
        np.testing.assert_allclose(outputs[key], logits, rtol=1e-5, atol=1e-5)


def test_every_trained_parameter_has_a_derivative():
    graphdef, trained, rest = nnx.split(build(CONFIG, kind=PlusPgpSam)[0], trainable("lora"), ...)

    def slopes(trained, encoded):
        def total(trained):
            outputs = nnx.merge(graphdef, trained, rest).segment(encoded)
            return sum(jnp.sum(jnp.square(x)) for x in outputs.values())

        return jax.grad(total)(trained)

    assert jaxprs.constants(slopes, trained, encoded_for(CONFIG)) == set()


def names(encoder: str, patch: int):
    sam = SamConfig.preset(encoder, 64, patch)
    shapes = nnx.eval_shape(lambda: PlusPgpSam(PgpSamConfig(sam, 3), rngs=ShapeOnlyRngs()))
    kernels = {n: p.shape for n, p in flat_paths(nnx.state(shapes, nnx.Param)).items()}
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    outputs = nnx.eval_shape(lambda model, x: model(x), shapes, images)
    return kernels, {name: logits.shape for name, logits in outputs.items()}


def test_tiny_vit_gives_its_own_maps_and_other_encoders_get_a_stem():
    with_maps, outputs = names("tiny_vit", 4)
    assert set(outputs.values()) == {(2, 64, 64, 3)}
    assert not any(name.startswith("stem") for name in with_maps)
    assert with_maps["refine/0/project_in/kernel"] == (128, 64)
    assert with_maps["refine/1/project_in/kernel"] == (64, 32)
    stemmed, outputs = names("vit_b", 16)
    assert set(outputs.values()) == {(2, 16, 16, 3)}
    assert stemmed["stem/embed/kernel"] == (4, 4, 3, 32)
    assert stemmed["refine/0/project_in/kernel"] == (64, 64)


def test_it_starts_near_sam_where_there_is_one():
    plain = PlusPgpSam(CONFIG, rngs=FastRngs(0))
    scaled = PlusPgpSam(small((32, 48), start_scale=0.1), rngs=FastRngs(0))
    for one, other in zip(plain.refine, scaled.refine, strict=True):
        kernel = one.project_out.kernel[...]
        np.testing.assert_allclose(other.project_out.kernel[...], 0.1 * kernel, rtol=1e-6)


def test_a_patch_size_that_cannot_be_upscaled_is_refused():
    with pytest.raises(UserError, match="patch_size is 6, but preset plus needs a multiple of 4"):
        ImageStem(6, (8, 4), dtype=jnp.float32, rngs=ShapeOnlyRngs())
