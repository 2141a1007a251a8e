"""Table 1 with one recipe for all: PGP-SAM's optimizer, schedule, loss weights, batch, LoRA rank.

python -m experiments.run_grid --grid experiments/grids/equal_recipe.py --workdir runs/equal_recipe

Beside `table1`, where each method has its authors' recipe, this says what is method and what
recipe. Only what a method is stays its own: which parts of the encoder train, its outputs, the kind
of its loss. The weights start as in `table1`; phantom: python -m experiments.pretrain
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Methods by one recipe",
        rows=method_rows(equal=True),
        **target(variant),
    )
