"""PGP-SAM in JAX/Flax NNX: few-shot medical image segmentation on Segment Anything."""

import importlib
import sys
from typing import TYPE_CHECKING

from pgpsam_jax.version import __version__

if TYPE_CHECKING:
    from pgpsam_jax.inference.sam_predictor import SamPredictor
    from pgpsam_jax.inference.trained_run import load_run

__all__ = ["SamPredictor", "__version__", "load_run"]

if sys.argv[:1] == ["-m"]:  # while Python resolves the module of `python -m`
    from pgpsam_jax.runtime.startup import begin

    begin()


def __getattr__(name: str):
    """Imports the Python API, and JAX with it, at first use; the package alone stays light."""
    modules = {"SamPredictor": "sam_predictor", "load_run": "trained_run"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pgpsam_jax.inference.{modules[name]}"), name)
