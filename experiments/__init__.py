"""Studies over many runs: experiment grids, tables, benchmarks, scaling studies."""

import pgpsam_jax  # noqa: F401  a command begins there
