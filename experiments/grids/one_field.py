"""Dice against one setting of PGP-SAM, the variant: alpha, k, lora_rank or image_size.

pgpsam grid one_field:k --workdir runs/k
pgpsam grid one_field:k:phantom --workdir runs/k

The reference row is the paper's: 8 inter-class prototypes per class (alpha), alpha / 2 = 4 of them
matched (k, which stays 4 in the grid of alpha), LoRA of rank 4, 512 px.
"""

from experiments.grid.plan import Plan, axis_rows
from experiments.grids._targets import PHANTOM, SYNAPSE, target

# Field of `model` -> title, axis, values, the reference among them.
_FIELDS = {
    "alpha": (
        "the number of inter-class prototypes",
        "alpha, inter-class prototypes per class",
        (2, 4, 8, 16),
        8,
    ),
    "k": ("the number of matched prototypes", "k, matched prototypes per class", (1, 2, 4, 8), 4),
    "lora_rank": ("the LoRA rank", "LoRA rank", (1, 4, 8, 16), 4),
    "image_size": ("the image size", "image size (pixels)", (256, 384, 512, 1024), 512),
}
_OTHER_VALUES = {("image_size", PHANTOM): ((64, 96, 128, 160), 128)}


def get_grid(variant: str = "") -> Plan:
    field, _, setting = variant.partition(":")
    if field not in _FIELDS:
        raise ValueError(f"no grid of {field!r}; write one of {', '.join(_FIELDS)} after the colon")
    title, axis, values, reference = _FIELDS[field]
    values, reference = _OTHER_VALUES.get((field, setting), (values, reference))
    return Plan(
        title=f"Dice against {title}",
        rows=axis_rows(f"model.{field}", values),
        reference=f"{field}{reference}",
        axis=axis,
        **target(setting or SYNAPSE),
    )
