"""How many labelled slices: 1, 5, 10, 25 and 100 % of the valid ones, drawn at random.

python -m experiments.run_grid --grid experiments/grids/slices.py --workdir runs/slices

Every row takes the same number of steps (on Synapse 3150, 300 epochs of 10 %), so that more slices
mean more labels and not also more training.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target

PERCENT = (1, 5, 10, 25, 100)


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    if variant == SYNAPSE:
        setting["overrides"]["train.steps"] = 3150
    return Plan(
        title="Dice against the number of labelled slices",
        rows=tuple(
            Row(f"p{percent:03d}", f"{percent} %", {"fewshot.fraction": percent / 100}, percent)
            for percent in PERCENT
        ),
        reference="p010",
        axis="labelled slices (% of the valid ones)",
        **setting,
    )
