"""The registered presets of PGP-SAM at equal budget.

pgpsam grid preset --workdir runs/preset
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(title="Presets of PGP-SAM", rows=method_rows("pgpsam"), **target(variant))
