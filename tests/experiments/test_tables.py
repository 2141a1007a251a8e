"""The program behind the tables: the long CSV, several folders at once, wrong ones."""

import pytest

from experiments import tables as program
from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.protocols import COLUMNS
from pgpsam_jax.results.grid import read_grid
from pgpsam_jax.results.tables.study import from_grid, long_rows
from tests.support.grid_folder import (
    CASES,
    ORGANS,
    grid_tables,
    made_up,
    read_csv,
    write_grid,
    write_run,
)

ROWS = {"full": {}, "none": {"model.cfm": False}}


def test_long_rows_hold_every_case_row(tmp_path, capsys):
    states = {("none", 1): "pending"}
    plan = {"labels": {"none": 'no "modules", LoRA'}, "values": {"none": 0.25}, "axis": "fraction"}
    path = write_grid(tmp_path / "g", ROWS, (0, 1), states=states, **plan)
    grid = read_grid(path)
    program.main([str(path), "--format", "csv"])
    lines = read_csv(capsys.readouterr().out)
    assert len(lines) == len(long_rows(from_grid(grid))) == 3 * len(CASES) * len(ORGANS) * 6
    for row, seed in (("full", 0), ("full", 1), ("none", 0)):
        (cell,) = [cell for cell in grid.cells if (cell.row, cell.seed) == (row, seed)]
        found = [line for line in lines if (line["row"], line["seed"]) == (row, str(seed))]
        assert found[0]["label"] == plan["labels"].get(row, "full")
        assert found[0]["row_value"] == str(plan["values"].get(row, "")) and found[0]["grid"]
        for line, case in zip(found, cell.run().cases, strict=True):
            assert {key: type(case[key])(line[key]) for key in COLUMNS} == case


def test_program(tmp_path, capsys):
    grid = write_grid(tmp_path / "g", ROWS, (0,))
    run = write_run(tmp_path / "r", made_up("mine", 0), name="mine")
    program.main([str(run)])
    text = capsys.readouterr().out
    assert text.startswith(f"# Run {run}\n") and "## mine: per organ, `transunet`" in text
    out = tmp_path / "out" / "tables.tex"
    program.main([str(grid), str(run), "--format", "latex", "--output", str(out)])
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_text().startswith("% A study (phantom); needs \\usepackage{booktabs}\n")
    assert out.read_text().count(r"\begin{table}") == 6 + 3
    both = program.format_tables([grid, run, grid], "csv")
    assert {line["grid"] for line in read_csv(both)} == {"study", "runs"}
    assert len(read_csv(both)) == 3 * len(CASES) * len(ORGANS) * 6


def test_wrong_folders_end_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "is neither a grid folder (no grid.json) nor a run folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere is neither"):
        program.format_tables([tmp_path / "nowhere"], "csv")
    path = write_grid(tmp_path / "g", {"full": {}}, (0,), published="table7")
    with pytest.raises(UserError, match="unknown published table 'table7'"):
        grid_tables(read_grid(path))
