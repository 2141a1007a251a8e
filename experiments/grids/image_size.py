"""Side of the image the network sees, in pixels: the paper's is 512.

python -m experiments.run_grid --grid experiments/grids/image_size.py --workdir runs/image_size
"""

from experiments.grid.plan import Plan, axis_rows
from experiments.grids._targets import PHANTOM, SYNAPSE, target

SIZES = {SYNAPSE: (256, 384, 512, 1024), PHANTOM: (64, 96, 128, 160)}
REFERENCE = {SYNAPSE: "image_size512", PHANTOM: "image_size128"}


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    return Plan(
        title="Dice against the image size",
        rows=axis_rows("model.image_size", SIZES[variant]),
        reference=REFERENCE[variant],
        axis="image size (pixels)",
        **setting,
    )
