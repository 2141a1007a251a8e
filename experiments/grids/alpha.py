"""Inter-class prototypes per class: the paper's alpha is 8. k stays 4.

python -m experiments.run_grid --grid experiments/grids/alpha.py --workdir runs/alpha
"""

from experiments.grid.plan import Plan, axis_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Dice against the number of inter-class prototypes",
        rows=axis_rows("model.alpha", (2, 4, 8, 16)),
        reference="alpha8",
        axis="alpha, inter prototypes per class",
        **target(variant),
    )
