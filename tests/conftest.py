"""Eight simulated CPU devices, exact float32 matmuls, and the shared reference material."""

import os

# Must be set before JAX starts a backend. Nearly all test time is compilation; without LLVM's
# optimisations it takes 60 % as long, and the numbers keep to the same tolerances.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
).strip()

import gc
from pathlib import Path

import jax
import psutil
import pytest
from absl import flags

jax.config.update("jax_default_matmul_precision", "float32")
# grain reads absl flags in its workers; nothing parses them under pytest.
flags.FLAGS.mark_as_parsed()

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def shared(relative: str) -> Path:
    """Path of recorded reference material, or skip with the reason that it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference material not found: {path}")
    return path


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A worker that has grown large drops its compiled programs between files: it took 9 GB."""
    yield
    if psutil.Process().memory_info().rss > 4 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that several tests compile (the same small run) are compiled once a session.

    Commands that a test starts take part; no test writes to the user's own cache.
    """
    folder = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
