"""PGP-SAM whole: the forward pass against the equations, gradients, precision.

The expected logits are composed in float64 from `equations_numpy` and `decoder_numpy`; what the
image encoder gives is taken as it is, and in most tests drawn at random, to compile less.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.models.initializers import FastRngs
from pgpsam_jax.models.parameters import flat_paths, trainable
from pgpsam_jax.models.sam.lora import LoraConfig
from tests.reference import decoder_numpy
from tests.reference import equations_numpy as eq
from tests.support import jaxprs
from tests.support.small_pgpsam import TABLE_3, build, create, inputs_for, small

# Relative L2 errors, about three times what was measured on CPU.
FORWARD_TOLERANCE = 1e-5  # of logits
BFLOAT16_TOLERANCE = 0.05  # 0.01 with AVX2; 0.035 where the processor multiplies bfloat16 itself
GRADIENT_TOLERANCE = 5e-4  # per tensor: saturated softmaxes leave differences of large numbers


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

EVERY_PARAMETER = ("baseline", "cfm+ppg+ppr")  # have them all between them
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
    [r if r in EVERY_PARAMETER else pytest.param(r, marks=pytest.mark.slow) for r in TABLE_3],
)
def test_forward_pass_of_each_row_of_table_3(row):
    """On a grid that is not square; one of them with its encoder, whose outputs are as given."""
    config, encoder = row_of_table_3(row), row in WITH_ENCODER
    assert config.stage_taps == (1, 0)
    model, p = build(config, encoder)
    if encoder:
        features, outputs = encode(config), gradients(config, model, encoder)[1]
    else:
        features = inputs_for(config)
        outputs = compiled(config)(nnx.state(model), features)
    check_outputs(config, p, features, outputs)


def test_model_has_no_favorite_class():
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
    state = nnx.state(model)
    got = compiled(config)(eq.fill(state, moved), inputs_for(config))
    for key, expected in compiled(config)(state, inputs_for(config)).items():
        assert relative(got[key], expected[..., order]) < FORWARD_TOLERANCE


# Gradients.


@functools.cache
def created(config, encoder):
    return create(config, encoder, rngs=FastRngs(3))


def test_parameters_start_as_plain_float32():
    """A weakly typed one would turn strong in the first update and compile the step again."""
    for path, leaf in flat_paths(nnx.state(created(row_of_table_3("cfm+ppg+ppr"), False))).items():
        assert leaf[...].dtype == jnp.float32 and not leaf[...].weak_type, path


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


def test_every_trained_parameter_has_a_derivative():
    """As traced: what stops one leaves zeros that depend on nothing. Nothing is compiled."""
    config = row_of_table_3("cfm+ppg+ppr")
    graphdef, trained, rest = nnx.split(build(config)[0], trainable("lora"), ...)

    def slopes(trained, inputs):
        return jax.grad(lambda x: loss(nnx.merge(graphdef, x, rest)(inputs), labels))(trained)

    labels = labels_for(config)
    assert jaxprs.constants(slopes, trained, inputs_for(config)) == set()


@pytest.mark.parametrize("row", [pytest.param("baseline", marks=pytest.mark.slow), "cfm+ppg+ppr"])
def test_every_trained_parameter_matters_from_the_start(row):
    """At the real initialization, every one moved moves the logits, but for the key biases.

    Those add one number to every score of a softmax: nothing, up to rounding.
    """
    config, rng = row_of_table_3(row), np.random.default_rng(7)
    state = nnx.state(created(config, False))
    inputs, leaves = inputs_for(config), flat_paths(state)

    def change(name, move):
        """Of the logits, if one parameter is moved."""
        leaf = leaves[name]
        start = leaf[...]
        leaf.set_value(start + jnp.asarray(move, jnp.float32))
        moved = compiled(config)(state, inputs)
        leaf.set_value(start)
        return max(relative(moved[key], plain[key]) for key in plain)

    plain = compiled(config)(state, inputs)
    trained = {n: p.shape for n, p in leaves.items() if "gaussian" not in n}
    found = {n: change(n, rng.normal(size=shape)) for n, shape in trained.items()}
    keys = {n for n in found if n.endswith("k_proj/bias")}
    assert len(keys) == 4  # four attentions in a decoder of one block
    assert {n for n, size in found.items() if size < 1e-5} == keys
    for name in ["mask_decoder/mask_tokens"] + (["intra", "inter"] if config.ppg else []):
        for i in range(len(leaves[name][...])):  # every class; every prototype, chosen or not
            move = np.zeros(trained[name])
            move[i] = rng.normal(size=move[i].shape)
            assert change(name, move) > 1e-5, (name, i)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE_3)
def test_every_trained_parameter_receives_a_gradient(row):
    """At the real initialization, all but the decoder's key biases.

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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "config",
    [row_of_table_3("baseline"), pytest.param(ONE_STAGE, marks=pytest.mark.slow)],
    ids=["baseline", "one stage"],
)
def test_bfloat16_computes_close_to_the_equations_and_returns_float32(config):
    (model, p), features = build(config, dtype=jnp.bfloat16), inputs_for(config)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    half = compiled(config, jnp.bfloat16)(nnx.state(model), features)
    assert all(x.dtype == jnp.float32 for x in half.values())
    check_outputs(config, p, features, half, BFLOAT16_TOLERANCE)


@pytest.mark.slow
def test_bfloat16_encoder_is_close_to_the_float32_one():
    config = row_of_table_3(*WITH_ENCODER)
    exact, half = (jax.tree.leaves(encode(config, dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    for one, other in zip(exact, half, strict=True):
        assert relative(other, one) < BFLOAT16_TOLERANCE
