"""Number of labeled slices: 1, 5, 10, 25 and 100 % of the valid ones, sampled at random.

pgpsam grid slices --workdir runs/slices

All rows take the same number of steps (on Synapse 3150, 300 epochs of 10 %): more slices mean more
labels, not more training.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target

PERCENT = (1, 5, 10, 25, 100)


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    if variant == SYNAPSE:
        setting["overrides"]["train.steps"] = 3150
    return Plan(
        title="Dice against the number of labeled slices",
        rows=tuple(
            Row(f"p{percent:03d}", f"{percent} %", {"fewshot.fraction": percent / 100}, percent)
            for percent in PERCENT
        ),
        reference="p010",
        axis="labeled slices (% of the valid ones)",
        **setting,
    )
