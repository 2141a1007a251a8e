"""Table 1 of the paper: the compared methods on Synapse, Dice per organ. Rows: what is registered.

python -m experiments.run_grid --grid experiments/grids/table1.py --workdir runs/table1
"""

from experiments.grids.targets import SYNAPSE, target
from experiments.plan import Plan, method_rows


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Table 1: methods on Synapse, eight organs",
        rows=method_rows(),
        published="table1" if variant == SYNAPSE else None,
        **target(variant),
    )
