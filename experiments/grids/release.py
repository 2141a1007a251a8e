"""Effects of two details of preset `release`: scrambled tokens and deformable convolutions.

pgpsam grid release --workdir runs/release
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target

_RELEASE = {"model.preset": "release", "model.colors": "unit"}


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Preset release and its variants",
        rows=(
            Row("released", "as released", _RELEASE),
            Row("transposed", "tokens transposed", _RELEASE | {"model.token_order": "transposed"}),
            Row("plain", "plain convolutions", _RELEASE | {"model.dcn": "plain"}),
        ),
        **target(variant),
    )
