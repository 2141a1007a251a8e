"""Rank of LoRA on q and v: the paper's is 4.

python -m experiments.run_grid --grid experiments/grids/lora_rank.py --workdir runs/lora_rank

On the phantom the backbone that LoRA adapts is random and frozen (no weights of that size exist):
a rehearsal, its Dice is low at every rank.
"""

from experiments.grids.targets import PHANTOM, SYNAPSE, target
from experiments.plan import Plan, axis_rows


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(variant)
    if variant == PHANTOM:
        setting["overrides"]["model.train_encoder"] = "lora"
    return Plan(
        title="Dice against the LoRA rank",
        rows=axis_rows("model.lora_rank", (1, 4, 8, 16)),
        reference="lora_rank4",
        axis="LoRA rank",
        **setting,
    )
