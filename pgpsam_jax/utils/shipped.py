"""Config files, grid files and the programs around the package, wherever it is installed.

In the repository `configs/`, `experiments/` and `weights_conversion/` are neighbors of the package;
an installed wheel carries them inside it.
"""

import difflib
import os
import sys
from pathlib import Path

from pgpsam_jax.utils.files import StrPath

_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLE = _PACKAGE / "_bundle"
ROOT = BUNDLE if BUNDLE.is_dir() else _PACKAGE.parent


def find(path: StrPath, folder: str = "") -> Path:
    """Returns the file that a user or a config names.

    Args:
        path: an existing file; else a path from the repository's root, such as
            `configs/labels/x.json`, or the bare name of a Python file in `folder`.
        folder: `configs` or `experiments/grids`.

    Returns:
        The existing file, or `path` itself where there is none.
    """
    path = Path(path)
    for place in (path, ROOT / path, ROOT / folder / f"{path}.py" if folder else path):
        if place.is_file():
            return place
    return path


def names(folder: str) -> list[str]:
    """Returns the names that `find` knows in a folder."""
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_"))


def hint(name: str, folder: str) -> str:
    """Returns "did you mean ..." for a misspelled name, or the names that exist."""
    known = names(folder)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"known names: {', '.join(known)}"


def make_importable() -> None:
    """Lets this process and its children import `experiments` and `weights_conversion`."""
    sys.path.insert(0, str(ROOT))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONSAFEPATH"] = "1"  # or a user's own folder `experiments` would come first
