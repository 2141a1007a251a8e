"""PGP-SAM whole: the forward pass against the equations, switches, sizes, gradients, precision.

The expected logits are composed in float64 from `equations_numpy` and `decoder_numpy`; what the
image encoder gives is taken as it is, and in most tests drawn at random, to compile less.
"""

import functools
import math

import decoder_numpy
import equations_numpy as eq
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_pgpsam import build, create, inputs_for, small

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.initial import NoDraws
from pgpsam_jax.models.lora import LoraConfig
from pgpsam_jax.models.pgpsam import PgpSam, PgpSamConfig
from pgpsam_jax.models.sam import SamConfig
from pgpsam_jax.parameters import count, flat_paths, trainable

# Relative L2 errors, about three times what was measured on CPU.
FORWARD_TOLERANCE = 1e-5  # of logits
BFLOAT16_TOLERANCE = 0.05  # 0.01 with AVX2; 0.035 where the processor multiplies bfloat16 itself
GRADIENT_TOLERANCE = 5e-4  # per tensor: saturated softmaxes leave differences of large numbers
TABLE_3 = {
    "baseline": dict(cfm=False, ppg=False, ppr=False),
    "cfm": dict(cfm=True, ppg=False, ppr=False),
    "cfm+ppg": dict(cfm=True, ppg=True, ppr=False),
    "cfm+ppg+ppr": dict(cfm=True, ppg=True, ppr=True),
}


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def check_outputs(config, p, features, outputs, tolerance=FORWARD_TOLERANCE):
    """Both outputs against the composition of the equations, image by image."""
    grid, sizes = config.sam.encoder.grid, config.sam.decoder
    pe = decoder_numpy.fourier_positions(p["pe_layer.gaussian_matrix"], grid)
    weights = eq.sub(p, "mask_decoder")

    def decode(*prompt):
        return decoder_numpy.decode(*prompt, pe, weights, sizes.depth, sizes.heads)

    switches = {f"{name}_on": getattr(config, name) for name in ("cfm", "ppg", "ppr")}
    neck, *taps = (np.asarray(x, np.float64) for x in (features[0], *features[1]))
    for b in range(len(neck)):
        shape = dict(stages=len(config.stage_taps), k=config.k)
        passes = eq.pgp_sam(neck[b], [tap[b] for tap in taps], decode, p, **shape, **switches)
        assert len(passes) == 1 + (len(config.stage_taps) if config.ppr else 1)
        for key, expected in (("bootstrap", passes[0]), ("final", passes[-1])):
            assert expected.shape == (4 * grid[0], 4 * grid[1], config.num_classes)
            assert relative(outputs[key][b], expected) <= tolerance
        assert relative(passes[-1], passes[0]) > 0.01  # the stages do something


# The forward pass.

WITH_GRADIENTS = ("cfm", "cfm+ppg+ppr")  # which have all parameters between them
WITH_ENCODER = ("cfm",)
SIZE = (32, 48)
ONE_STAGE = small((32, 56), 2, stage_taps=(1,), alpha=2, k=1)
THREE_STAGES = small((40, 24), 5, stage_taps=(1, 0, 1), alpha=3, k=6, strip_kernel=3)


def row_of_table_3(row):
    return small(SIZE, **TABLE_3[row], lora=LoraConfig(rank=2))


@functools.cache
def compiled(config, dtype=jnp.float32):
    """Compiled (state, features) -> outputs."""
    graphdef = nnx.graphdef(build(config, dtype=dtype)[0])
    return jax.jit(lambda state, features: nnx.merge(graphdef, state)(features))


@functools.cache
def encode(config, dtype=jnp.float32):
    """(neck, taps) of the random model's encoder."""
    graphdef, state = nnx.split(build(config, True, dtype)[0].image_encoder)
    run = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images, config.stage_taps))
    return run(state, inputs_for(config, True))


@pytest.mark.slow
@pytest.mark.parametrize("config", [ONE_STAGE, THREE_STAGES], ids=["one stage", "three stages"])
def test_forward_pass_of_other_numbers_of_stages(config):
    (model, p), features = build(config), inputs_for(config)
    outputs = compiled(config)(nnx.state(model), features)
    check_outputs(config, p, features, outputs)


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=[pytest.mark.slow] * (r == "cfm+ppg")) for r in TABLE_3],
)
def test_forward_pass_of_each_row_of_table_3(row):
    """On a grid that is not square; one of them with its encoder, whose outputs are as given."""
    config, encoder = row_of_table_3(row), row in WITH_ENCODER
    assert config.stage_taps == (1, 0)
    model, p = build(config, encoder)
    features = encode(config) if encoder else inputs_for(config)
    if row in WITH_GRADIENTS:
        outputs = gradients(config, model, encoder)[1]
    else:
        outputs = compiled(config)(nnx.state(model), features)
    check_outputs(config, p, features, outputs)


def test_model_has_no_favourite_class():
    """Classes in another order, with every weight that counts classes, give the same masks."""
    config, order = row_of_table_3("cfm+ppg+ppr"), np.array([2, 0, 1])
    model, p = build(config)
    c, moved = config.sam.decoder.width, dict(p)
    tokens = (order[:, None] * (config.k + 1) + np.arange(config.k + 1)).reshape(-1)
    for name, value in p.items():
        if name == "intra" or name.startswith(("mask_decoder.mask_tokens", "mask_decoder.hyper")):
            moved[name] = value[order]
        elif name.endswith("class_conv.kernel"):
            moved[name] = value[order]
        elif name.endswith("class_attention.expand.kernel"):
            moved[name] = value[:, tokens]
        elif name.endswith(("fuse.kernel", "dense.join.kernel")):
            moved[name] = value[np.concatenate([np.arange(c), c + order])]
    graphdef, state = nnx.split(model)
    got = gradients(config, nnx.merge(graphdef, eq.fill(state, moved)))[1]
    for key, expected in gradients(config, model)[1].items():
        assert relative(got[key], expected[..., order]) < FORWARD_TOLERANCE


# Configuration.


@pytest.mark.parametrize("name, taps", [("vit_b", (11, 2)), ("vit_l", (23, 5)), ("vit_h", (31, 7))])
def test_stage_taps_default_to_the_last_and_first_global_block(name, taps):
    assert PgpSamConfig(SamConfig.preset(name, 512), 9).stage_taps == taps


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(ppg=False), "ppr"),
        (dict(stage_taps=(1, 2)), "stage_taps"),
        (dict(stage_taps=(-1,)), "stage_taps"),
        (dict(k=0), "k=0"),
        (dict(k=7, alpha=2), "k=7"),
        (dict(strip_kernel=4), "strip_kernel is 4; it must be odd"),
        (dict(classes=1), "num_classes is 1"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        small(**wrong)


def test_parameters_start_as_plain_float32():
    """A weakly typed one would turn strong in the first update and compile the step again."""
    for path, leaf in flat_paths(nnx.state(created(row_of_table_3("cfm+ppg+ppr"), False))).items():
        assert leaf[...].dtype == jnp.float32 and not leaf[...].weak_type, path


def names(**switches):
    """Dotted parameter names of a small model, without compiling anything."""
    shapes = nnx.eval_shape(lambda: PgpSam(small(**switches), rngs=NoDraws()))
    return set(flat_paths(nnx.state(shapes, nnx.Param)))


def test_switches_add_and_remove_exactly_their_own_parameters():
    rows = {name: names(**switches) for name, switches in TABLE_3.items()}
    gates = {n for n in rows["cfm"] if "/spatial/" in n or "/channel/" in n}
    assert len(gates) == 2 * 12 and rows["cfm"] - rows["baseline"] == gates
    assert not rows["baseline"] - rows["cfm"]
    ppg = {n for n in rows["cfm+ppg"] if n.startswith("ppg/")} | {"intra", "inter"}
    assert rows["cfm+ppg"] - rows["cfm"] == ppg and len(ppg) == 2 + 2 * 16
    assert rows["cfm"] - rows["cfm+ppg"] == {"default_dense"}
    ppr = {n for n in rows["cfm+ppg+ppr"] if n.startswith(("ppr/", "ppg/2/"))}
    assert rows["cfm+ppg+ppr"] - rows["cfm+ppg"] == ppr and len(ppr) == 2 * 17 + 16
    assert not rows["cfm+ppg"] - rows["cfm+ppg+ppr"]
    projections = {f"cfm/{s}/{n}" for s in (0, 1) for n in ("projection/kernel", "norm/scale")}
    assert all(projections <= row for row in rows.values())
    assert not any("iou" in n or "prompt_encoder" in n for row in rows.values() for n in row)


@pytest.mark.parametrize("stages", [1, 3])
def test_each_stage_has_its_own_modules_and_all_share_one_decoder(stages):
    taps = (1, 0, 1)[:stages]
    found, two = names(stage_taps=taps), names()
    per_stage = {n.split("/")[1] for n in found if n.startswith("cfm/")}
    assert per_stage == {str(s) for s in range(stages)}
    assert {n.split("/")[1] for n in found if n.startswith("ppr/")} == per_stage
    assert {n.split("/")[1] for n in found if n.startswith("ppg/")} == per_stage | {str(stages)}
    decoder = {n for n in found if n.startswith("mask_decoder/")}
    assert decoder == {n for n in two if n.startswith("mask_decoder/")} and decoder


created = functools.cache(create)


def part(state, prefix):
    """Scalars of a state below one path."""
    leaves = flat_paths(state).items()
    return sum(math.prod(leaf.shape) for name, leaf in leaves if name.startswith(prefix))


def test_parameter_counts_at_the_paper_size():
    """ViT-b, 512 px, 9 classes, against counts worked out by hand from the layer sizes."""
    config = PgpSamConfig(SamConfig.preset("vit_b", 512), 9)
    model = nnx.eval_shape(lambda: PgpSam(config, rngs=NoDraws()))
    trained, rest = nnx.state(model, trainable("lora"), ...)
    c, d, n, k, q, side = 256, 768, 9, 4, 72, 32

    def linear(a, b):
        return a * b + b

    cfm = d * c + 2 * c + 2 * (5 * c + c) + 2 * c  # projection, strips, norms
    cfm += linear(c, c // 2) + 2 * (c // 2) + linear(c // 2, c)
    ppr = linear(c, 1) + linear(n, 1) + 2 * linear(side * side, side) + n * (k + 1)
    ppr += linear(c + n, c) + 2 + 2 * 2 * c  # F^, alpha and beta, two LayerNorms
    mlp = linear(c, c // 2) + linear(c // 2, c)
    ppg = linear(c + n, c) + linear(c + q, c) + 2 * 2 * c + 2 * mlp  # with a LayerNorm each
    upscaling = (c * 64 * 4 + 64) + 2 * 64 + (64 * 32 * 4 + 32)
    hyper = n * (2 * linear(c, c) + linear(c, 32))
    expected = {
        "image_encoder/": 147_456,  # LoRA: 12 blocks x (q, v) x 2 x 768 x 4
        "cfm/": 2 * cfm,
        "ppr/": 2 * ppr,
        "ppg/": 3 * ppg,
        "intra": n * c,
        "inter": q * c,
        "mask_decoder/transformer/": 3_291_264,
        "mask_decoder/upscaling/": upscaling,
        "mask_decoder/hyper_mlps/": hyper,
        "mask_decoder/mask_tokens": n * c,
    }
    assert (cfm, ppr, ppg, hyper) == (266_880, 135_034, 285_184, 1_258_272)
    assert {name: part(trained, name) for name in expected} == expected
    assert count(trained) == sum(expected.values()) == 6_453_364
    assert part(rest, "image_encoder/") == 87_278_848  # SAM's encoder at 512 px
    assert part(rest, "pe_layer/") == count(rest) - 87_278_848 == 2 * 128
    assert all("lora" in name for name in flat_paths(trained) if name.startswith("image_encoder/"))


# Gradients.


def loss(outputs, labels):
    """Plain cross-entropy on both outputs, so that both send gradients."""
    chance = [jax.nn.log_softmax(outputs[key]) for key in ("bootstrap", "final")]
    return -sum(jnp.take_along_axis(x, labels[..., None], -1).mean() for x in chance)


def labels_for(config, batch=2):
    h, w = config.sam.encoder.grid
    return np.random.default_rng(6).integers(0, config.num_classes, (batch, 4 * h, 4 * w))


@functools.cache
def differentiate(config, encoder):
    """Compiled (trained, rest, inputs, labels) -> (gradients, outputs)."""
    graphdef = nnx.graphdef(build(config, encoder)[0])

    @jax.jit
    def run(trained, rest, inputs, labels):
        def objective(trained):
            outputs = nnx.merge(graphdef, trained, rest)(inputs)
            return loss(outputs, labels), outputs

        return jax.grad(objective, has_aux=True)(trained)

    return run


def gradients(config, model, encoder=False):
    """Gradient of the loss for each trained leaf, by path, and the outputs."""
    _, trained, rest = nnx.split(model, trainable("lora"), ...)
    run = differentiate(config, encoder)
    found, outputs = run(trained, rest, inputs_for(config, encoder), labels_for(config))
    return {n: np.asarray(g[...]) for n, g in flat_paths(found).items()}, outputs


@pytest.mark.parametrize(
    "row",
    [r if r in WITH_GRADIENTS else pytest.param(r, marks=pytest.mark.slow) for r in TABLE_3],
)
def test_every_trained_parameter_receives_a_gradient(row):
    """At the real initialisation, all but the decoder's key biases.

    Those add one number to every score of a softmax: their gradient is zero, up to rounding.
    """
    config, encoder = row_of_table_3(row), row in WITH_ENCODER
    found, _ = gradients(config, created(config, encoder), encoder)
    found = {n: g for n, g in found.items() if "image_encoder" not in n}
    sizes = {n: np.linalg.norm(g) for n, g in found.items()}
    share = {n: sizes[n] / sizes[n.replace("bias", "kernel")] for n in sizes if "proj/bias" in n}
    keys = {n for n in share if n.endswith("k_proj/bias")}
    assert len(share) == 4 * len(keys) == 16  # four attentions in a decoder of one block
    assert all((share[n] < 1e-4) == (n in keys) for n in share)
    assert {n for n in sizes if sizes[n] < 1e-7} <= keys
    tables = ["mask_decoder/mask_tokens"] + (["intra", "inter"] if config.ppg else [])
    for name in tables:  # every class, and every prototype whether chosen or not
        assert np.linalg.norm(found[name], axis=-1).min() > 1e-7, name


def test_lora_gradients_start_with_b_and_then_reach_both_factors():
    """B starts at zero, which stops the gradient of A: the other parameters that wait."""
    config = row_of_table_3(*WITH_ENCODER)
    found, _ = gradients(config, created(config, True), True)
    lora = {n: np.linalg.norm(g) for n, g in found.items() if "image_encoder" in n}
    names = {f"image_encoder/blocks/{i}/attn/lora/{factor}" for i in (0, 1) for factor in "ab"}
    assert set(lora) == names
    assert all((lora[n] == 0) == n.endswith("a") for n in names)
    found, _ = gradients(config, build(config, True)[0], True)
    assert all(np.linalg.norm(found[n]) > 1e-6 for n in names)


@pytest.mark.slow
def test_one_decoder_serves_all_passes_and_sums_their_gradients():
    config = row_of_table_3("cfm+ppg+ppr")
    model, _ = build(config)
    features, labels = inputs_for(config), labels_for(config)
    graphdef, decoder, rest = nnx.split(model, nnx.PathContains("mask_decoder"), ...)

    def objective(decoders):
        """The loss with a decoder of its own for each pass."""
        model = nnx.merge(graphdef, decoders[0], rest)
        copies = iter([nnx.merge(graphdef, own, rest).mask_decoder for own in decoders])
        decode = model.decode

        def next_decode(*prompt):
            model.mask_decoder = next(copies)
            return decode(*prompt)

        model.decode = next_decode
        value = loss(model(features), labels)
        assert next(copies, None) is None  # the bootstrap and two stages: three passes
        return value

    apart = jax.jit(jax.grad(objective))([decoder] * 3)
    for own in apart:
        assert sum(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(own)) > 1e-3
    total = flat_paths(jax.tree.map(lambda *x: sum(x), *apart))
    shared, _ = gradients(config, model)
    for name, expected in total.items():
        if not name.endswith("k_proj/bias"):  # zero up to rounding
            assert relative(shared[name], expected[...]) < GRADIENT_TOLERANCE, name


# Precision.


def test_bfloat16_computes_close_to_the_equations_and_returns_float32():
    config = ONE_STAGE
    (model, p), features = build(config, dtype=jnp.bfloat16), inputs_for(config)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    half = compiled(config, jnp.bfloat16)(nnx.state(model), features)
    assert all(x.dtype == jnp.float32 for x in half.values())
    check_outputs(config, p, features, half, BFLOAT16_TOLERANCE)


def test_bfloat16_encoder_is_close_to_the_float32_one():
    config = row_of_table_3(*WITH_ENCODER)
    exact, half = (jax.tree.leaves(encode(config, dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    for one, other in zip(exact, half, strict=True):
        assert relative(other, one) < BFLOAT16_TOLERANCE
