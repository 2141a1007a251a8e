"""Dice against the labels: 1 to 20 whole volumes, 5 to 100 slices, pretrained or not.

pgpsam grid budget --workdir runs/budget --set data.root=FOLDER

On the hippocampus (configs/hippocampus.py). PGP-SAM from LiteMedSAM with LoRA, the same from
random weights, all of them trained, and the U-Net. All rows take the same number of steps.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import HIPPOCAMPUS, target
from pgpsam_jax.config.method_recipes import recipe_of

VOLUMES, SLICES = (1, 2, 5, 20), (5, 20, 100)
_STARTS = {
    "pretrained": ("from LiteMedSAM", {}),
    "random": ("from random weights", {"model.base": "", "model.train_encoder": "full"}),
    "unet": ("U-Net", {"model.name": "unet"} | recipe_of("unet")),
}


def get_grid(variant: str = HIPPOCAMPUS) -> Plan:
    setting = target(variant)
    budgets = {
        f"{n}volumes": {"fewshot.rule": "volumes", "fewshot.volumes": n, "fewshot.count": None}
        for n in VOLUMES
    }
    budgets |= {f"{n}slices": {"fewshot.count": n} for n in SLICES}
    rows = tuple(
        Row(
            f"{budget}_{start}",
            f"{budget.replace('v', ' v').replace('sl', ' sl')}, {label}",
            fields | own,
        )
        for budget, fields in budgets.items()
        for start, (label, own) in _STARTS.items()
    )
    return Plan(title="Dice against the labels", rows=rows, **setting)
