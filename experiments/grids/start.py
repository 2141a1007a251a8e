"""What the modules of PGP-SAM add to SAM's features at the start, and whether Eq 5 has LayerNorms.

python -m experiments.run_grid --grid experiments/grids/start.py:choice --workdir runs/start

The paper is silent on both. `choice` has phantoms of a seed of its own, which no other table is
scored on: with it `model.start_scale` and `model.ppr_norm` were chosen (docs/paper.md).
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
        title="Dice against the start of PGP-SAM",
        rows=(
            Row("drawn", "all drawn as any layer", {"model.start": "drawn"}),
            *scales,
            Row("no_norm", "scale 0.1, Eq 5 without LayerNorm", {"model.ppr_norm": False}),
        ),
        **setting,
    )
