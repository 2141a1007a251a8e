"""PGP-SAM in JAX/Flax NNX: few-shot medical image segmentation on Segment Anything."""

import sys

from pgpsam_jax.version import __version__

__all__ = ["SamPredictor", "__version__", "load_run"]

if sys.argv[:1] == ["-m"]:  # while Python resolves the module of `python -m`
    from pgpsam_jax.runtime.startup import begin

    begin()


def __getattr__(name: str):
    """Imports the Python API, and JAX with it, at first use; the package alone stays light."""
    if name == "load_run":
        from pgpsam_jax.inference.trained_run import load_run as found
    elif name == "SamPredictor":
        from pgpsam_jax.inference.sam_predictor import SamPredictor as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
