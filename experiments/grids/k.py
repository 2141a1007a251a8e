"""Inter-class prototypes matched to each class: k = alpha / 2 = 4 here.

python -m experiments.run_grid --grid experiments/grids/k.py --workdir runs/k
"""

from experiments.grid.plan import Plan, axis_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Dice against the number of matched prototypes",
        rows=axis_rows("model.k", (1, 2, 4, 8)),
        reference="k4",
        axis="k, matched inter prototypes per class",
        **target(variant),
    )
