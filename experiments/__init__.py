"""Programs over many runs: grids of them, and the tables made from their results."""

import pgpsam_jax  # noqa: F401  a command begins there
