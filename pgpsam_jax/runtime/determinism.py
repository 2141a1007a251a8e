"""Bitwise reproducible runs (`deterministic`).

On CPU and TPU runs are reproducible anyway, on the same machine with the same versions: the program
alone determines the order of all sums, and all random numbers come from seeds. On a GPU
`--xla_gpu_deterministic_ops=true` is needed: sums without atomics (scatters, cuDNN's backward
attention, split-k matmuls), an error for operations without a deterministic form, and kernels
chosen by rule instead of by timing, which varies from start to start.
"""

import os
import re

import jax

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import jax_internals

FLAG = "--xla_gpu_deterministic_ops"


def demand(deterministic: bool, seeded: bool = True) -> None:
    """Makes all programs that this process compiles deterministic, if configured.

    Call it before anything is computed: XLA reads its flags once.

    Args:
        deterministic: the setting.
        seeded: whether the augmentation is seeded.

    Raises:
        UserError: it is too late, or other settings contradict.
    """
    if not deterministic:
        return
    if not seeded:
        raise UserError(
            "deterministic is on, but augment.seeded=False draws the augmentation from the "
            "operating system; switch one of them off"
        )
    if _cpu_alone():  # where the flag would only cause recompilation
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if given := re.findall(rf"{FLAG}(?:=(\S+)|(?=\s|$))", flags):
        if given[-1].lower() in ("false", "0"):
            raise UserError(
                f"deterministic is on, but XLA_FLAGS has {FLAG}={given[-1]}; switch one of them off"
            )
    elif not jax_internals.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=true".strip()
    elif jax.default_backend() == "gpu":
        raise UserError(
            "deterministic is on, but this process has used the GPU already, too late for XLA's "
            f"flags; start again with XLA_FLAGS={FLAG}=true"
        )


def _cpu_alone() -> bool:
    """Whether `JAX_PLATFORMS` excludes accelerators."""
    return jax.config.values["jax_platforms"] == "cpu"
