"""Table 1 of the paper, on Synapse: all registered methods, Dice per organ.

pgpsam grid table1 --workdir runs/table1

Each has its authors' recipe (docs/methods.md). `phantom` starts all but the U-Net from a small SAM
trained on other phantoms, weights/sam_vit_t: pgpsam pretrain. `hippocampus` and
`phantom_lite_medsam` start them from LiteMedSAM: pgpsam fetch lite_medsam
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Table 1: methods",
        rows=method_rows(),
        published="table1" if variant == SYNAPSE else None,
        **target(variant),
    )
