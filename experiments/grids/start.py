"""Initial contribution of PGP-SAM's modules to SAM's features, and the LayerNorms of Eq 5.

pgpsam grid start:choice --workdir runs/start

The paper specifies neither. `choice` has phantoms of a separate seed, which no other table scores:
`model.start_scale` and `model.ppr_norm` were chosen on them (docs/paper.md).
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import PHANTOM, SYNAPSE, target

_SCALES = (0.3, 0.1, 0.03, 0.01)


def get_grid(variant: str = SYNAPSE) -> Plan:
    setting = target(PHANTOM if variant == "choice" else variant)
    if variant == "choice":
        setting["overrides"] |= {"data.root": "datasets/phantom_choice", "data.phantom_seed": 2000}
    scales = (
        Row(f"scale{1000 * scale:04.0f}", f"scale {scale:g}", {"model.start_scale": scale})
        for scale in _SCALES
    )
    return Plan(
        title="Dice against the initialization of PGP-SAM",
        rows=(
            Row("random", "default initialization", {"model.start": "random"}),
            *scales,
            Row("no_norm", "scale 0.1, Eq 5 without LayerNorm", {"model.ppr_norm": False}),
        ),
        **setting,
    )
