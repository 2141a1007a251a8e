"""PGP-SAM in JAX/Flax NNX: few-shot medical image segmentation on Segment Anything."""

__version__ = "0.1.0"
