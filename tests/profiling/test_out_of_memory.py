"""Out of memory: a sentence, numbers of the compiler, and settings that need less."""

import math
import re
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.config import default_config
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.methods import build
from pgpsam_jax.models.parameters import split_model
from pgpsam_jax.profiling import aot, out_of_memory
from pgpsam_jax.training import metric_logger, plan, train_loop
from tests.support import tiny_method
from tests.support.faults import NOISE, TINY, newest, prepare, run
from tests.support.small_run import config_for, write_data

MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9876543210 bytes.\n(a dump)"
GIB = 2**30


def fail(*_):
    raise jax.errors.JaxRuntimeError(MESSAGE)


def message_of(config, workdir, act=fail):
    with pytest.raises(UserError) as caught, out_of_memory.oom_to_user_error(config, workdir):
        act()
    return str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    parts=st.sampled_from([1, 2, 4]),
    sizes=st.sampled_from([(1, 1), (8, 1), (2, 4), (1, 8), (4, 1)]),
    remat=st.sampled_from(["none", "dots", "blocks"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_every_candidate_is_a_run_that_could_be_started(count, parts, sizes, remat, dtype):
    config, batch = default_config(), 8 * count * parts
    config.train.batch_size, config.train.microbatches = batch, parts
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = *sizes, 8 // math.prod(sizes)
    config.model.remat, config.model.compute_dtype = remat, dtype
    config.model.encoder = "vit_h"  # 16 heads
    lanes, changed = math.prod(sizes), []
    for remedy in out_of_memory.list_remedies(config):
        other = remedy.applied(config)
        plan.mesh_of(other.mesh, other.model, other.train.batch_size)
        assert other.train.batch_size % (other.train.microbatches * lanes) == 0
        assert other.train.microbatches >= parts and other.train.batch_size <= batch
        assert all(config[a][b] != v for (a, b), v in pairs(remedy)) or "mesh.data" in remedy[0]
        changed.append(remedy.settings)
    assert len(changed) == len({str(change) for change in changed})
    assert ({"model.remat": "blocks"} in changed) == (remat != "blocks")
    assert ({"model.compute_dtype": "bfloat16"} in changed) == (dtype == "float32")
    assert any("mesh.fsdp" in change for change in changed) == (sizes[0] > 1)


def pairs(remedy):
    return [(field.split("."), value) for field, value in remedy.settings.items()]


def sizes_by_flag(**sizes):
    """A measure that knows the bytes of a configuration by what differs in it."""

    def measure(config):
        key = "remat" if config.model.remat == "blocks" else ""
        key += "half" if config.model.compute_dtype == "bfloat16" else ""
        key += "parts" if config.train.microbatches > 1 else ""
        key += "batch" if config.train.batch_size < 12 else ""
        return int(sizes[key] * GIB)

    return measure


def one_device_config():
    config = default_config()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 8, 1
    config.train.batch_size = 8 * 12
    return config


def told(needs, limit, measure, config=None):
    config = config or default_config()
    remedies = [(r, r.applied(config)) for r in out_of_memory.list_remedies(config)]
    found = out_of_memory.measure_remedies(remedies, needs, limit, measure)
    return out_of_memory._listed("no memory", needs, limit, "Chip X", found)


@pytest.fixture
def single(monkeypatch):
    """One device, so that the paper's batch of 12 divides."""
    [device, *_] = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_what_needs_less_is_told_with_its_numbers(single):
    measure = sizes_by_flag(remat=4.2, half=5.5, parts=9.5, rematparts=3, remathalfparts=2, batch=8)
    text = told(9 * GIB, 7 * GIB, measure).splitlines()
    assert text[0] == (
        "no memory: a training step needs 9.00 GiB on each device, and Chip X offers 7.00 GiB; "
        "what would help:"
    )
    assert [re.sub(r" \(.*", "", line.strip()) for line in text[1:]] == [
        "--config.model.remat=blocks  ->  4.20 GiB, fits",
        "--config.model.compute_dtype=bfloat16  ->  5.50 GiB, fits",
        # parts of the batch need more here, and are left out; three fit, and the search ends
        "--config.model.remat=blocks --config.model.compute_dtype=bfloat16 "
        "--config.train.microbatches=12  ->  2.00 GiB, fits",
    ]


def test_the_search_ends_when_its_time_is_up(single, monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(out_of_memory.time, "monotonic", lambda: now.seconds)

    def measure(config):
        now.seconds += 100  # of 240: two are compiled, a third would not end in time
        return 5 * GIB

    text = told(9 * GIB, None, measure)
    assert text.count("5.00 GiB") == 2 and text.count("not compiled for lack of time") == 3
    assert "offers" not in text and "fits" not in text  # no limit is known
    assert now.seconds == 200


def test_a_step_that_should_fit_and_one_that_nothing_helps(single):
    text = told(5 * GIB, 7 * GIB, lambda config: 5 * GIB)
    assert "which should fit" in text and "XLA_CLIENT_MEM_FRACTION=0.95" in text
    assert text.endswith("no setting that needs less was found: use a device with more memory")


def test_numbers_are_those_of_the_compiler(tmp_path, single, capsys, monkeypatch):
    """A fake step runs out of memory; the CPU has no limit to tell of."""
    config = config_for(write_data(tmp_path / "data"), model__name="tiny", train__batch_size=32)
    for name in ("rotate", "scale", "elastic"):  # they compile for long
        config.augment[f"{name}_probability"] = 0.0
    sizes, compile_step = [], aot.compile_step

    def abstract_model(settings, classes):  # Flax's layers want random keys
        model = nnx.eval_shape(lambda: build.make_model(settings, classes, nnx.Rngs(0)))
        return split_model(model, settings.train_encoder)

    def compiled(*arguments):
        step = compile_step(*arguments)
        plan = step.memory_analysis()
        needed = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        needed += plan.output_size_in_bytes - plan.alias_size_in_bytes
        sizes.append(out_of_memory.format_bytes(needed))
        return step

    monkeypatch.setattr(build, "abstract_model", abstract_model)
    monkeypatch.setattr(aot, "compile_step", compiled)
    monkeypatch.setattr(out_of_memory, "list_remedies", lambda config: [HALF])
    with tiny_method.known():
        text = message_of(config, tmp_path / "run")
    assert len(set(sizes)) == 2
    assert text.splitlines() == [
        "a device ran out of memory (Out of memory while trying to allocate 9876543210 bytes): a "
        f"training step needs {sizes[0]} on each device; what would help:",
        f"  --config.train.batch_size=16  ->  {sizes[1]} (another recipe)",
    ]
    assert "looking for settings that fit, for 4 minutes at most" in capsys.readouterr().out


HALF = out_of_memory.Remedy({"train.batch_size": 16}, "another recipe")


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_is_out_of_memory_can_be_started_again(tmp_path, single, monkeypatch, again):
    """The device truly refuses, in a step of the loop; what was saved is gone on from."""
    root, workdir, steps = prepare(tmp_path / "data"), tmp_path / "run", train_loop.run_steps
    monkeypatch.setattr(
        metric_logger.MetricLogger, "_draw", lambda self: None
    )  # which takes its time
    whole = run(root, tmp_path / "whole", **NOISE) if again else None
    petabyte = jax.jit(lambda: jnp.zeros((2**48,))).lower().compile()

    def greedy(step, state, frozen, feed, done, *rest):
        def run_out(*arguments):
            return petabyte() if done == 4 else step(*arguments)

        return steps(run_out, state, frozen, feed, done, *rest)

    monkeypatch.setattr(train_loop, "run_steps", greedy)
    monkeypatch.setattr(out_of_memory, "list_remedies", lambda config: [HALF])
    monkeypatch.setattr(
        out_of_memory, "step_bytes", lambda config, classes, resident: GIB + resident
    )
    text = message_of(
        config_for(root, **TINY, **NOISE), workdir, lambda: run(root, workdir, **NOISE)
    )
    assert re.match(r"a device ran out of memory \(.*1125899906842624 bytes.*\): a training", text)
    assert newest(workdir) == 4
    monkeypatch.setattr(train_loop, "run_steps", steps)
    assert not again or run(root, workdir, **NOISE) == whole


def test_the_few_shot_set_on_the_device_counts(tmp_path):
    config = default_config()
    assert out_of_memory._resident_bytes(512, config.data.resident_gib, tmp_path) == 0
    (tmp_path / "fewshot.txt").write_text(LIST)
    assert (
        out_of_memory._resident_bytes(512, config.data.resident_gib, tmp_path) == 2 * 512 * 512 * 3
    )
    config.data.resident_gib = 0.0
    assert out_of_memory._resident_bytes(512, config.data.resident_gib, tmp_path) == 0


LIST = "case0001\t10\ncase0001\t11\n"


def test_arrays_of_the_run_are_gone_before_anything_is_compiled(tmp_path, monkeypatch):
    """Compiling for a GPU tries kernels out on it, and needs room for that."""
    alive = []

    def act():
        array = jnp.ones(1000)
        alive.append(weakref.ref(array))
        fail()

    def advice(*_):
        assert alive[0]() is None
        return "advice"

    monkeypatch.setattr(out_of_memory, "advice", advice)
    assert message_of(default_config(), tmp_path, act) == "advice"


def test_volumes_that_are_segmented_want_a_smaller_batch_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "all_gather", fail)
    text = message_of(
        default_config(), tmp_path, lambda: Predictor._collect(np.zeros(1), slice(0, 1), None)
    )
    assert text.endswith("; choose --config.eval.batch_size=4 or less, it is 8")


def test_other_errors_pass(tmp_path):
    for error in (jax.errors.JaxRuntimeError("INTERNAL: something"), ValueError("RESOURCE_")):
        with pytest.raises(type(error)) as caught:
            with out_of_memory.oom_to_user_error(default_config(), tmp_path):
                raise error
        assert caught.value is error


def test_what_the_compiler_of_a_tpu_says_is_read(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G."
        )

    monkeypatch.setattr(aot, "compile_step", refuse)
    config = default_config()
    assert out_of_memory.step_bytes(config, 9) == pytest.approx(21.95 * GIB)
    monkeypatch.setattr(aot, "compile_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        out_of_memory.step_bytes(config, 9)


def test_several_processes_compile_nothing(tmp_path, monkeypatch):
    """They would have to do it together, and the others wait for a step that never comes."""
    monkeypatch.setattr(multihost, "is_multiprocess", lambda: True)
    monkeypatch.setattr(aot, "compile_step", None)
    text = message_of(one_device_config(), tmp_path)
    assert "settings that need less, cheapest first:\n  --config.model.remat=blocks" in text


def test_limits():
    chip = types.SimpleNamespace(device_kind="TPU v5e", memory_stats=lambda: None)
    assert out_of_memory.memory_limit(chip) == 16e9
    chip.memory_stats = lambda: {"bytes_limit": 12345}
    assert out_of_memory.memory_limit(chip) == 12345
    assert out_of_memory.memory_limit(jax.devices("cpu")[0]) is None
