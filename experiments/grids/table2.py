"""Table 2 of the paper: the compared methods on head CT, four ventricles.

pgpsam grid table2 --workdir runs/table2

The paper's data are private; the default takes your own (configs/ventricle.py). There is no head
phantom: `phantom` rehearses five classes and a split by fraction on four phantom organs, with the
small SAM of table1.
"""

from experiments.grid.plan import Plan, method_rows
from experiments.grids._targets import PHANTOM, SYNAPSE, target


def get_grid(variant: str = "ventricle") -> Plan:
    setting = target(PHANTOM if variant == PHANTOM else SYNAPSE)
    if variant == PHANTOM:
        setting["overrides"] |= {
            "data.label_table": "configs/labels/four_organs.json",
            "data.split": "fraction",
        }
    elif variant == "ventricle":
        setting["config"] = "configs/ventricle.py"
    else:
        raise ValueError(f"unknown variant {variant!r}; there are ventricle and phantom")
    return Plan(
        title="Table 2: methods on four ventricles",
        rows=method_rows(),
        published="table2" if variant == "ventricle" else None,
        **setting,
    )
