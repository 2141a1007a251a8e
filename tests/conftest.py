"""Eight simulated CPU devices, exact float32 matmuls, one cache of compiled programs."""

# ruff: noqa: E402

import os

from places import QUICK_FLAGS

# Must be set before JAX starts a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
devices = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices} {QUICK_FLAGS}".strip()

import gc

import jax
import psutil
import pytest
from absl import flags

jax.config.update("jax_default_matmul_precision", "float32")
# grain reads absl flags in its workers; nothing parses them under pytest.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A worker that has grown large drops its compiled programs between files: it took 9 GB."""
    yield
    if psutil.Process().memory_info().rss > 2 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that several tests compile (the same small run) are compiled once a session.

    Workers and commands that tests start share them; no test writes to the user's own cache.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
