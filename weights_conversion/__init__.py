"""Conversion of SAM and PGP-SAM checkpoints to this project's layouts and back."""

import pgpsam_jax  # noqa: F401  a command begins there
