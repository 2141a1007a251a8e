"""Tables of cost: by hand, over seeds, left out without records, warned about where they differ."""

import pytest

from pgpsam_jax.results.grid import read_grid
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.results.tables.assemble import run_tables, study_tables
from pgpsam_jax.results.tables.cost_table import significant
from pgpsam_jax.results.tables.study import from_runs
from tests.support.grid_folder import CASES, cost_record, grid_tables, write_grid, write_run

ROWS = {"full": {}, "none": {"model.cfm": False}}


def level(dice):
    return {case: (dice, dice - 0.2) for case in CASES}


def cost_table(tables):
    (table,) = [table for table in tables if "operations, time and memory" in table.title]
    assert all(len(row) == len(table.head) for row in table.rows) and table.notes
    return table


def cells(table, row):
    (line,) = [line for line in table.rows if line[0] == row]
    return dict(zip(table.head, line, strict=True))


def grid_of(folder, costs, rows=ROWS, **plan):
    """Dice 75 and 65 % with seed 0 and 1; `costs(row, seed)`."""
    scores = {0: level(0.85), 1: level(0.75)}
    write_grid(folder, rows, (0, 1), scores=lambda row, seed: scores[seed], costs=costs, **plan)
    return read_grid(folder)


def test_rows_of_a_grid_by_hand(tmp_path):
    def costs(row, seed):
        return cost_record(0.5 if row == "full" else 0.25, 0.2 + 0.1 * seed, 300)

    table = cost_table(grid_tables(grid_of(tmp_path / "g", costs)))
    assert cells(table, "full") == {
        "row": "full",
        "seeds": "2/2",
        "Dice (%)": "70.00 ± 7.07",
        "trainable (M)": "0.9500",
        "parameters (M)": "1.000",
        "forward pass (GFLOP)": "0.5000",
        "training step (GFLOP)": "1.500",
        "s per step": "0.250 (0.200 to 0.300)",
        "step memory (MiB)": "300",  # 10 arguments and 290 temporaries
        "evaluation (s per volume)": "0.250",  # 3 s for 12 cases
    }
    assert cells(table, "none")["forward pass (GFLOP)"] == "0.2500"
    assert "Measured on 1 x cpu, float32, 128 px, batch 4." in table.notes


def test_runs_from_before_there_were_records(tmp_path):
    """No table without any; a row or a seed without one shows in the counts."""
    old = grid_of(tmp_path / "old", lambda row, seed: None)
    assert not [table for table in grid_tables(old) if "operations" in table.title]
    folder = write_run(tmp_path / "r", level(0.8), name="r")
    assert not [table for table in run_tables(read_run(folder)) if "operations" in table.title]

    def costs(row, seed):
        return cost_record() if (row, seed) == ("full", 1) else None

    table = cost_table(grid_tables(grid_of(tmp_path / "some", costs)))
    assert cells(table, "full")["seeds"] == "1/2" and cells(table, "full")["s per step"] == "0.200"
    none = cells(table, "none")
    assert none.pop("row") == "none" and none.pop("seeds") == "0/2"
    assert none.pop("Dice (%)") == "70.00 ± 7.07" and set(none.values()) == {"-"}
    assert "No cost record yet: none." in table.notes


def test_methods_without_a_training_step(tmp_path):
    """A fit has time and memory, what does not train neither; both say so, and warn of nothing."""
    rows = {"full": {}, "fit": {"model.cfm": False}, "oracle": {"model.ppr": False}}
    nothing = {"training": None, "forward": 0.5e9}

    def costs(row, seed):
        if row == "full":
            return cost_record()
        if row == "fit":
            return cost_record(kind="fit", flops_per_image=nothing, batch_size=155)
        record = cost_record(kind="none", flops_per_image=nothing, batch_size=None, step_bytes=None)
        del record["step_seconds"]
        return record

    table = cost_table(grid_tables(grid_of(tmp_path / "g", costs, rows)))
    found = {row: cells(table, row) for row in rows}
    columns = ("training step (GFLOP)", "s per step", "step memory (MiB)")
    assert [found["full"][key] for key in columns] == ["1.500", "0.200", "250"]
    assert [found["fit"][key] for key in columns] == ["-", "0.200", "250"]
    assert [found["oracle"][key] for key in columns] == ["-"] * 3
    assert all(one["forward pass (GFLOP)"] == "0.5000" for one in found.values())
    assert [note for note in table.notes if note.startswith(("fit:", "oracle:"))] == [
        "fit: fitted in one step, on all slices of the few-shot list at once; its operations "
        "depend on the number of iterations and are not counted.",
        "oracle: no trainable parameters, hence no training step.",
    ]
    assert table.notes[-1] == "Measured on 1 x cpu, float32, 128 px, batch 4."
    runs = {row: write_run(tmp_path / row, level(0.8), cost=costs(row, 0)) for row in rows}
    single = {row: cost_table(run_tables(read_run(folder))) for row, folder in runs.items()}
    names = {row: {line[0] for line in table.rows} for row, table in single.items()}
    assert "time of the fit" in names["fit"] and "memory of the fit, per device" in names["fit"]
    assert not [name for name in names["oracle"] if "step" in name or "per device" in name]
    assert "peak memory of the process" in names["oracle"]


def test_a_run_stopped_before_its_first_save(tmp_path):
    """FLOPs and memory are known, times are not; a host without the CPU has no FLOPs either."""
    record = cost_record(flops_per_image={"forward": None, "training": None})
    del record["step_seconds"], record["peak_bytes"]
    folder = write_run(tmp_path / "r", None, cost=record, name="r")
    (folder / "timing.json").unlink()
    table = cost_table(run_tables(read_run(folder)))
    found = {row[0]: row[1] for row in table.rows}
    assert found["memory of a step, per device"] == "250 MiB"
    assert found["trainable parameters"] == "950,000"
    assert set(found) == {
        "trainable parameters",
        "all parameters",
        "memory of a step, per device",
        "arguments, per device",
        "temporaries, per device",
    }


def test_one_run_in_full(tmp_path):
    record = cost_record(seconds=0.2, peak_bytes={"process": 3 * 2**30, "device": 2**20})
    table = cost_table(run_tables(read_run(write_run(tmp_path / "r", level(0.8), cost=record))))
    assert dict(table.rows) == {
        "trainable parameters": "950,000",
        "all parameters": "1,000,000",
        "forward pass, per image": "0.5000 GFLOP",
        "training step, per image": "1.500 GFLOP",
        "time of a step": "0.200 s",
        "quartiles over 70 intervals": "0.180 to 0.250 s",
        "images per s": "20.0",
        "memory of a step, per device": "250 MiB",
        "arguments, per device": "10.0 MiB",
        "temporaries, per device": "240 MiB",
        "peak memory of the process": "3,072 MiB",
        "peak memory of a device": "1.00 MiB",
        "evaluation, per volume": "0.250 s",
    }


def test_other_settings_are_said(tmp_path):
    fast = {"count": 2, "kind": "fast", "platform": "gpu"}
    runs = [
        write_run(tmp_path / "a", level(0.8), cost=cost_record(), name="a"),
        write_run(tmp_path / "b", level(0.7), cost=cost_record(devices=fast), name="b", model__k=2),
    ]
    table = cost_table(study_tables(from_runs([read_run(folder) for folder in runs])))
    warning = (
        "Warning: times and memory were measured in different settings (1 x cpu, float32, 128 px, "
        "batch 4: a; 2 x fast, float32, 128 px, batch 4: b)."
    )
    assert warning in table.notes and not any("Measured on" in note for note in table.notes)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.50217, 4, "0.5022"),
        (215.5, 4, "215.5"),
        (12345.6, 3, "12,346"),
        (0.0123, 3, "0.0123"),
        (0.0, 3, "0.00"),
        (None, 3, "-"),
    ],
)
def test_digits_that_count(value, digits, text):
    assert significant(value, digits) == text
