"""Table 1 with PGP-SAM's recipe for all: optimizer, schedule, loss weights, batch, LoRA rank.

pgpsam grid equal_recipe --workdir runs/equal_recipe

Compared with `table1`, where each method has its authors' recipe, this separates method and recipe.
A method keeps only its trainable parts of the encoder, its outputs and its kind of loss. The
initial weights are those of `table1`; phantom: pgpsam pretrain
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(title="Methods by one recipe", rows=method_rows(equal=True), **target(variant))
