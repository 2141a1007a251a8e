"""Assigns GPUs or CPU cores to the workers of a grid."""

import contextlib
import os
import subprocess
from pathlib import Path

from pgpsam_jax.errors import UserError


def assign_devices(workers: int) -> list[tuple[dict, set | None]]:
    """Returns (environment, cores) per worker: a share of the GPUs, or else of the cores."""
    if workers == 1:
        return [({}, None)]
    if Path("/dev/accel0").exists():
        raise UserError("a TPU host runs one program at a time; leave --workers at 1")
    found = gpus()
    if found:
        share = len(found) // workers
        if share == 0:
            raise UserError(
                f"--workers {workers} on {len(found)} GPU(s): one cell needs one; use at most "
                f"--workers {len(found)}"
            )
        parts = [found[i * share : (i + 1) * share] for i in range(workers)]
        return [({"CUDA_VISIBLE_DEVICES": ",".join(part)}, None) for part in parts]
    if not hasattr(os, "sched_setaffinity"):
        return [({}, None)] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise UserError(f"--workers {workers} on {len(cores)} core(s); use at most one per core")
    return [({}, set(cores[i::workers])) for i in range(workers)]


def gpus() -> list[str]:
    """Returns the ids of the NVIDIA GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [part for part in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if part]
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        found = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
        return [str(i) for i in range(len(found))]
    return []
