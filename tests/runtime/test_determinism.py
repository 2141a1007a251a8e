"""The same run twice: bits of fresh processes, batches on any number of devices, and the switch."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.config.augmentation import RELEASE
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import determinism, jax_internals
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import train_state, train_step
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.optimizer import make_optimizer
from tests.support import few_steps, tiny_method
from tests.support.places import QUICK_FLAGS, REPOSITORY

FLAG = "--xla_gpu_deterministic_ops"
DEADLINE = 500  # seconds for a process on a busy machine
TINY = ["name='tiny'"]
PRECISION = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # as here


def started(script, *arguments, **environment):
    """A process of a script with variables of its own; nothing compiled before serves it."""
    command = [sys.executable, *script, *arguments]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""} | environment
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def output_of(process):
    """What a process has printed when it ends, which it does within the test."""
    try:
        return process.communicate(timeout=DEADLINE)[0]
    finally:
        process.kill()


@pytest.mark.slow  # compiled twice, without a cache
@pytest.mark.parametrize(
    "settings",
    [TINY, ["preset='release'", "compute_dtype='bfloat16'", "stage_taps=(1,)"]],
    ids=["tiny", "release"],
)
def test_fresh_processes_compute_the_same_bits(settings):
    """Compiled anew each time; sets and dictionaries of strings in another order.

    The smallest is compared with this process, whose order of strings is another one, too; the
    other has one device and one stage, for which it compiles sooner.
    """
    script = [str(REPOSITORY / "tests" / "support" / "few_steps.py")]
    seeds = (1,) if settings == TINY else (1, 2)
    own = PRECISION if settings == TINY else PRECISION | {"XLA_FLAGS": QUICK_FLAGS}
    fresh = [started(script, *settings, PYTHONHASHSEED=str(seed), **own) for seed in seeds]
    said = [output_of(process).splitlines() for process in fresh]
    assert {process.returncode for process in fresh} == {0}
    if settings == TINY:
        with tiny_method.known():
            said.append(few_steps.main({"name": tiny_method.NAME}))
    assert said[0] == said[1] and len(said[0]) == 4
    assert len({line.split("'loss'")[-1] for line in said[0][1:]}) == 3  # it has trained


SLICES, SIZE, BATCH = 11, 32, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.random((SLICES, SIZE, SIZE)).astype(np.float16)
LABELS = RNG.integers(0, 9, (SLICES, SIZE, SIZE)).astype(np.uint8)
ALL = dataclasses.replace(
    RELEASE, elastic="spline", label_warp="nearest", noise_probability=0.5, seeded=True
)


def seen_on(devices, resident, monkeypatch):
    """What three real steps give the model on a mesh: images and labels, augmented."""

    def show(graphdef, params, frozen, images, labels, epoch, config, keys):
        return params, ({"images": images, "labels": labels}, nnx.State({}))

    monkeypatch.setattr(train_step, "gradients_of", show)
    mesh = device_mesh.make_mesh(data=devices, devices=jax.devices()[:devices])
    optimizer = make_optimizer(OptimConfig(), 10)
    state = train_state.init_state(
        nnx.State({"w": nnx.Param(jnp.ones(2))}), optimizer, seed=5, epoch_size=SLICES
    )
    run = jax.jit(train_step.make_train_step(None, optimizer, train_step.StepConfig(ALL)))
    loader = make_loader(SLICES, batch_size=BATCH, seed=3)
    data = {"image": IMAGES, "label": LABELS}
    feed, found = DeviceBatches(data, loader, mesh, np.inf if resident else 0), []
    state = jax.device_put(state, device_mesh.replicated(mesh))
    for _ in range(3):
        state, metrics = run(state, None, next(feed)[0])
        found.append((np.asarray(metrics["images"]), np.asarray(metrics["labels"])))
    return found


@pytest.mark.parametrize(
    ("devices", "resident"), [(8, True), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_batches_and_their_augmentation_do_not_depend_on_the_devices(
    devices, resident, monkeypatch
):
    expected = seen_on(1, True, monkeypatch)
    for ours, theirs in zip(seen_on(devices, resident, monkeypatch), expected, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])
        # Equal bits with AVX2; with AVX-512 a batch of one is rounded otherwise, to 3.2e-6.
        np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-5)
    labels = [labels for _, labels in expected]
    assert not np.array_equal(labels[0], labels[1])  # each step has a batch of its own


@pytest.fixture
def fresh(monkeypatch):
    """A process that has computed nothing and may have a GPU."""
    monkeypatch.setattr(jax_internals, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(determinism, "_cpu_alone", lambda: False)
    return monkeypatch


def flags():
    return os.environ["XLA_FLAGS"].split()


def test_the_switch_adds_the_flag_once_and_only_where_it_is_on(fresh):
    determinism.demand(False)
    assert flags() == ["--xla_cpu_enable_fast_math=false"]
    for _ in range(2):
        determinism.demand(True)
        assert flags() == ["--xla_cpu_enable_fast_math=false", f"{FLAG}=true"]


def test_a_run_on_cpu_alone_keeps_its_flags(fresh):
    """They are part of the key of what is compiled: all of it would be compiled again."""
    fresh.setattr(determinism, "_cpu_alone", lambda: True)
    determinism.demand(True)
    assert flags() == ["--xla_cpu_enable_fast_math=false"]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_too_late_is_an_error_where_it_matters(fresh, platform):
    fresh.setattr(jax_internals, "backends_are_initialized", lambda: True)
    fresh.setattr(jax, "default_backend", lambda: platform)
    if platform == "gpu":
        with pytest.raises(UserError, match=rf"used the GPU already.* XLA_FLAGS={FLAG}=true"):
            determinism.demand(True)
        fresh.setenv("XLA_FLAGS", FLAG)
    determinism.demand(True)


def test_settings_that_contradict_the_switch_are_refused(fresh):
    with pytest.raises(UserError, match=r"augment\.seeded=False draws"):
        determinism.demand(True, seeded=False)
    fresh.setenv("XLA_FLAGS", f"{FLAG}=false")
    with pytest.raises(UserError, match=f"XLA_FLAGS has {FLAG}=false; switch one of them off"):
        determinism.demand(True)


def test_xla_heeds_the_flag_that_the_switch_sets(tmp_path):
    """Set when JAX is imported but has not computed, in the options XLA says it compiles with."""
    code = (
        "import jax; from pgpsam_jax.runtime import determinism; determinism.demand(True); "
        "jax.config.update('jax_platforms', 'cpu')"
        "; jax.jit(lambda x: x + 1)(1.0)"
    )
    dump = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    process = started(["-c", code], XLA_FLAGS=dump, JAX_PLATFORMS="")
    output_of(process)
    assert process.returncode == 0
    options = [path.read_text() for path in tmp_path.glob("*debug_options*")]
    assert options and all("xla_gpu_deterministic_ops: true" in text for text in options)
