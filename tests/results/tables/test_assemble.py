"""Tables of grids and runs: unfinished grids, warnings, seeds of one row."""

import json

import pytest

from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.results.grid import read_grid
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.results.tables.assemble import run_tables, study_tables
from pgpsam_jax.results.tables.study import from_grid, from_runs, long_rows
from pgpsam_jax.results.tables.text import to_html, to_latex, to_markdown
from tests.support.grid_folder import CASES, case_rows, grid_tables, made_up, write_grid, write_run

OFF = {"model.cfm": False, "model.ppg": False, "model.ppr": False}
TABLE3 = {"full": {}, "cfm_ppg": {"model.ppr": False}, "none": OFF}


def flat(dice, organs=2):
    """The same Dice in every case and organ."""
    return {case: (dice,) * organs for case in CASES}


def cells(table, row):
    """{head: cell} of the line with this label."""
    (line,) = [line for line in table.rows if line[0] == row]
    return dict(zip(table.head, line, strict=True))


def by_title(tables, *words):
    """The one table whose title has these words."""
    (table,) = [t for t in tables if all(word in t.title for word in words)]
    return table


def assert_well_formed(tables):
    for table in tables:
        assert table.rows and all(len(row) == len(table.head) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
        assert table.notes


def test_finished_grid_by_hand(tmp_path):
    level = {("full", 0): 0.8, ("full", 1): 0.9, ("none", 0): 0.7, ("none", 1): 0.6}

    def scores(row, seed):
        return {case: (level[row, seed], level[row, seed] - 0.2) for case in CASES}

    rows = {"full": {}, "none": OFF}
    grid = read_grid(
        write_grid(tmp_path / "g", rows, (0, 1), scores=scores, labels={"none": "LoRA"})
    )
    tables = grid_tables(grid)
    assert_well_formed(tables)
    assert len(tables) == 6 and tables[0].title == "A study (phantom): Dice (`strict`)"
    for protocol in ("strict", "transunet", "release"):
        line = cells(by_title(tables, f": Dice (`{protocol}`)"), "full")
        slices = line.pop("slice Dice", None), line.pop("slice mcDice", None)
        assert slices == (("37.50 ± 3.54",) * 2 if protocol == "release" else (None, None))
        assert line == {
            **{"row": "full", "seeds": "2/2", "n": "12", "liver": "85.00", "spleen": "65.00"},
            **{"class mean": "75.00 ± 7.07", "case mean": "75.00 ± 7.07"},
            "95 % CI of case mean": "75.00 to 75.00",
        }
    line = cells(by_title(tables, "case mean"), "LoRA")
    assert line["difference"] == "-20.00" and line["p"] == "0.0005" == line["Holm p"]
    assert line["by seed"] == "-10.00, -30.00"
    assert (line["seeds"], line["n"], line["better / worse / same"]) == ("2", "12", "0 / 12 / 0")
    organ = cells(by_title(tables, "per organ"), "LoRA")
    assert organ == {"row": "LoRA", "liver": "-20.00 (0.0010)", "spleen": "-20.00 (0.0010)"}
    away = cells(by_title(tables, "distances"), "full")
    # liver 20 (1 - Dice): 4 and 2 mm, spleen 8 and 6 mm; NSD is the square of Dice.
    assert away["HD95 (mm)"] == "5.00 ± 1.41" and away["HD95 (transunet, voxels)"] == "2.50 ± 0.71"
    assert away["NSD at 2 mm (%)"] == "57.50 ± 10.61" and away["missed"] == "0"
    notes = " ".join(tables[0].notes)
    assert "n = 12 cases. n < 50" in notes and "fewer than 3 seeds" in notes
    assert "Student t interval" in notes and "Unfinished" not in notes
    assert "share its few-shot list" in notes


def test_half_finished_grid(tmp_path):
    states = {("none", seed): "pending" for seed in (0, 1, 2)}
    states |= {("cfm_ppg", 1): "failed", ("cfm_ppg", 2): "running"}
    path = write_grid(tmp_path / "g", TABLE3, states=states, published="table3")
    tables = grid_tables(read_grid(path))
    assert_well_formed(tables)
    dice = tables[0]
    assert [row[0] for row in dice.rows] == list(TABLE3)  # the order of the plan
    none = cells(dice, "none")
    assert none.pop("seeds") == "0/3" and none.pop("paper") == "71.92" and none.pop("row")
    assert set(none.values()) == {"-"}
    one = cells(dice, "cfm_ppg")
    assert one["seeds"] == "1/3" and "±" not in one["class mean"] and one["paper"] == "75.32"
    assert "±" in cells(dice, "full")["class mean"]
    notes = "\n".join(dice.notes)
    assert "of 9 runs 4 done, 1 failed, 3 pending, 1 running" in notes
    assert "rows with one seed have no SD" in notes
    assert '"paper" is Table 3 as printed' in notes and "phantoms" in notes
    comparison = by_title(tables, "case mean")
    assert cells(comparison, "cfm_ppg")["seeds"] == "1"
    assert set(cells(comparison, "none").values()) == {"none", "-"}
    assert "corrected for the 1 comparison(s)" in " ".join(comparison.notes)
    printed = by_title(tables, "The paper's Table 3")
    assert [row[-1] for row in printed.rows] == ["71.92", "74.08", "75.32", "78.75"]
    assert "below SAMed in Table 1 (73.91)" in " ".join(printed.notes)


@pytest.mark.parametrize("state", ["pending", "failed", "not evaluated"])
def test_grid_with_nothing_done(tmp_path, state):
    states = {(row, seed): state for row in TABLE3 for seed in (0, 1)}
    if state == "not evaluated":
        path = write_grid(tmp_path / "g", TABLE3, (0, 1), scores=lambda row, seed: None)
    else:
        path = write_grid(tmp_path / "g", TABLE3, (0, 1), states=states, published="table1")
    grid = read_grid(path)
    tables = grid_tables(grid)
    assert_well_formed(tables)
    assert cells(tables[0], "full")["class mean"] == "-"
    said = {"not evaluated": "6 done but not evaluated"}.get(state, f"6 {state}")
    assert f"of 6 runs {said};" in " ".join(tables[0].notes)
    assert "reference row has no results" in " ".join(by_title(tables, "case mean").notes)
    assert long_rows(from_grid(grid)) == []
    for write in (to_markdown, to_latex, to_html):
        assert all(write(table) for table in tables)


def test_published_columns_of_table1(tmp_path):
    rows = {"pgpsam": {}, "ours": {"model.cfm": False}}
    tables = grid_tables(read_grid(write_grid(tmp_path / "g", rows, published="table1")))
    assert (
        cells(tables[0], "pgpsam")["paper"] == "78.75" and cells(tables[0], "ours")["paper"] == "-"
    )
    line = cells(by_title(tables, "The paper's Table 1"), "PGP-SAM")
    assert line["printed mean"] == "78.75" and line["mean of organs"] == "79.40"
    assert line["difference"] == "-0.65" and line["right kidney"] == "90.11"
    assert "SAMed 73.91 (organs 74.24)" in " ".join(tables[-1].notes)


def test_unequal_cases_tolerances_and_masks_are_said(tmp_path):
    def scores(row, seed):
        return made_up(row, seed, CASES[:5] if row == "short" else CASES)

    rows = {"full": {}, "short": {}, "coarse": {}}
    path = write_grid(tmp_path / "g", rows, scores=scores)
    (coarse,) = path.glob("coarse-seed1-*")
    write_run(coarse, flat(0.7), tolerance=1.0, truth={CASES[0]: 5}, seed=1, name="coarse")
    tables = grid_tables(read_grid(path))
    assert_well_formed(tables)
    assert cells(tables[0], "short")["n"] == "5" and cells(tables[0], "full")["n"] == "12"
    for table in (*tables[:3], by_title(tables, "case mean")):
        notes = "\n".join(table.notes)
        assert "different cases (full: 12, short: 5, coarse: 12)" in notes
        assert f"reference masks of 1 case(s) ({CASES[0]}) differ" in notes
        assert "n = 5 to 12 cases" in notes
    comparison = by_title(tables, "case mean")
    assert cells(comparison, "short")["n"] == "5"
    assert "1 of 2 comparison(s) have too few differing pairs" in " ".join(comparison.notes)
    away = by_title(tables, "distances")
    assert "NSD (%)" in away.head and cells(away, "coarse")["NSD (%)"] == "-"
    assert "±" in cells(away, "full")["NSD (%)"]
    assert "(mm: full 2; short 2; coarse 1, 2)" in " ".join(away.notes)


def test_failures_are_counted_and_undefined_is_not_missing(tmp_path):
    def scores(row, seed):
        return {"a": (0.0, None), "b": (0.0, None), "c": (0.0, None)}

    tables = grid_tables(read_grid(write_grid(tmp_path / "g", {"full": {}}, scores=scores)))
    assert [table.title for table in tables if "against" in table.title] == []  # one row only
    line = cells(tables[-1], "full")
    assert (line["missed"], line["hallucinated"], line["absent"]) == ("9", "0", "9")
    assert line["HD95 (mm)"] == "n/a" and line["NSD at 2 mm (%)"] == "0.00 ± 0.00"
    assert cells(tables[0], "full")["spleen"] == "n/a"
    assert cells(tables[1], "full")["spleen"] == "0.00"


def test_notices_and_code_revisions_of_the_runs(tmp_path):
    path = write_grid(tmp_path / "g", {"full": {}, "none": OFF}, (0,))
    full, none = (next(path.glob(f"{row}-*")) for row in ("full", "none"))
    summary = json.loads((full / "evaluation/summary.json").read_text())
    summary["notices"] = ["The backbone was initialized at random."]
    (full / "evaluation/summary.json").write_text(json.dumps(summary))
    (none / "provenance.json").write_text(json.dumps({"git": "1" * 40}))
    notes = grid_tables(read_grid(path))[0].notes
    assert "Note (1 of 2 runs): The backbone was initialized at random." in notes
    assert any("2 versions of the code (0000000, 1111111)" in note for note in notes)
    for folder, commit in ((full, "0"), (none, "1")):  # another commit of the same sources
        (folder / "provenance.json").write_text(json.dumps({"git": commit * 40, "code": "c"}))
    assert not any("versions of the code" in n for n in grid_tables(read_grid(path))[0].notes)


def test_run_tables_say_what_the_summary_says(tmp_path):
    dice = {"a": (0.8, 0.4), "b": (0.6, 0.0), "c": (0.7, None)}
    folder = write_run(tmp_path / "r", dice, tolerance=1.5, name="mine")
    strict, transunet, release = run_tables(read_run(folder))
    assert_well_formed([strict, transunet, release])
    summary = summarize(case_rows(dice))
    line = cells(strict, "spleen")
    assert (line["n"], line["Dice (%)"], line["HD95 (mm)"]) == ("2", "20.00", "12.00")
    assert (line["missed"], line["hallucinated"], line["absent"]) == ("1", "0", "1")
    entry = summary["strict"]["per_class"]["liver"]
    low, high = (f"{100 * end:.2f}" for end in entry["dice_ci95"])
    assert cells(strict, "liver")["95 % CI"] == f"{low} to {high}"
    assert cells(strict, "liver")["SD"] == f"{100 * entry['dice_sd']:.2f}" == "10.00"
    for table, protocol in ((strict, "strict"), (transunet, "transunet"), (release, "release")):
        for kind in ("class", "case"):
            mean = summary[protocol][f"dice_{kind}_mean"]
            assert cells(table, f"{kind} mean")["Dice (%)"] == f"{100 * mean:.2f}"
    # Slices have half the Dice: liver 40, 30, 35, spleen 20, 0 and absent.
    for row, mean in (("liver", 35.0), ("spleen", 10.0), ("class mean", 22.5)):
        assert cells(release, row)["slice Dice (%)"] == f"{mean:.2f}"
    assert cells(release, "case mean")["slice Dice (%)"] == f"{(30 + 15 + 35) / 3:.2f}"
    assert "NSD at 1.5 mm (%)" in strict.head and not any("NSD" in one for one in transunet.head)
    assert "n < 50" in " ".join(strict.notes)
    empty = run_tables(read_run(write_run(tmp_path / "e", None)))
    assert {cell for row in empty[0].rows for cell in row[1:]} == {"-"}
    assert empty[0].notes == ["Not evaluated yet."]


def test_runs_that_differ_in_seeds_only_are_one_row(tmp_path):
    folders = [
        write_run(tmp_path / "a0", flat(0.8), seed=0, name="a0"),
        write_run(tmp_path / "b0", flat(0.6), seed=0, name="b0", model__k=2),
        write_run(tmp_path / "a1", flat(0.9), seed=1, name="a1"),
        write_run(tmp_path / "again", flat(0.9), seed=1, name="again"),
        write_run(tmp_path / "a2", flat(0.7), seed=1, name="a2", fewshot__seed=4),
    ]
    study = from_runs([read_run(folder) for folder in folders])
    assert [(line.label, list(line.runs)) for line in study.lines] == [
        ("a0", [0, 1, "1/4"]),
        ("b0", [0]),
        ("again", [1]),
    ]
    tables = study_tables(study)
    assert_well_formed(tables)
    assert cells(tables[0], "a0")["case mean"] == "80.00 ± 10.00"
    assert cells(by_title(tables, "case mean"), "b0")["reference mean"] == "80.00"  # of seed 0
    alone = from_runs([read_run(folders[0]), read_run(folders[3])])
    assert len(alone.lines) == 1
    lone = study_tables(from_runs([read_run(folders[1]), read_run(folders[3])]))
    comparison = by_title(lone, "case mean")
    assert "again shares no seed and case with the reference" in " ".join(comparison.notes)


def before_release(folder):
    """Make an evaluation as it was before there was a third protocol."""
    evaluation = folder / "evaluation"
    lines = (evaluation / "cases.csv").read_text().splitlines()
    kept = [line for line in lines if ",release," not in line]
    (evaluation / "cases.csv").write_text("\n".join(kept) + "\n")
    (evaluation / "slices.csv").unlink()
    summary = json.loads((evaluation / "summary.json").read_text())
    del summary["release"]
    (evaluation / "summary.json").write_text(json.dumps(summary))


def test_runs_from_before_the_release_protocol(tmp_path):
    """Of old runs alone nothing is said about it; beside new ones they have no scores in it."""
    path = write_grid(tmp_path / "g", {"full": {}, "none": OFF}, (0, 1))
    for cell in read_grid(path).cells:
        if cell.row == "full" or cell.seed == 1:
            before_release(cell.folder)
    tables = grid_tables(read_grid(path))
    assert_well_formed(tables)
    table = by_title(tables, "Dice (`release`)")
    assert set(cells(table, "full").values()) == {"full", "0/2", "-"}
    assert cells(table, "none")["seeds"] == "1/2" and "±" not in cells(table, "none")["case mean"]
    assert "evaluated before this protocol was added" in " ".join(table.notes)
    assert cells(tables[0], "full")["seeds"] == "2/2"
    assert not any("reference masks" in note for one in tables for note in one.notes)
    before_release(next(path.glob("none-seed0-*")))
    titles = [table.title for table in grid_tables(read_grid(path))]
    assert len(titles) == 5 and not any("release" in title for title in titles)
    run = read_run(next(path.glob("full-seed0-*")))
    assert [table.title[-8:] for table in run_tables(run)] == ["`strict`", "ansunet`"]


def test_scores_without_the_transunet_protocol(tmp_path):
    """Only its column of the distances is empty."""
    path = write_grid(tmp_path / "g", {"full": {}}, (0,))
    cases = next(path.glob("full-seed0-*")) / "evaluation" / "cases.csv"
    lines = cases.read_text().splitlines(keepends=True)
    cases.write_text("".join(line for line in lines if ",transunet," not in line))
    distances = cells(by_title(grid_tables(read_grid(path)), "distances"), "full")
    assert [distances[head] == "-" for head in ("HD95 (mm)", "HD95 (transunet, voxels)")] == [0, 1]
