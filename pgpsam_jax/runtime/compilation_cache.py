"""Persistent XLA compilation cache: restarting the same configuration compiles nothing.

JAX's cache key covers the program, the versions, the compiler flags and the device. For the CPU it
lacks the processor model and the number of cores that loops were divided over, so each kind of
machine gets its own folder.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import filelock
import jax

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import user_cache

MAX_BYTES = 5 * 10**9

# Small programs count too: a start has dozens, each far below JAX's own threshold.
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_X86_FIELDS = ("vendor_id", "cpu family", "model", "model name", "flags")  # of /proc/cpuinfo
_CPU_FIELDS = (*_X86_FIELDS, "CPU implementer", "CPU variant", "CPU part", "Features")  # ARM too


def keep_compiled() -> None:
    """Enables JAX's compilation cache in the user's cache folder; call before compiling anything.

    A folder set by the user (`JAX_COMPILATION_CACHE_DIR`, empty for none) is kept. If the default
    folder cannot be used, the process warns and continues without a cache.
    """
    for name, value in _KEEP_ALL.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = cache_folder()
        _prepare(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        warnings.warn(
            f"compiled programs are not kept ({error}); set JAX_COMPILATION_CACHE_DIR to a folder "
            "of yours, or leave it empty to disable the cache",
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def start() -> None:
    """Initializes JAX's backends; raises a `UserError` if the requested platform is missing."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA without a GPU
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.values["jax_platforms"]
        reason = (str(error) or "no such device is here").splitlines()[0]
        reason = reason.partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise UserError(
            f"JAX cannot start the platform {wanted!r} ({reason}); "
            "correct JAX_PLATFORMS, unset it to use what there is, or install JAX for that platform"
        ) from error


def cache_folder() -> Path:
    """Returns `compiled/<kind of machine>` in the user's cache."""
    return user_cache() / "compiled" / machine_kind()


def machine_kind() -> str:
    """Returns the architecture, available cores and a hash of the processor and its features."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        fields = [line for line in first.splitlines() if line.split("\t")[0] in _CPU_FIELDS]
    except OSError:
        fields = [platform.processor()]
    digest = hashlib.sha256("\n".join(fields).encode()).hexdigest()
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{platform.machine()}-{cores}-{digest[:12]}"


def _prepare(folder: Path) -> None:
    """Creates the folder, private because its content is executed, and removes torn files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise PermissionError(f"others can write to {folder}, whose content is executed")

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=0):  # the lock of JAX itself
            _remove_torn(folder)
    except filelock.Timeout:  # another process is removing them
        pass


def _remove_torn(folder: Path) -> None:
    """Removes programs whose writing was interrupted.

    JAX writes a program, then its access time. A program without one may be incomplete, is never
    replaced, and keeps JAX up to 0.11 from writing any other (JAX issue 39880).
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").is_file():
            program.unlink()
