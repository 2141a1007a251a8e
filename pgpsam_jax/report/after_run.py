"""The report that a command writes when its run ends."""

import os
import subprocess
import sys

_SECONDS = 1800  # until a report is given up


def report_after_run(workdir, data: str, base: str) -> str:
    """Writes the report in a process of its own, on the CPU; a failure never fails the run.

    The run may hold the accelerators and most of their memory, and its processes may have ended.

    Args:
      workdir: of the run.
      data: root of its data set; empty for the stored one.
      base: stem of its converted SAM weights; empty for the stored ones.

    Returns:
      A line for the user: where the report is, or why there is none.
    """
    command = [sys.executable, "-m", "pgpsam_jax.report", str(workdir)]
    for flag, place in (("--data", data), ("--base", base)):
        command += [flag, place] if place else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, errors="replace", timeout=_SECONDS
        )
        reason = "" if done.returncode == 0 else (done.stderr.strip() or "it was killed")
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    if not reason:
        return f"report      {done.stdout.splitlines()[-1]}"
    reason = reason.splitlines()[-1].removeprefix("error: ")
    return f"no report ({reason}); write it with pgpsam report {workdir}"
