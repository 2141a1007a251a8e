"""What only a GPU shows of a step: the same bits from a fresh start; bfloat16 that trains."""

import subprocess
import sys

import pytest

from tests.support.launcher import environment
from tests.support.method_runs import loss_falls
from tests.support.places import REPOSITORY, gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "settings",
    [[], ["preset='release'"], ["compute_dtype='bfloat16'"], ["name='samed'", "preset=''"]],
    ids=" ".join,
)
def test_fresh_processes_compute_the_same_bits(settings):
    gpu()
    command = [sys.executable, REPOSITORY / "tests" / "support" / "few_steps.py", *settings]
    own = environment(1) | {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PLATFORMS": "cuda"}
    own["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true"
    options = dict(env=own, check=True, stdout=subprocess.PIPE, text=True, timeout=500)
    first, again = (subprocess.run(command, **options).stdout for _ in range(2))
    assert first == again and len(first.splitlines()) == 4


@pytest.mark.parametrize("name", ["pgpsam", "samed", "hsam"])
def test_training_in_bfloat16_lowers_the_loss(name):
    gpu()
    losses = loss_falls(name, model__compute_dtype="bfloat16")
    assert losses[-1] < 0.9 * losses[0], losses
