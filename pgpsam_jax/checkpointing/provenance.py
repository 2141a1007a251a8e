"""Provenance of a result: versions, git revision, source fingerprint, devices, input hashes."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from pgpsam_jax.utils import shipped
from pgpsam_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "nibabel")
_PACKAGE = Path(__file__).parents[1]
# Rooms that only display stored results; changes there change no result.
_READERS = ("report/", "results/", "visualization/", shipped.BUNDLE.name)


def provenance(**inputs: object) -> dict[str, Any]:
    """Returns the record of one run; `inputs` are the hashes of the files it read."""
    import jax  # starts the backends, which `code_version` does not need

    return {
        "pgpsam_jax": __version__,
        **code_version(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        **inputs,
    }


def code_version() -> dict[str, Any]:
    """Returns `git` (commit or None) and `code`, a hash of the sources that can change a result.

    The hash distinguishes versions without git and is not changed by commits that touch only
    tests, documents or figures.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        name = path.relative_to(_PACKAGE).as_posix()
        if not name.startswith(_READERS):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return {"git": _git_revision(), "code": digest.hexdigest()}


def _git_revision() -> str | None:
    """Commit of this package's checkout, with `+changes` if tracked files differ."""
    if shipped.BUNDLE.is_dir():  # installed, perhaps inside some other repository
        return None
    git = ["git", "-C", str(_PACKAGE)]
    try:
        run: dict[str, Any] = dict(capture_output=True, text=True, check=True, timeout=10)
        revision = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")
