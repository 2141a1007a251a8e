"""Table 1 of the paper: the compared methods on Synapse, Dice per organ. Rows: what is registered.

python -m experiments.run_grid --grid experiments/grids/table1.py --workdir runs/table1

Each by its authors' recipe. `phantom` starts all of them from a small SAM that was trained on other
phantoms, weights/sam_vit_t: python -m experiments.pretrain
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Table 1: methods on Synapse, eight organs",
        rows=method_rows(),
        published="table1" if variant == SYNAPSE else None,
        **target(variant),
    )
