"""Tables over runs and experiment grids: rows, statistics, the paper's values, text formats."""
