"""Mask tokens and hypernetworks of the classes: random, or started from SAM's trained token.

pgpsam grid class_tokens --workdir runs/class_tokens

Two rows for every method that has such tokens on SAM's decoder (`model.class_tokens`), each by its
own recipe.
"""

from experiments.grid.plan import Plan, Row, method_rows
from experiments.grids._targets import SYNAPSE, target


def get_grid(variant: str = SYNAPSE) -> Plan:
    from pgpsam_jax.methods.registry import METHODS

    having = {"_".join(filter(None, key)) for key in METHODS if METHODS[key].class_tokens}
    rows = []
    for row in method_rows():
        if row.name in having:
            from_sam = row.overrides | {"model.class_tokens": "sam"}
            rows += [row, Row(f"{row.name}_sam", f"{row.label}: tokens from SAM", from_sam)]
    return Plan(title="Where class tokens start", rows=tuple(rows), **target(variant))
