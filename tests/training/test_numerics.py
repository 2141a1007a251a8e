"""Float32 where bfloat16 would not do: the training step of each preset, traced and walked.

What has to be wide is what adds up many numbers or what a small error changes much: softmaxes,
log-sum-exps, norms with their means and variances, losses, the optimizer. An operation that takes
16-bit operands and is one of those is found in the traced step, forward and backward.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pgpsam_jax.config import default_config
from pgpsam_jax.methods import build
from pgpsam_jax.models.pgpsam.ppr import select_inter
from pgpsam_jax.models.sam.attention import attention
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import train_step as steps
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step
from tests.support import micro

SIZE, BATCH, CLASSES = 32, 2, 3
HALF = (jnp.bfloat16, jnp.float16)
# Parts of softmaxes, log-sum-exps and norms, and running sums and products.
WIDE = frozenset(
    "exp exp2 expm1 log log1p logistic tanh erf erfc sqrt rsqrt cbrt pow div "
    "reduce_prod cumsum cumprod cumlogsumexp reduce_precision".split()
)
# Let off are functions of one number at a time: their result is rounded to bfloat16 whatever it was
# computed in, and nothing was added up for it. GELU, whose exponential is its derivative (JAX 0.12
# traces it outside the function, as `exp_neg_sq`), and the sigmoid gates of CFM, which scale a
# feature as the authors' code does under mixed precision.
ACTIVATIONS, GATES = {"gelu", "exp_neg_sq"}, ("logistic", "pgpsam/cfm.py")


def equations(jaxpr):
    """The equations of a jaxpr and of all that is nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        closed = [*equation.params.values()]
        for value in jax.tree.leaves(closed, is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)):
            nested = getattr(value, "jaxpr", value)
            if isinstance(nested, core.Jaxpr):
                yield from equations(nested)


def is_half(values):
    return any(getattr(v.aval, "dtype", None) in HALF for v in values)


def narrow(jaxpr):
    """What is computed of 16-bit numbers that must be wide: primitive and lines of ours."""
    found = set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name not in WIDE or not is_half((*equation.invars, *equation.outvars)):
            continue
        frames = equation.source_info.traceback.frames
        lines = [f"{frame.file_name}:{frame.line_num}" for frame in frames]
        lines = [line for line in lines if "site-packages" not in line]
        activation = ACTIVATIONS & {frame.function_name.split(".")[-1] for frame in frames}
        if not activation and not (name == GATES[0] and lines and GATES[1] in lines[0]):
            found.add(f"{name} at {lines[:3]}")
    return sorted(found)


def configuration(preset):
    config = default_config()
    config.model.preset, config.model.compute_dtype = preset, "bfloat16"
    config.model.encoder, config.model.image_size, config.model.patch_size = micro.NAME, SIZE, 8
    config.model.stage_taps = (1,)  # every stage has the same parts
    config.train.batch_size = BATCH
    return config


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_softmaxes_norms_and_losses_are_float32(preset):
    """Of the forward pass and the loss: the backward pass has the types of the forward one, but
    where its rules are our own, those of attention, which are below."""
    config = configuration(preset)
    graphdef, params, frozen = build.abstract_model(config.model, CLASSES)
    step = TrainingPlan.from_config(config).step
    jaxpr = jax.make_jaxpr(lambda *arrays: steps.loss_of(graphdef, *arrays, 0, step))(
        params,
        frozen,
        jax.ShapeDtypeStruct((BATCH, SIZE, SIZE), jnp.float32),
        jax.ShapeDtypeStruct((BATCH, SIZE, SIZE), jnp.uint8),
    ).jaxpr
    assert narrow(jaxpr) == []
    seen = list(equations(jaxpr))
    half = [e.primitive.name for e in seen if is_half(e.invars)]
    assert half.count("dot_general") > 100 and "logistic" in half
    assert sum(e.primitive.name == "exp" for e in seen) > 10
    assert {v.aval.dtype for v in jaxpr.outvars} == {jnp.dtype("float32")}
    state = (
        params,
        frozen,
        jax.eval_shape(TrainingPlan.from_config(config).make_optimizer(4).init, params),
    )
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}  # parameters and moments


def traced_step(preset):
    config = configuration(preset)
    mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
    with device_mesh.traced_on(mesh):
        model = build.abstract_model(config.model, CLASSES)
    lanes = device_mesh.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, SIZE, SIZE), dtype, sharding=lanes)
        for name, dtype in (("image", np.float16), ("label", np.uint8))
    }
    step = shard_step(TrainingPlan.from_config(config), mesh, *model, batch, epoch_size=4, seed=0)
    return step.run.trace(step.state, step.frozen, step.batch), step.state


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_softmaxes_norms_and_losses_of_the_step_are_float32(preset):
    traced, state = traced_step(preset)
    assert narrow(traced.jaxpr.jaxpr) == []
    # There is something to be found: 16-bit products, and the pointwise functions that are let off.
    seen = list(equations(traced.jaxpr.jaxpr))
    half = [e.primitive.name for e in seen if is_half(e.invars)]
    assert half.count("dot_general") > 300 and "logistic" in half
    assert sum(e.primitive.name == "exp" for e in seen) > 20
    new, metrics = traced.out_info
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}  # parameters and moments


def test_what_the_walk_is_for_is_found():
    """A softmax, a norm and a log-sum-exp of 16-bit numbers, nested in other functions."""

    def step(x):
        def body(carry, row):
            return carry + jax.nn.softmax(row), jnp.linalg.norm(row)

        return jax.lax.scan(body, x[0], x), jax.checkpoint(jax.nn.logsumexp)(x), jax.nn.gelu(x)

    x = jnp.ones((2, 3), jnp.bfloat16)
    found = {line.split()[0] for line in narrow(jax.make_jaxpr(step)(x).jaxpr)}
    assert found == {"exp", "div", "sqrt", "log"}
    assert narrow(jax.make_jaxpr(step)(x.astype(jnp.float32)).jaxpr) == []
    assert narrow(jax.make_jaxpr(jax.grad(lambda x: jax.nn.gelu(x).sum()))(x).jaxpr) == []


@pytest.mark.parametrize("backend", ["naive", "folded", "lean", "splash"])
def test_every_attention_is_float32_inside(backend):
    side, channels = (16, 8) if backend == "splash" else (3, 4), 8
    q = jnp.ones((1, 2, side[0] * side[1], channels), jnp.bfloat16)
    tables = [jnp.ones((2 * n - 1, channels), jnp.bfloat16) for n in side]

    def value(*operands):
        return attention(backend, *operands, side).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(value, argnums=range(5)))(q, q, q, *tables).jaxpr
    assert narrow(jaxpr) == []
    assert {"exp", "exp2"} & {equation.primitive.name for equation in equations(jaxpr)}


def test_long_sums_of_bfloat16_do_not_stop_growing():
    """Gradients of biases are sums over all positions. XLA adds in float32 and rounds once."""
    ones = jnp.ones(12 * 1024, jnp.bfloat16)  # added in bfloat16, they would stop at 256
    assert float(jax.jit(lambda x: jax.lax.reduce_sum(x, axes=(0,)))(ones)) == ones.size


def test_prototypes_are_chosen_by_float32_cosines():
    """Cosines of 0.9964 and 0.9980 are one number in bfloat16; that of the longer vector wins."""
    inter = jnp.asarray([[[1, 0.085], [3, 0.19]]], jnp.bfloat16)
    intra = jnp.asarray([[[1, 0.0]]], jnp.bfloat16)
    assert select_inter(intra, inter, 1).tolist() == [[[1]]]
    assert select_inter(intra, inter[:, ::-1], 1).tolist() == [[[0]]]
