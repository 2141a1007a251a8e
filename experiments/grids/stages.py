"""Number of refinement stages, two in the paper; each adds one block, from deep to shallow.

pgpsam grid stages --workdir runs/stages
"""

from experiments.grid.plan import Plan, tap_rows
from experiments.grids._targets import FROM_LITE_MEDSAM, PHANTOM, SYNAPSE, target

TAPS = {
    SYNAPSE: ((11,), (11, 2), (11, 5, 2), (11, 8, 5, 2)),
    PHANTOM: ((3,), (3, 1), (3, 2, 1), (3, 2, 1, 0)),
} | dict.fromkeys(FROM_LITE_MEDSAM, ((3,), (3, 0), (3, 2, 0), (3, 2, 1, 0)))


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting, rows = target(variant), tap_rows(TAPS[variant])
    return Plan(
        title="Dice against the number of refinement stages",
        rows=rows,
        reference=rows[1].name,
        **setting,
    )
