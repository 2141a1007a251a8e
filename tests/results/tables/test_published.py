"""The paper's tables: their arithmetic, what is said of it, and which runs they stand beside."""

import pytest

from pgpsam_jax.errors import UserError
from pgpsam_jax.results.tables import published


def test_published_tables_and_their_arithmetic():
    computed = {
        key: {method: round(row.computed, 2) for method, row in table.rows.items() if row.organs}
        for key, table in published.TABLES.items()
    }
    assert computed["table1"] == {
        **{"fssp": 39.27, "autosam": 62.27, "surgicalsam": 50.77, "samlst": 65.67},
        **{"samed": 74.24, "pgpsam": 79.4},
    }
    assert computed["table2"] == pytest.approx(
        {"fssp": 16.73, "surgicalsam": 27.73, "autosam": 51.14, "samlst": 65.565}
        | {"samed": 73.3425, "pgpsam": 76.365},
        abs=0.0051,
    )
    assert computed["table3"] == {}
    for table in published.TABLES.values():
        assert all(len(row.organs) == len(table.organs) for row in table.rows.values())
    first = " ".join(published.notes("table1"))
    assert "PGP-SAM 78.75 (organs 79.40)" in first and "221" in first
    assert "SAM-LST" not in first  # the one row that adds up
    assert "5 %" in " ".join(published.notes("table2"))
    assert "71.92" in " ".join(published.notes("table3")) and published.TABLES["table3"].number == 3


def test_rows_of_the_paper_are_found_by_the_configuration():
    def model(name="pgpsam", cfm=True, ppg=True, ppr=True):
        return {"model": {"name": name, "cfm": cfm, "ppg": ppg, "ppr": ppr}}

    assert published.find("table3", model(ppr=False)).mean == 75.32
    assert published.find("table3", model(cfm=False, ppg=False, ppr=False)).mean == 71.92
    assert published.find("table3", model(cfm=False)) is None
    assert published.find("table3", model("samed")) is None
    assert published.find("table1", model()).mean == 78.75
    assert published.find("table1", model(ppg=False)) is None
    assert published.find("table1", model("SAM-LST")).mean == 65.67
    assert published.find("table2", model("fssp_sam")).mean == 21.04
    assert published.find(None, model()) is None
    with pytest.raises(UserError, match="unknown published table 'table9'; use one of table1"):
        published.find("table9", model())
