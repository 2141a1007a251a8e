"""Result files: means with undefined values by hand, JSON schema, CSV round trip, Markdown."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.protocols import COLUMNS, METRICS, score_case
from pgpsam_jax.metrics.summary import (
    read_cases,
    read_slices,
    summarize,
    write_evaluation,
)
from pgpsam_jax.metrics.summary_markdown import format_markdown

NAN = float("nan")
NAMES = ("background", "spleen", "liver", "aorta")
# case -> class -> (status, strict dice, hd95, nsd, transunet dice, hd95, release dice)
SCORES = {
    "a": {
        "spleen": ("ok", 0.8, 4.0, 0.9, 0.8, 2.0, 0.9),
        "liver": ("missed", 0.0, NAN, 0.0, 0.0, 0.0, 0.0),
        "aorta": ("both_empty", NAN, NAN, NAN, 0.0, 0.0, NAN),
    },
    "b": {
        "spleen": ("ok", 0.6, 8.0, 0.5, 0.6, 5.0, 0.7),
        "liver": ("ok", 0.9, 2.0, 0.7, 0.9, 1.0, 0.9),
        "aorta": ("both_empty", NAN, NAN, NAN, 0.0, 0.0, NAN),
    },
    "c": {
        "spleen": ("both_empty", NAN, NAN, NAN, 0.0, 0.0, NAN),
        "liver": ("hallucinated", 0.0, NAN, 0.0, 1.0, 0.0, NAN),
        "aorta": ("both_empty", NAN, NAN, NAN, 0.0, 0.0, NAN),
    },
}


def make_rows():
    rows = []
    for case, organs in SCORES.items():
        for name, (status, *values) in organs.items():
            keys = [(protocol, metric) for protocol in METRICS for metric in METRICS[protocol]]
            for (protocol, metric), value in zip(keys, values, strict=True):
                entries = (case, NAMES.index(name), name, protocol, metric, value, 7, 9, status)
                rows.append(dict(zip(COLUMNS, entries, strict=True)))
    return rows


def test_means_with_undefined_values_by_hand():
    strict = summarize(make_rows())["strict"]
    # Classes: spleen (0.8 + 0.6) / 2 = 0.7, liver (0 + 0.9 + 0) / 3 = 0.3, aorta undefined.
    assert strict["per_class"]["spleen"]["dice"] == pytest.approx(0.7)
    assert strict["per_class"]["liver"]["dice"] == pytest.approx(0.3)
    assert strict["per_class"]["aorta"]["dice"] is None
    assert strict["dice_class_mean"] == pytest.approx(0.5)
    # Cases: a (0.8 + 0) / 2 = 0.4, b 0.75, c 0.
    assert strict["dice_case_mean"] == pytest.approx(1.15 / 3)
    assert strict["hd95_class_mean"] == pytest.approx((6.0 + 2.0) / 2)
    assert strict["hd95_case_mean"] == pytest.approx((4.0 + 5.0) / 2)  # c has no HD95
    assert strict["nsd_case_mean"] == pytest.approx((0.45 + 0.6 + 0.0) / 3)
    liver = strict["per_class"]["liver"]
    counts = {key: value for key, value in liver.items() if key[:2] in ("n", "n_")}
    assert counts == {
        "n": 3,
        "n_both_empty": 0,
        "n_missed": 1,
        "n_hallucinated": 1,
        "n_hd95": 1,
    }
    assert strict["per_class"]["spleen"]["n_both_empty"] == 1
    assert liver["hd95"] == 2.0 and liver["hd95_sd"] is None and liver["hd95_ci95"] is None


def test_transunet_means_count_every_case():
    transunet = summarize(make_rows())["transunet"]
    dice = {name: entry["dice"] for name, entry in transunet["per_class"].items()}
    assert dice == pytest.approx({"spleen": 1.4 / 3, "liver": 1.9 / 3, "aorta": 0.0})
    assert transunet["dice_class_mean"] == pytest.approx(3.3 / 9)
    assert transunet["dice_case_mean"] == pytest.approx(3.3 / 9)
    assert transunet["per_class"]["liver"]["n"] == 3
    assert transunet["per_class"]["spleen"]["hd95"] == pytest.approx(7 / 3)
    assert "nsd" not in transunet["per_class"]["spleen"]


def make_slices():
    """Slices of make_rows' cases: spleen 0.8, -, 0.4; liver 0, 0.5, 1; the aorta in none."""
    scores = {("a", 3): (0.8, 0.0, NAN), ("a", 4): (NAN, 0.5, NAN), ("b", 3): (0.4, 1.0, NAN)}
    return [
        {"case": case, "slice": index, "class": name, "dice": value}
        for (case, index), values in scores.items()
        for name, value in zip(NAMES[1:], values, strict=True)
    ]


def test_release_means_by_hand():
    release = summarize(make_rows(), make_slices())["release"]
    # Volumes: spleen (0.9 + 0.7) / 2, liver (0 + 0.9) / 2; cases a 0.45, b 0.8, c has neither.
    assert release["dice_class_mean"] == pytest.approx((0.8 + 0.45) / 2)
    assert release["dice_case_mean"] == pytest.approx((0.45 + 0.8) / 2)
    # Slices: spleen (0.8 + 0.4) / 2, liver (0 + 0.5 + 1) / 3; items 0.4, 0.5 and 0.7.
    assert release["slice_mcdice"] == pytest.approx((0.6 + 0.5) / 2)
    assert release["slice_dice"] == pytest.approx((0.4 + 0.5 + 0.7) / 3)
    assert release["n_slices"] == 3
    organs = {n: (e["slice_dice"], e["n_slices"]) for n, e in release["per_class"].items()}
    assert organs["aorta"] == (None, 0)
    assert organs["spleen"] == (pytest.approx(0.6), 2) and organs["liver"][1] == 3
    assert not {"hd95", "nsd", "n_hd95"} & set(release["per_class"]["spleen"])


def test_tables_of_before_have_no_release():
    old = [row for row in make_rows() if row["protocol"] != "release"]
    summary = summarize(old)
    assert set(summary) == {"strict", "transunet", "n_cases"}
    page = format_markdown(summary)
    assert "mcDice" not in page.split("- Columns")[0] and re.search(r"\| spleen +\| +2 \|", page)


def test_interval_is_the_t_interval_over_cases():
    strict = summarize(make_rows())["strict"]
    for scores, sd, ends in (
        (
            [0.0, 0.9, 0.0],
            strict["per_class"]["liver"]["dice_sd"],
            strict["per_class"]["liver"]["dice_ci95"],
        ),
        ([0.4, 0.75, 0.0], strict["dice_case_sd"], strict["dice_case_ci95"]),
    ):
        n = len(scores)
        assert sd == pytest.approx(np.std(scores, ddof=1))
        want = stats.t.interval(0.95, n - 1, np.mean(scores), stats.sem(scores))
        assert ends == pytest.approx(list(want))


def test_files_schema_and_round_trip(tmp_path):
    rows = make_rows()
    meta = {
        "nsd_tolerance_mm": np.float32(2.0),
        "seeds": (1, 2),
        "odd": {"nan": NAN, "path": tmp_path},
        "notices": ["backbone randomly initialized"],
    }
    summary = write_evaluation(rows, tmp_path / "evaluation", NAMES, meta, make_slices())
    folder = tmp_path / "evaluation"
    names = {"cases.csv", "slices.csv", "summary.json", "summary.md"}
    assert {path.name for path in folder.iterdir()} == names

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    text = (folder / "summary.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read == summary
    assert {"strict", "transunet", "n_cases", "definitions", "interval"} <= set(read)
    assert read["n_cases"] == 3 and read["nsd_tolerance_mm"] == 2.0 and read["seeds"] == [1, 2]
    assert read["odd"] == {"nan": None, "path": str(tmp_path)}
    for protocol, metrics in METRICS.items():
        part = read[protocol]
        assert {"dice_class_mean", "dice_case_mean", "per_class"} <= set(part)
        assert list(part["per_class"]) == list(NAMES[1:])
        assert all(set(metrics) <= set(entry) for entry in part["per_class"].values())

    lines = (folder / "cases.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[2] == "a,1,spleen,strict,hd95,4.0,7,9,ok"
    assert lines[8] == "a,2,liver,strict,hd95,nan,7,9,missed"
    np.testing.assert_equal(read_cases(folder / "cases.csv"), rows)
    slices = read_slices(folder / "slices.csv")
    np.testing.assert_equal(slices, make_slices())
    assert (folder / "slices.csv").read_text().splitlines()[:2] == [
        "case,slice,class,dice",
        "a,3,spleen,0.8",
    ]
    again = summarize(read_cases(folder / "cases.csv"), slices)
    assert again == summarize(rows, make_slices())
    assert again.items() <= summary.items()


def test_csv_keeps_every_bit_and_awkward_names(tmp_path):
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 2, (2, 5, 6, 7)).astype(np.uint8)
    names = ("background", 'left, "upper" lobe|ü')
    rows = score_case(prediction, truth, (3.3, 0.7, 0.7), names, case_id="fälle, 1")
    write_evaluation(rows, tmp_path, names, {})
    assert read_cases(tmp_path / "cases.csv") == rows
    table = (tmp_path / "summary.md").read_text()
    assert "lobe\\|ü" in table


def test_markdown_table(tmp_path):
    meta = {"nsd_tolerance_mm": 1.5, "notices": ["backbone randomly\ninitialized"]}
    write_evaluation(make_rows(), tmp_path, NAMES, meta, make_slices())
    page = (tmp_path / "summary.md").read_text().splitlines()
    assert page[2] == "> **Note:** backbone randomly initialized"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if "|" in line]
    table, release = lines[:7], lines[7:]
    assert [line[1:] for line in release[2:]] == [
        ["2", "0.800", "2", "0.600"],
        ["2", "0.450", "3", "0.500"],
        ["0", "n/a", "0", "n/a"],
        ["3", "0.625", "3", "0.550"],
        ["3", "0.625", "3", "0.533"],
    ]
    assert [line[0] for line in release] == [
        *("organ (`release`)", "-" * 17, *NAMES[1:], "**mcDice**", "**Dice**"),
    ]
    assert len(table) == 2 + 3 + 2 and {len(line) for line in table} == {12}
    cells = {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}
    assert cells["spleen"]["Dice"] == "0.700" and cells["spleen"]["n"] == "2"
    assert cells["spleen"]["NSD at 1.5 mm"] == "0.700" and cells["spleen"]["absent"] == "1"
    assert cells["liver"]["HD95 (mm)"] == "2.00" and cells["liver"]["missed"] == "1"
    assert cells["liver"]["Dice (transunet)"] == "0.633"
    assert cells["aorta"]["Dice"] == "n/a" and cells["aorta"]["95 % CI"] == "n/a"
    assert cells["**class mean**"]["Dice"] == "0.500" and cells["**class mean**"]["SD"] == ""
    assert cells["**case mean**"]["Dice"] == "0.383" and cells["**case mean**"]["SD"] == "0.375"
    low, high = map(float, cells["**case mean**"]["95 % CI"].split(" to "))
    assert low < 0.383 < high
    text = "\n".join(page)
    assert "Student t interval" in text and "n < 50" in text and "transunet" in text


def test_large_sample_has_no_coverage_note():
    rows = [row | {"case": f"{row['case']}{copy}"} for copy in range(20) for row in make_rows()]
    assert "n < 50" not in format_markdown(summarize(rows))


def test_mistakes_are_refused(tmp_path):
    rows = make_rows()
    with pytest.raises(UserError, match="no case was evaluated"):
        write_evaluation([], tmp_path, NAMES, {})
    with pytest.raises(UserError, match="case a was evaluated twice"):
        write_evaluation(rows + rows[:5], tmp_path, NAMES, {})
    with pytest.raises(ValueError, match="label table has"):
        write_evaluation(rows, tmp_path, NAMES[:3], {})
    with pytest.raises(ValueError, match="meta may not replace"):
        write_evaluation(rows, tmp_path, NAMES, {"strict": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "case,dice\na,0.5\n",
        ",".join(COLUMNS) + "\na,1,spleen,strict,dice,high,7,9,ok\n",
        ",".join(COLUMNS) + "\na,1,spleen,strict\n",
        ",".join(COLUMNS) + "\na,1,spleen,strict,dice,0.5,7,9,ok,more\n",
    ],
)
def test_damaged_table_is_named(tmp_path, text):
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cases\.csv is not a readable evaluation table"):
        read_cases(path)


def test_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.csv is not a readable evaluation table"):
        read_cases(tmp_path / "absent.csv")


def test_one_case_has_no_spread():
    rows = [row for row in make_rows() if row["case"] == "a"]
    strict = summarize(rows)["strict"]
    assert strict["dice_case_mean"] == pytest.approx(0.4) and strict["dice_case_ci95"] is None
    assert not any(isinstance(v, float) and math.isnan(v) for v in strict.values())
    assert "n/a" in format_markdown(summarize(rows))
