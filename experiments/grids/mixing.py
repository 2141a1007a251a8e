"""Initial strength of PPR: alpha and beta of Eq 5, which the paper does not specify.

pgpsam grid mixing --workdir runs/mixing

At 0.5 the update of Eq 5 is longer than the prototype it is added to, and all class prototypes
become alike (docs/results/README.md); the authors' release initializes its gains to 0.001.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Dice against the initial strength of prototype refinement",
        rows=(
            Row("no_ppr", "without PPR", {"model.ppr": False}),
            Row("mix0500", "PPR from 0.5", {"model.mix_start": 0.5}),
            Row("mix0050", "PPR from 0.05", {"model.mix_start": 0.05}),
            Row("mix0001", "PPR from 0.001", {"model.mix_start": 0.001}),
        ),
        **target(variant),
    )
