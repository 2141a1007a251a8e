"""Rules for the few-shot list: random, by label area (the authors'), or two whole volumes.

pgpsam grid list_rule --workdir runs/list_rule

Two of 18 volumes hold about 10 % of the slices: the same labeling effort, spent on two patients
instead of all. The area rule takes floor(10 %) + 1 slices, richest in each organ first.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    if variant == SYNAPSE:
        setting["overrides"]["train.steps"] = 3150
    return Plan(
        title="Dice by the rule of the few-shot list",
        rows=(
            Row("random", "random 10 %", {"fewshot.rule": "random", "fewshot.fraction": 0.10}),
            Row("area", "by label area, 10 %", {"fewshot.rule": "area", "fewshot.fraction": 0.10}),
            Row(
                "volumes",
                "two volumes",
                {"fewshot.rule": "volumes", "fewshot.fraction": None, "fewshot.volumes": 2},
            ),
        ),
        **setting,
    )
