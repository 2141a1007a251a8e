"""Rank of LoRA on q and v: the paper's is 4.

python -m experiments.run_grid --grid experiments/grids/lora_rank.py --workdir runs/lora_rank
"""

from experiments.grid.plan import Plan, axis_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Dice against the LoRA rank",
        rows=axis_rows("model.lora_rank", (1, 4, 8, 16)),
        reference="lora_rank4",
        axis="LoRA rank",
        **target(variant),
    )
