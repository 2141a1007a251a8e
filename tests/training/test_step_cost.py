"""The record of cost: FLOPs and bytes by hand, the methods' own products, times over restarts."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from pgpsam_jax.config import default_config, method_recipes, use_small_encoder
from pgpsam_jax.inference.predictor import make_predict_step
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models.sam import attention_kernels
from pgpsam_jax.models.segmenter import Segmenter
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import step_cost
from pgpsam_jax.training.startup_summary import describe_step
from pgpsam_jax.training.train_state import init_state
from tests.support import micro

SIZE, BATCH, MIDDLE, CLASSES = 16, 8, 5, 2


class TwoProducts(Segmenter):
    """Three channels to MIDDLE by weights that train, then to CLASSES by weights that do not."""

    def __init__(self):
        self.first = nnx.Param(jnp.ones((3, MIDDLE)))
        self.second = nnx.Variable(jnp.ones((MIDDLE, CLASSES)))

    def __call__(self, images, keys=None):
        return {"final": images @ self.first[...] @ self.second[...]}


@dataclasses.dataclass(frozen=True)
class Stages:
    """A jitted training step with the shapes of its arguments, lowered and compiled for them."""

    graphdef: object
    mesh: object
    step: object
    shapes: tuple
    traced: object
    lowered: object
    compiled: object

    def record(self, config, lowered=None):
        stages = self.traced, lowered or self.lowered, self.compiled
        known = self.mesh, self.graphdef, self.step, self.shapes, *stages
        return step_cost.describe_step(config.model, *known, slices=BATCH)


@pytest.fixture(scope="module")
def config():
    config = default_config()
    config.model.image_size, config.train.batch_size = SIZE, BATCH
    return config


@pytest.fixture(scope="module")
def stages():
    """A step of plain gradient descent on eight devices, one image each."""
    graphdef, params, frozen = nnx.split(TwoProducts(), nnx.Param, ...)
    optimizer, mesh = optax.sgd(0.1), device_mesh.make_mesh(data=8)
    forward = make_predict_step(graphdef)

    def train_step(state, frozen, batch):
        images = batch["image"]
        slope = jax.grad(lambda params: forward(params, frozen, images).sum())(state.params)
        updates, _ = optimizer.update(slope, state.opt_state, state.params)
        return dataclasses.replace(state, params=optax.apply_updates(state.params, updates))

    state = init_state(params, optimizer, seed=0, epoch_size=BATCH)
    batch = {"image": jax.ShapeDtypeStruct((BATCH, SIZE, SIZE), jnp.float32)}
    whole = device_mesh.replicated(mesh)
    placed = {"in_shardings": (whole, whole, device_mesh.batch_sharding(mesh))}
    step = jax.jit(train_step, **placed, out_shardings=whole, donate_argnums=0)
    shapes = jax.eval_shape(lambda *arguments: arguments, state, frozen, batch)
    traced = step.trace(*shapes)
    lowered = traced.lower()
    return Stages(graphdef, mesh, step, shapes, traced, lowered, lowered.compile())


def test_a_step_by_hand(stages, config):
    found = stages.record(config)
    pixels = SIZE * SIZE
    forward = 2 * pixels * (3 * MIDDLE + MIDDLE * CLASSES)
    assert found["flops_per_image"]["forward"] == forward
    # The gradient of a sum: back through the second product, then that of the first weights; none
    # of the frozen ones, and the value is not asked for. The update is small.
    backward = 2 * pixels * (CLASSES * MIDDLE + 3 * MIDDLE)
    assert found["flops_per_image"]["training"] == pytest.approx(backward, rel=1e-3)
    assert found["parameters"] == {"trained": 3 * MIDDLE, "frozen": MIDDLE * CLASSES}
    assert found["devices"] == {"count": 8, "kind": "cpu", "platform": "cpu"}
    assert (found["image_size"], found["batch_size"]) == (SIZE, BATCH)
    state = 4 * (3 * MIDDLE + 3)  # weights, step, seed, epoch size
    parts = found["step_bytes"]
    # Of eight images a device holds one.
    assert parts["arguments"] == state + 4 * MIDDLE * CLASSES + 4 * pixels
    assert parts["aliased"] == state
    assert parts["outputs"] >= state and parts["temporaries"] >= 0
    assert json.loads(json.dumps(found)) == found


def counted(function, *arguments):
    traced = jax.jit(function).trace(*arguments)
    return step_cost.flops_of(traced, traced.lower())


def test_every_round_of_a_loop_counts():
    def rounds(x, inner, outer):
        def once(x, _):
            return jax.lax.scan(lambda x, _: (x @ weights, None), x, length=inner)[0], None

        return jax.lax.scan(once, x, length=outer)[0]

    x, weights = jnp.ones((8, 16)), jnp.ones((16, 16))
    for inner, outer in ((1, 1), (1, 5), (3, 1), (3, 5)):
        found = counted(lambda x, i=inner, o=outer: rounds(x, i, o), x)
        assert found == pytest.approx(inner * outer * 2 * 8 * 16 * 16, rel=0.01)


def test_attention_in_chunks_costs_what_it_costs_whole(monkeypatch):
    q, tables = jnp.ones((2, 3, 64, 16)), [jnp.ones((15, 16))] * 2

    def slopes(q):
        return jax.grad(lambda q: attention_kernels.lean(q, q, q, *tables, grid=(8, 8)).sum())(q)

    whole = counted(slopes, q)
    monkeypatch.setattr(attention_kernels, "CHUNK", 2 * 3 * 64 * 64)
    assert attention_kernels._chunks(q, q) == 4
    # Elementwise operations, a third of so small an example, count in one round only.
    assert 0.6 * whole < counted(lambda q: slopes(q), q) < 1.05 * whole


def test_devices_that_count_nothing(stages, config, monkeypatch):
    """Behind a plugin (CUDA, TPU) a lowered program has no count: it is lowered for the host."""
    known = stages.record(config)
    silent = type("Lowered", (), {"cost_analysis": lambda self: None})()
    found = stages.record(config, silent)
    training = [one["flops_per_image"].pop("training") for one in (found, known)]
    assert training[0] == pytest.approx(training[1], rel=1e-3)
    assert found == known

    def no_host(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(jax, "local_devices", no_host)
    found = stages.record(config, silent)
    assert found["flops_per_image"] == {"forward": None, "training": None}
    assert found["step_bytes"] == known["step_bytes"]


def test_devices_that_plan_no_memory(stages, config):
    unplanned = type("Compiled", (), {"memory_analysis": lambda self: None})()
    found = dataclasses.replace(stages, compiled=unplanned).record(config)
    assert found == stages.record(config) | {"step_bytes": None}
    assert describe_step(unplanned, 1.0, None) == "step       compiled in 1.0 s"


@pytest.mark.parametrize(
    ("name", "kind"), [("fssp", "fit"), ("sam", "none"), ("samed", "training")]
)
def test_what_a_step_is_of_a_method(name, kind):
    """What is known without a step: parameters and the forward pass, an oracle's too."""
    config = default_config()
    method_recipes.apply_recipe(config, name)
    config.model.update(encoder=micro.NAME, image_size=64, patch_size=8, stage_taps=(0,))
    graphdef, *states = build.abstract_model(config.model, CLASSES + 1)
    found = step_cost.describe_inference(
        config.model, device_mesh.make_mesh(data=8), graphdef, *states
    )
    assert found["kind"] == kind
    assert (found["parameters"]["trained"] == 0) == (kind == "none")
    assert found["flops_per_image"]["forward"] > 1e6
    assert (found["batch_size"], found["step_bytes"]) == (None, None)
    assert json.loads(json.dumps(found)) == found


def products(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, two for a multiply-add."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        elif equation.primitive.name == "conv_general_dilated":
            kernel, places = shapes[1], equation.params["dimension_numbers"].rhs_spec
            depth = math.prod(kernel) // kernel[places[0]]
            share = pixels_inside(shapes[0], kernel, equation)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth * share
        inner = sum(map(products, jaxprs_in_params(equation.params)))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def pixels_inside(image, kernel, equation) -> float:
    """Share of a convolution's products with a pixel of the image, not of its padding.

    Of a U-Net at 64 px, whose smallest maps have 4 x 4 pixels, it is 0.92.
    """
    given, share = equation.params, 1.0
    numbers, out = given["dimension_numbers"], equation.outvars[0].aval.shape
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for place, axis in enumerate(axes):
        size, taps, places = (shape[i] for shape, i in zip((image, kernel, out), axis, strict=True))
        steps = [given[name][place] for name in ("window_strides", "rhs_dilation", "lhs_dilation")]
        first, (stride, apart, spread) = -given["padding"][place][0], steps
        read = first + stride * np.arange(places)[:, None] + apart * np.arange(taps)
        inside = (read >= 0) & (read <= spread * (size - 1)) & (read % spread == 0)
        share *= inside.mean()
    return share


def looped_products(jaxpr) -> float:
    """Those of them that are in loops, of which XLA counts one round."""
    inside = 0.0
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "scan":
            inside += equation.params["length"] * sum(map(products, inner))
        else:
            inside += sum(map(looped_products, inner))
    return inside


# Loops, outputs of several sizes, and prompts from labels are among the quick ones.
QUICK = ("pgpsam", "hsam", "fssp", "sam")
FORWARD = [
    pytest.param(*key, marks=[pytest.mark.slow] * (key == registry.RELEASE or key[0] not in QUICK))
    for key in sorted(registry.METHODS)
]


@pytest.mark.parametrize(("name", "preset"), FORWARD)
def test_forward_passes_are_their_products_and_little_else(name, preset):
    """Against an own count; next to nothing is in loops, whose bodies XLA counts once."""
    config = default_config()
    use_small_encoder(config)
    if preset == "":
        method_recipes.apply_recipe(config, name)
    config.model.name, config.model.preset, config.model.image_size = name, preset, 64
    graphdef, *states = build.abstract_model(config.model, CLASSES + 1)
    given = [jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)]
    if registry.METHODS[name, preset].oracle:
        given.append(jax.ShapeDtypeStruct((1, 64, 64), jnp.uint8))
    traced = jax.jit(make_predict_step(graphdef)).trace(*states, *given)
    jaxpr = traced.jaxpr.jaxpr  # with masks of passes that nobody reads
    jaxpr, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    lowered, own, looped = traced.lower(), products(jaxpr), looped_products(jaxpr)
    assert looped < 0.02 * own  # release at 64 px 1.5 %, ViT-b at 512 px 0.05 %
    # The most: 1.17 of H-SAM, which predicts at the size of the image; 1.02 to 1.04 with ViT-b at
    # 512 px, of FSSP-SAM and the oracle too, which search masks for points and boxes.
    assert own - looped < lowered.cost_analysis()["flops"] < 1.2 * own


def records(seconds, batch=BATCH):
    """Of `metrics.jsonl`: an interval of two steps each, with these seconds per step."""
    return [
        {"step": 2 * place, "loss": 1.0, "images_per_second": batch / value}
        for place, value in enumerate(seconds, start=1)
    ]


def test_step_time_by_hand():
    found = step_cost.summarize_steps(records([5.0, 1.0, 2.0, 4.0, 3.0]), BATCH)
    assert found["step_seconds"] == {"median": 3.0, "quartiles": [2.0, 4.0], "intervals": 5}
    later = step_cost.summarize_steps(
        records([5.0, 1.0, 2.0, 4.0, 3.0]), BATCH, first=4
    )  # the last three
    assert later["step_seconds"] == {"median": 3.0, "quartiles": [2.5, 3.5], "intervals": 3}
    stuck = [{"step": 12, "images_per_second": 0.0}]
    assert (
        step_cost.summarize_steps(records([2.0]) + stuck, BATCH)["step_seconds"]["intervals"] == 1
    )
    assert "step_seconds" not in step_cost.summarize_steps([], BATCH)


def test_peak_of_the_process():
    """Linux keeps the same mark in /proc; nothing here needs a gigabyte more in between."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc on this system")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    peaks = step_cost.summarize_steps([], BATCH)["peak_bytes"]
    assert peaks["process"] == pytest.approx(1024 * int(line.split()[1]), rel=0.1)
    assert peaks["device"] is None  # a CPU keeps no count


def test_record_over_restarts(stages, config, tmp_path):
    record = stages.record(config)
    step_cost.update_record(
        tmp_path, records([1.0])
    )  # a run from before there were records: none is made up
    assert not list(tmp_path.iterdir())
    step_cost.start_record(tmp_path, record, 0)
    assert step_cost.read_record(tmp_path) == record | {"timed_from": 0}
    step_cost.update_record(tmp_path, records([9.0, 9.0]))
    step_cost.start_record(tmp_path, record, 4)
    step_cost.update_record(tmp_path, records([9.0, 9.0, 1.0]))
    assert step_cost.read_record(tmp_path)["step_seconds"]["median"] == 9.0  # of both starts
    elsewhere = record | {"devices": record["devices"] | {"kind": "fast"}}
    step_cost.start_record(tmp_path, elsewhere, 4)
    assert "step_seconds" not in step_cost.read_record(tmp_path)
    step_cost.update_record(tmp_path, records([9.0, 9.0, 1.0]))
    assert (
        step_cost.read_record(tmp_path)["step_seconds"]["median"] == 1.0
    )  # of the new devices alone
    (tmp_path / step_cost.FILE).write_text("{")
    assert step_cost.read_record(tmp_path) == {}
    step_cost.start_record(tmp_path, record, 6)
    assert step_cost.read_record(tmp_path)["timed_from"] == 6
    assert [path.name for path in tmp_path.iterdir()] == [step_cost.FILE]
