"""Table 3 of the paper: CFM, PPG and PPR added one by one.

pgpsam grid table3 --workdir runs/table3

The paper's baseline (71.92) is below its SAMed row (73.91), so it is not SAMed. Ours is this model
with the three modules off (docs/paper.md): projection and addition instead of CFM, SAM's no-mask
embedding instead of PPG, unrefined prototypes instead of PPR.
"""

from experiments.grid.plan import Plan, Row
from experiments.grids._targets import SYNAPSE, target


def switches(cfm: bool, ppg: bool, ppr: bool) -> dict:
    return {"model.cfm": cfm, "model.ppg": ppg, "model.ppr": ppr}


def get_grid(variant: str = SYNAPSE) -> Plan:
    return Plan(
        title="Table 3: the modules of PGP-SAM, added one by one",
        rows=(
            Row("baseline", "baseline", switches(False, False, False)),
            Row("cfm", "+ CFM", switches(True, False, False)),
            Row("cfm_ppg", "+ CFM + PPG", switches(True, True, False)),
            Row("cfm_ppg_ppr", "+ CFM + PPG + PPR", switches(True, True, True)),
        ),
        published="table3" if variant == SYNAPSE else None,
        **target(variant),
    )
