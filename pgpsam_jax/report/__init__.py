"""HTML report of a run or an experiment grid, with its figures (`python -m pgpsam_jax.report`)."""
