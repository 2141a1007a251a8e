"""Eight simulated CPU devices, exact float32 matmuls, one cache of compiled programs."""

# ruff: noqa: E402

import os

from tests.support.places import QUICK_FLAGS

# Must be set before JAX starts a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
devices = "--xla_force_host_platform_device_count=8"
# Where an operation was written is looked up for each one lowered: a seventh of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices} {QUICK_FLAGS}".strip()

import contextlib
import gc
import time

import hypothesis
import jax
import psutil
import pytest

from pgpsam_jax.runtime.compilation_cache import machine_kind

jax.config.update("jax_default_matmul_precision", "float32")
hypothesis.settings.register_profile("quick", max_examples=40)  # where a test names no number
hypothesis.settings.load_profile("quick")
# Tracing makes many short-lived objects: collecting them less often saves a twentieth of the time.
gc.set_threshold(50_000, 20, 20)

# Files that take longest, first: a worker that begins one last keeps all others waiting.
LONGEST = (
    "models/pgpsam_release/test_parity",
    "integration/test_two_processes",
    "training/test_train_step",
    "sharding/test_sharding",
    "experiments/test_grid",
    "models/pgpsam/test_model",
    "methods/test_start",
)
KEPT_BYTES, KEPT_SECONDS = 2 * 2**30, 14 * 86400  # of compiled programs


def pytest_collection_modifyitems(items):
    rank = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))


def pytest_collection_finish():
    """What was imported and collected stays to the end: it need not be looked through again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    """Compiled programs are kept with pytest's own cache: the next session finds them.

    JAX's key of a program covers all that decides what it computes, but for the processor.
    """
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider; nor do commands write to the user's own
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
        return
    folder = cache.mkdir("compiled") / machine_kind()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # of commands that tests start
    if not hasattr(config, "workerinput") and folder.is_dir():
        with contextlib.suppress(FileNotFoundError):  # another session tidies as well
            tidy(folder)


def tidy(folder):
    """Remove programs that are old, and the oldest of those that take too much space."""
    programs = [(path.stat(), path) for path in folder.iterdir()]
    room, oldest = KEPT_BYTES, time.time() - KEPT_SECONDS
    for status, path in sorted(programs, key=lambda pair: -pair[0].st_mtime):
        room -= status.st_size
        if room < 0 or status.st_mtime < oldest:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A worker that has grown large drops its compiled programs between files: it took 9 GB.

    Not earlier than need be (a worker is to stay below 4 GiB): others compile them again.
    """
    yield
    if psutil.Process().memory_info().rss > 2.75 * 2**30:
        jax.clear_caches()
        gc.collect()
