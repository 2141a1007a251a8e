"""Encoder blocks that feed the two refinement stages; the paper only says early features.

pgpsam grid taps --workdir runs/taps

Rows name block indices, stage 1 first. The default is the last and the first block with global
attention (ViT-b: 11 and 2 of 12; the phantom's encoder: 3 and 1 of 4), of TinyViT's four stages the
last and the first.
"""

from experiments.grid.plan import Plan, tap_rows
from experiments.grids._targets import FROM_LITE_MEDSAM, PHANTOM, SYNAPSE, target

TAPS = {
    SYNAPSE: ((11, 2), (11, 5), (11, 8), (2, 11)),
    PHANTOM: ((3, 1), (3, 0), (3, 2), (1, 3)),
} | dict.fromkeys(FROM_LITE_MEDSAM, ((3, 0), (3, 1), (3, 2), (0, 3)))


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    return Plan(title="Dice by the encoder blocks used", rows=tap_rows(TAPS[variant]), **setting)
