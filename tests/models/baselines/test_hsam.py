"""H-SAM: sizes, the forward pass against numpy, what trains, what is drawn, settings."""

import dataclasses
import functools
import itertools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.checkpointing import checkpoint
from pgpsam_jax.checkpointing.best_parameters import BestCheckpoint, restore_params
from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.data.augmentation.augment import AugmentConfig
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.models import losses
from pgpsam_jax.models.baselines import hsam, hsam_decoder
from pgpsam_jax.models.initializers import FastRngs
from pgpsam_jax.models.parameters import count, flat_paths
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.training.train_step import StepConfig
from tests.reference import decoder_numpy, hsam_numpy
from tests.reference import equations_numpy as eq
from tests.reference.release_numpy import resize
from tests.support import jaxprs
from tests.support.method_runs import loss_falls

CLASSES, BATCH, SIZE = 3, 2, (32, 64)  # a grid of 4 x 8
ENCODER = dict(width=32, depth=1, heads=2, global_blocks=(0,), out_channels=64, window_size=4)
# Registered, and read by nothing, here as in the original.
IDLE = r"mask_decoder/iou_head/|prompt_encoder/(point|not_a_point|mask_down)"


class Given(nnx.Module):
    """In the place of the image encoder: the images are its output already."""

    def __call__(self, images):
        return (images,)


def create(mask_gate, dtype=jnp.float32, depth=2, *, rngs):
    """A model at its own initialization, the blocks of its transformers being `depth`."""
    sam = SamConfig.preset("vit_t", SIZE, 8, **ENCODER)
    sam = dataclasses.replace(sam, decoder=dataclasses.replace(sam.decoder, depth=depth))
    model = hsam.Hsam(sam, CLASSES, mask_gate=mask_gate, dtype=dtype, rngs=rngs)
    model.image_encoder = Given()
    return model


@functools.cache
def random_model(mask_gate, dtype=jnp.float32, depth=2):
    """A model with every parameter random, and its arrays in float64.

    The authors' code has a mask attention with the released gate, too, which decides nothing.
    """
    model, p = eq.random_module(functools.partial(create, mask_gate, dtype, depth), 1)
    if mask_gate == "released":
        other = random_model("intended", dtype, depth)[1]
        p |= {path: array for path, array in other.items() if "mask_attention" in path}
    return model, p


@functools.cache
def features():
    return np.random.default_rng(5).normal(size=(BATCH, 4, 8, 64)).astype(np.float32)


@functools.cache
def keys():
    return jax.random.split(jax.random.key(7), BATCH)


@jax.jit
def outputs(model, features, keys=None):
    """Both outputs, what is predicted by them, and the class feature that a gate is made of.

    With keys, the outputs with draws, too: one program for all.
    """
    seen, enhance = [], hsam_decoder.SecondDecoder.enhance

    def seeing(self, source, class_feature):
        seen.append(class_feature)
        return enhance(self, source, class_feature)

    with mock.patch.object(hsam_decoder.SecondDecoder, "enhance", seeing):
        found = model(features)
    with mock.patch.object(hsam.Hsam, "__call__", lambda *_: found):  # traced already
        more = {"predict": model.predict(features), "class feature": seen[0]}
    return found | more | ({} if keys is None else {"drawn": model(features, keys)})


@functools.cache
def run(mask_gate, depth):
    """All of that, of the random model."""
    drawn = keys() if (mask_gate, depth) == ("released", 1) else None
    return outputs(random_model(mask_gate, depth=depth)[0], features(), drawn)


def transcribed(p, sample, over="channel", depth=2):
    """Both outputs of one sample by numpy, and the class feature."""
    pe = decoder_numpy.fourier_positions(p["prompt_encoder.pe_layer.gaussian_matrix"], (4, 8))
    feature, dense = features()[sample].astype(np.float64), p["prompt_encoder.no_mask_embed"]
    look = mock.patch.object(hsam_numpy, "where_to_look", wraps=hsam_numpy.where_to_look)
    with look as looked:
        both = hsam_numpy.forward(feature, dense, pe, p, depth=depth, heads=8, over=over)
    class_feature = looked.call_args.args[0].T.reshape(4, 8, -1)
    return dict(zip(("bootstrap", "final"), both, strict=True)), class_feature


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("mask_gate", ["released", "intended"])
def test_parameters_are_those_of_the_original(mask_gate):
    """ViT-b, 512 px, 9 classes: 19,051,259 of decoder 2, of them 12,742,011 idle as released.

    The idle ones are left out; the intended gate has its mask attention. C = 256, L = 32 x 32 =
    1024; an attention with inner width I has 3 (C I + I) + I C + C numbers.
    """
    config = default_config()
    method_recipes.apply_recipe(config, "hsam")
    config.model.mask_gate = mask_gate
    _, params, _ = build.abstract_model(config.model, 9)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat_paths(params).items()}

    def part(pattern):
        return sum(size for path, size in sizes.items() if re.search(pattern, path))

    def dense(*widths):
        return sum(a * b + b for a, b in itertools.pairwise(widths))

    def attention(width, inner):
        return 3 * dense(width, inner) + dense(inner, width)

    block = 3 * attention(256, 256) + dense(256, 2048, 256) + 4 * 2 * 256
    upscaling = 4 * 256 * 64 + 64 + 2 * 64 + 4 * 64 * 32 + 32
    expected = {
        "second/transformer/layers": 2 * block,
        "second/transformer/(final|norm)": attention(256, 128) + 2 * 256,
        "second/mask_tokens": 9 * 256,
        "second/upscaling": upscaling,
        "second/skip": 4 * 64 * 32 + 32 + 2 * 32 + 4 * 32 * 16 + 16 + 2 * 16,
        "second/hyper_mlps": 9 * dense(256, 256, 256, 256, 256, 16),
    }
    gate = {
        "second/mask_attention/attention": 2 * attention(1024, 1024),
        "second/mask_attention/norm": 2 * 2 * 1024,
        "second/mask_attention/mlp": dense(1024, 2048, 1024),
        "second/mask_attention/merge": dense(9, 1),
    }
    never = {"norms": 2 * 2 * 2 * (196 + 9 + 1024), "iou_head": dense(256, 256, 256, 9)}
    idle = sum((gate | never).values())
    assert (idle, sum(expected.values()) + idle) == (12_742_011, 19_051_259)
    if mask_gate == "intended":
        expected |= gate
    assert {name: part(name) for name in expected} == expected
    assert part("^second/") == sum(expected.values())
    # SAMed's trunk with rank 5, and all.
    assert part("lora") == 12 * 2 * 5 * (768 + 768)
    assert count(params) == 184_320 + 4_759_945 + 6_220 + part("^second/")


@pytest.mark.parametrize(
    ("mask_gate", "over", "depth"),
    [
        ("released", "channel", 1),
        pytest.param("intended", "space", 1, marks=pytest.mark.slow),
        pytest.param("intended", "space", 2, marks=pytest.mark.slow),
        pytest.param("released", "channel", 2, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_the_transcription(mask_gate, over, depth):
    """On a grid that is not square; the released softmax over one channel is written out there."""
    found, p = run(mask_gate, depth), random_model(mask_gate, depth=depth)[1]
    assert found["bootstrap"].shape == (BATCH, 16, 32, CLASSES)
    assert found["final"].shape == (BATCH, 64, 128, CLASSES)
    for b in range(BATCH):
        wanted, class_feature = transcribed(p, b, over, depth)
        assert relative(found["class feature"][b], class_feature) < 2e-6
        for name, value in wanted.items():
            assert relative(found[name][b], value) < 2e-6, name  # measured 3.3e-7
        resized = [resize(np.moveaxis(value, -1, 0), *SIZE) for value in wanted.values()]
        mean = np.moveaxis(sum(resized) / 2, 0, -1)
        assert relative(found["predict"][b], mean) < 1e-5


def test_the_intended_gate_is_that_of_the_transcription():
    """Of one map per class, in place of what the first decoder makes, which the other test has."""
    model, p = random_model("intended", depth=1)
    maps = np.random.default_rng(4).normal(size=(BATCH, 4, 8, CLASSES)).astype(np.float32)
    found = jax.jit(hsam_decoder.SecondDecoder.enhance)(model.second, features(), maps)
    weights = eq.sub(p, "second.mask_attention")
    for b in range(BATCH):
        look = hsam_numpy.where_to_look(maps[b].reshape(32, -1).T, weights, 8, "space")
        assert look.std() > 0.1 * look.mean()  # it does look somewhere
        wanted = features()[b] * (1 + look.reshape(4, 8, 1))
        assert relative(found[b], wanted) < 2e-6


@pytest.mark.slow
def test_the_gates_differ_in_the_second_decoder_only():
    released, intended = (run(gate, 2) for gate in ("released", "intended"))
    assert relative(intended["bootstrap"], released["bootstrap"]) < 1e-6
    assert relative(intended["final"], released["final"]) > 0.01


@pytest.mark.slow
def test_bfloat16_computes_close_to_the_transcription_and_returns_float32():
    model, p = random_model("intended", jnp.bfloat16, 1)
    half = jax.jit(lambda model, features: model(features))(model, features())
    for name, value in transcribed(p, 0, "space", 1)[0].items():
        assert half[name].dtype == np.float32
        assert relative(half[name][0], value) < 0.05, name  # measured 0.011


# Training.


def slopes(model, features, keys):
    """Gradient of the loss to the model's parameters."""
    labels = np.random.default_rng(6).integers(0, CLASSES, (BATCH, *SIZE))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def objective(params):
        outputs = nnx.merge(graphdef, params, rest)(features, keys)
        return losses.deep_supervision(outputs, labels, 0, StepConfig(AugmentConfig()))[0]

    return jax.grad(objective)(params)


def test_which_parameters_have_a_derivative():
    """As traced, with nothing compiled: as below."""
    model, _ = random_model("released", depth=1)
    none = jaxprs.constants(slopes, model, features(), keys())
    names = set(flat_paths(nnx.state(model, nnx.Param)))
    assert none == {name for name in names if re.search(IDLE, name)} < names


@pytest.mark.slow
@pytest.mark.parametrize("mask_gate", ["released", "intended"])
def test_which_parameters_receive_a_gradient(mask_gate):
    """All but the idle ones of SAM: those get exactly none.

    Biases of keys add one number to all scores of a softmax: zero, up to rounding.
    """
    gradient = jax.jit(slopes)(create(mask_gate, depth=1, rngs=FastRngs(3)), features(), keys())
    sizes = {n: float(np.linalg.norm(leaf[...])) for n, leaf in flat_paths(gradient).items()}
    keys_only = {n for n in sizes if n.endswith("k_proj/bias") and not re.search(IDLE, n)}
    none = {n for n, size in sizes.items() if size == 0}
    assert none - keys_only == {n for n in sizes if re.search(IDLE, n)}
    for name in keys_only:  # measured for one: 2e-11, where the kernel has 1.4e-9
        assert sizes[name] < 1e-4 * sizes[name.replace("bias", "kernel")] + 1e-9, name


def test_the_mask_attention_passes_gradients_on():
    """To all of it and to what it looks at; the intended gate has them, as a whole model shows."""
    attention = random_model("intended", depth=1)[0].second.mask_attention
    graphdef, state = nnx.split(attention)

    def loss(state, given):
        return (nnx.merge(graphdef, state)(given) ** 2).sum()

    given = np.random.default_rng(2).normal(size=(BATCH, 4, 8, CLASSES)).astype(np.float32)
    slopes, slope = jax.jit(jax.grad(loss, (0, 1)))(state, given)
    sizes = {name: np.linalg.norm(leaf[...]) for name, leaf in flat_paths(slopes).items()}
    assert np.linalg.norm(slope) > 0
    assert all(size > 0 for name, size in sizes.items() if not name.endswith("k_proj/bias"))


def test_draws_are_of_the_second_decoder_and_of_each_sample():
    """The first output is the one without draws; a sample's draws move with its key."""
    model, p = random_model("released", depth=1)
    drawn = run("released", 1)["drawn"]
    swapped = outputs(model, features()[::-1], keys()[::-1])["drawn"]
    for b in range(BATCH):
        undrawn, _ = transcribed(p, b, depth=1)
        assert relative(drawn["bootstrap"][b], undrawn["bootstrap"]) < 2e-6
        assert relative(drawn["final"][b], undrawn["final"]) > 0.05
    np.testing.assert_allclose(swapped["final"][::-1], drawn["final"], rtol=1e-4, atol=1e-4)


def test_the_derivative_of_the_noise_is_that_of_its_feature():
    """Its range counts as a number: the derivative of a maximum was 0 / 0 if recomputed."""
    feature = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    weights, keys = jnp.cos(feature), jax.random.split(jax.random.key(1), 2)
    slope = jax.grad(lambda x: jnp.sum(weights * hsam_decoder.add_noise(x, keys)))(feature)
    np.testing.assert_array_equal(slope, weights)


def test_noise_has_a_fifth_of_the_range_and_dropout_keeps_the_mean():
    many = jax.random.split(jax.random.key(1), 4)
    feature = jnp.asarray(np.random.default_rng(2).uniform(-1, 3, (4, 32, 32, 64)), jnp.float32)
    noise = np.asarray(hsam_decoder.add_noise(feature, many) - feature)
    assert noise.std() == pytest.approx(0.2 * 4, rel=0.01)
    assert (
        abs(noise.mean()) < 0.01
        and abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02
    )
    dropped = np.asarray(hsam_decoder.drop_out(jnp.ones((4, 256, 256)), many, 1))
    assert set(np.unique(dropped)) == {0.0, 1.25}
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.005)
    assert (dropped != hsam_decoder.drop_out(jnp.ones((4, 256, 256)), many, 2)).any()


@pytest.mark.slow
def test_the_loss_falls():
    """Far below the best answer that does not look at the image: Dice loss 0.53, loss 0.55.

    After 20 steps it still stands there, with less noise, a lower rate or the encoder trained, too;
    between 20 and 40 the first decoder leaves, then the second.
    """
    values = loss_falls("hsam", steps=60, model__encoder="vit_t")
    assert values[-1] < 0.4 * values[0], values  # measured 0.24


def test_settings_that_make_no_hsam():
    config = default_config()
    method_recipes.apply_recipe(config, "hsam")
    config.model.mask_gate = "none"
    with pytest.raises(UserError, match=r"model\.mask_gate is 'none'; choose released or intended"):
        build.abstract_model(config.model, 9)
    config.model.mask_gate, config.model.image_size = "intended", 80
    with pytest.raises(UserError, match="maps of 5 x 5 tokens in 8 heads"):
        build.abstract_model(config.model, 9)


def test_a_checkpoint_with_other_parameters_is_refused(tmp_path):
    """As one from before the idle parameters were left out."""
    stored, ours = (
        nnx.state(random_model(gate, depth=1)[0], nnx.Param) for gate in ("intended", "released")
    )
    with BestCheckpoint(tmp_path) as best:
        best.save(stored, 1, 0.5)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = checkpoint.abstract_like(ours, jax.tree.map(lambda _: device, ours))
    said = (
        "best/0 is of another version of this model .second/mask_attention/attention1/k_proj/bias "
        "and 25 more .*; read it with the version that wrote it"
    )
    with pytest.raises(UserError, match=said):
        restore_params(tmp_path, abstract, best=True)
