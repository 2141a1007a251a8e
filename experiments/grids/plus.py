"""Preset plus: what its fine maps add, with and without the paper's modules, encoder frozen.

pgpsam grid plus --workdir runs/plus --set data.root=FOLDER

On the hippocampus (configs/hippocampus.py). The slices are encoded beforehand, in four augmented
copies each. Rows with LoRA are those of `table1:hippocampus`.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import HIPPOCAMPUS, target
from experiments.grids.table3 import switches

_PLUS = {"model.preset": "plus"}
_BASELINE = switches(False, False, False)


def get_grid(variant: str = HIPPOCAMPUS) -> Plan:
    setting = target(variant)
    setting["overrides"] |= {"model.train_encoder": "frozen", "train.encoded_copies": 4}
    return Plan(
        title="Preset plus, encoder frozen",
        rows=(
            Row("paper", "paper", {}),
            Row("plus", "plus: paper + fine maps", _PLUS),
            Row("baseline", "paper without CFM, PPG, PPR", _BASELINE),
            Row("plus_baseline", "plus without CFM, PPG, PPR", _PLUS | _BASELINE),
        ),
        **setting,
    )
