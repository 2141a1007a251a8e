"""The report of a run or a grid: one HTML page and its figures (`python -m pgpsam_jax.report`)."""
