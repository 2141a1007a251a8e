"""A grid of two rows on small data, as a file: shared by the tests of plans and of the driver."""

from tests.support.faults import NOISE, TINY

SETTINGS = TINY | NOISE | {"log__checkpoint_steps": 15}
CONFIG = """
from pathlib import Path

from tests.support.small_run import config_for

def get_config():
    return config_for(Path({root!r}), **{settings!r})
"""
GRID = """
from experiments.grid.plan import Plan, Row

def get_grid(variant="two"):
    rows = [Row("whole", "whole", {{}}), Row("odd", "odd", {{"optim.final_learning_rate": {rate}}})]
    return Plan("Two rows", {config!r}, tuple(rows), {{"train.steps": {steps}}}, seeds={seeds})
"""


def write(folder, data, rate=1e-5, steps=4, seeds=(0,)) -> str:
    """The file, in a folder; `rate` is the second row's last learning rate."""
    config = folder / "small.py"
    config.write_text(CONFIG.format(root=str(data), settings=SETTINGS))
    path = folder / "two_rows.py"
    path.write_text(GRID.format(config=str(config), rate=rate, steps=steps, seeds=seeds))
    return str(path)
