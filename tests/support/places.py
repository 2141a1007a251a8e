"""Where the repository and the shared reference material are, and how tests compile."""

from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
# Nearly all test time is compilation. Without LLVM's optimizations and the emitters of fusions it
# takes a third as long, and the numbers keep to the same tolerances. Code generation that is not
# split over threads, which the workers of the suite have no cores for, saves another fifth.
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # an unknown flag ends a process
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"


def shared(relative: str) -> Path:
    """Path of recorded reference material, or skip with the reason that it is absent.

    Who asks for it is of the tier `golden`.
    """
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference material not found: {path}")
    return path


def weights(name: str) -> str:
    """Name of weights that were fetched, or skip. Who asks for them is of the tier `golden`."""
    from pgpsam_jax.models.sam.weights import recorded_digest

    if recorded_digest(name) is None:
        pytest.skip(f"the weights are missing; run: pgpsam fetch {name}")
    return name


def gpu():
    """An NVIDIA GPU, or skip. Who asks for it is of the tier `gpu`."""
    import jax  # not before `conftest` has set its variables

    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("no NVIDIA GPU that JAX may use (JAX_PLATFORMS)")
