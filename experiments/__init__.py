"""Programs over many runs: grids of them, and the tables made from their results."""
