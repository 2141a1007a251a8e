"""The switch `deterministic`: a run that gives the same bits when it is done again.

On CPU and TPU it does so without the switch, on the same machine with the same versions: the
compiler divides and orders every sum by the program alone, and all that is drawn comes from
seeds. On a GPU it takes `--xla_gpu_deterministic_ops=true`: sums without atomic additions
(scatters, cuDNN's backward attention, split products), compilation that fails where an operation
has no such form, and kernels chosen by rule instead of by timing them, which comes out differently
from start to start.
"""

import os
import re

import jax

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import jax_internals

FLAG = "--xla_gpu_deterministic_ops"


def demand(deterministic: bool, seeded: bool = True) -> None:
    """Have all that this process compiles be deterministic, where the configuration wants it.

    Call it before anything is computed: XLA reads its flags once. Raises a `UserError` where it is
    too late, or where other settings contradict.
    """
    if not deterministic:
        return
    if not seeded:
        raise UserError(
            "deterministic is on, but augment.seeded=False draws the augmentation from the "
            "operating system; switch one of them off"
        )
    if _cpu_alone():  # where the flag would only have everything compiled anew
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
    """Whether JAX is kept from accelerators (`JAX_PLATFORMS`)."""
    return jax.config.jax_platforms == "cpu"
