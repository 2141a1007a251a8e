"""Tables over runs and grids: what their rows are, statistics, the paper's values, text formats."""
