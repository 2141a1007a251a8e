"""The report of a run and of grids: self-contained, escaped, drawn from its CSV files."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib import rc_context

from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.fewshot_list import FewShotList
from pgpsam_jax.data.io.nifti import write_label
from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.protocols import score_case
from pgpsam_jax.metrics.summary import write_evaluation
from pgpsam_jax.report import __main__ as program
from pgpsam_jax.report.figures import charts
from pgpsam_jax.report.figures import picture as drawing
from pgpsam_jax.report.figures.charts import CHARTS, cost_charts, redraw
from pgpsam_jax.report.figures.csv_rows import groups_of
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.report.figures.slices import failures
from pgpsam_jax.report.html.css import stylesheet
from pgpsam_jax.report.page import write_report
from pgpsam_jax.report.prototypes import pictures
from pgpsam_jax.results.grid import STATE, read_grid
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.visualization import theme
from pgpsam_jax.visualization.theme import DARK, LIGHT, new_figure
from tests.support.grid_folder import cost_record, made_up, read_csv, write_grid, write_run
from tests.support.report_page import Page, check_figures, check_self_contained
from tests.support.small_run import config_for, write_data

HOSTILE = '<script>alert("x")</script> & $\\frac$ <b>'
NAMES = ("background", "liver", "spleen")


@pytest.fixture(scope="module", autouse=True)
def sparing():
    """No pictures that need a trained model, which have tests of their own; all others coarse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "prototype_pictures", lambda run, folder: [])
        for name in ("_FILE_DPI", "_PAGE_DPI"):
            patch.setattr(drawing, name, 40)
        patch.setitem(theme._SETTINGS, "pdf.fonttype", 3)  # 42 takes half a second of each
        yield


@pytest.fixture(scope="module")
def rough():
    """Figures of which the PNG alone is drawn: the pages of `scored` and `draw` have them whole."""
    save, stub = drawing._save, {"pdf": b"%PDF", "svg": b"<svg/>"}

    def save_png(figure, target, kind, dpi):
        if kind == "png":
            save(figure, target, kind, dpi)
        elif hasattr(target, "write"):
            target.write(stub[kind])
        else:
            target.write_bytes(stub[kind])

    return save_png


@pytest.fixture
def sketched(rough, monkeypatch):
    monkeypatch.setattr(drawing, "_save", rough)


def write_scored(root, workdir, name="small", split="file"):
    """A run with predictions of cases b and c: b loses the spleen, c half of the liver in z = 5."""
    (root / "split.json").write_text(json.dumps({"train": ["a"], "test": ["b", "c"]}))
    config = config_for(root, data__split=split, data__axis="axial")
    config.name = name
    workdir.mkdir(parents=True)
    serialization.save_config(config, workdir)
    _, _, tests, table = dataset.find_split(config.data)
    (workdir / "labels.json").write_text(json.dumps(table.to_json()))
    rows = []
    for case in [case for case in tests if case.case_id != "a"]:
        volume, truth = read_case(case, table)
        prediction = truth.copy()
        if case.case_id == "b":
            prediction[prediction == 2] = 0
        else:
            prediction[5, :10] = 0
        path = workdir / "evaluation" / "predictions" / f"{case.case_id}.nii.gz"
        write_label(path, prediction, volume.source)
        spacing = volume.spacing
        rows += score_case(prediction, truth, spacing, table.names, case_id=case.case_id)
    write_evaluation(rows, workdir / "evaluation", NAMES, {"notices": [f"Beware {HOSTILE}"]})
    record = {"loss": 1.0, "final_dice": 0.5, "learning_rate": 1e-3, "gradient_norm": 1.0}
    lines = [json.dumps({"step": n} | record) for n in range(1, 90)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    (workdir / "timing.json").write_text('{"data": 1.5, "training": 200.0}')
    return workdir


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A workdir with its report, written once."""
    root = write_data(tmp_path_factory.mktemp("data"))
    workdir = write_scored(root, tmp_path_factory.mktemp("runs") / "r", name=HOSTILE)
    write_report(workdir)
    return workdir


def test_page_of_a_run(scored):
    page = check_self_contained(scored / "report" / "report.html")
    assert HOSTILE in page.words and f"Beware {HOSTILE}" in page.words
    assert page.words.count("Beware") == 1  # prominently, and not again below each table
    assert "Not evaluated yet" not in page.words and "cannot be drawn" not in page.words
    for heading in ("Results", "Distributions", "Failures", "Timing", "Configuration", "Files"):
        assert heading in page.words
    figures = scored / "report" / "figures"
    want = {"dice_by_organ", "hd95_by_organ", "training", "timing", "qualitative", "failures"}
    assert check_figures(figures) == want
    assert len(page.of("img")) == len(want) and len(page.of("source")) == len(want) - 2


def test_charts_are_embedded_for_both_color_schemes(scored):
    page = Page(scored / "report" / "report.html")
    svg = [(a["src"], LIGHT, DARK) for a in page.of("img") if "svg" in a["src"][:20]]
    svg += [(a["srcset"], DARK, LIGHT) for a in page.of("source")]
    assert len(svg) == 8 and all("dark" in a["media"] for a in page.of("source"))
    for address, shown, other in svg:
        text = base64.b64decode(address.partition("base64,")[2]).decode()
        assert shown.surface.lower() in text and other.surface.lower() not in text
        for element in ElementTree.fromstring(text).iter():
            links = [v for k, v in element.attrib.items() if k.endswith("href")]
            assert all(link.startswith("#") for link in links)


def test_charts_come_from_their_csv_alone(scored, tmp_path):
    figures = scored / "report" / "figures"
    for stem in CHARTS.keys() & {path.stem for path in figures.iterdir()}:
        with rc_context(LIGHT.settings):
            drawing._save(redraw(figures, stem, LIGHT), tmp_path / f"{stem}.png", "png", 40)
        assert (tmp_path / f"{stem}.png").read_bytes() == (figures / f"{stem}.png").read_bytes()
    text = (figures / "timing.csv").read_text().replace("200.0", "100.0")
    (tmp_path / "timing.csv").write_text(text)
    bars = redraw(tmp_path, "timing", LIGHT).axes[0].patches
    assert [bar.get_width() for bar in bars] == [1.5, 100.0]


def test_pictures_show_the_failures_that_were_made(scored):
    folder = scored / "report" / "figures"
    rows = read_csv((folder / "failures.csv").read_text())
    found = [(row["case"], row["z"], row["organ"], row["error"]) for row in rows]
    assert found[0] == ("b", "5", "spleen", "missed") and rows[0]["dice"] == "0.5"
    assert [one[:2] for one in found] == [("b", "5"), ("c", "5")]  # neighbors are left out
    assert 0.5 < float(rows[1]["dice"]) < 1
    rows = read_csv((folder / "qualitative.csv").read_text())
    assert [row["case"] for row in rows] == ["b", "c"]  # from the worst case to the best
    assert float(rows[0]["dice"]) == pytest.approx(0.5, abs=0.01)  # liver right, spleen missed


def test_scores_in_charts_are_those_of_the_cases(scored):
    rows = read_csv((scored / "report" / "figures" / "dice_by_organ.csv").read_text())
    found = {(row["case"], row["class"]): float(row["value"]) for row in rows}
    cases = read_csv((scored / "evaluation" / "cases.csv").read_text())
    want = {
        (row["case"], row["class"]): float(row["value"])
        for row in cases
        if (row["protocol"], row["metric"]) == ("strict", "dice")
    }
    assert found == want and found["b", "spleen"] == 0.0


def test_only_scored_slices_are_shown_within_a_volume(tmp_path, sketched):
    """Slices that were trained on are no failures of the test."""
    workdir = write_scored(write_data(tmp_path / "d"), tmp_path / "r", split="within_volume")
    entries = tuple((case, z) for case in "bc" for z in range(10) if z != 5)
    FewShotList(entries, {}).write(workdir / "fewshot.txt")
    failures(groups_of(read_run(workdir))[0], tmp_path / "out")
    rows = read_csv((tmp_path / "out" / "failures.csv").read_text())
    assert [row["z"] for row in rows] == ["5", "5"]


def half_finished(folder):
    """Three rows on an axis, 1 to 100; the reference has two seeds, another failed, one to come."""
    rows = {"one": {}, "ten": {"model.k": 2}, "all": {"model.k": 3}}
    states = {("ten", 1): "failed", ("all", 0): "running", ("all", 1): "pending"}
    labels = {"one": HOSTILE, "ten": "ten $ a $", "all": "all"}
    values = {"one": 1, "ten": 30, "all": 100}

    def scores(row, seed):
        found = made_up(row, seed, level=0.7 if row == "one" else 0.8)
        return found | {"0003": [None, 0.0]}  # an organ that is absent, and one missed

    plan = {"states": states, "scores": scores, "labels": labels, "values": values}
    write_grid(folder, rows, (0, 1), axis="slices (%)", title=HOSTILE, **plan)
    reason = {"state": "failed", "reason": f"memory {HOSTILE}"}
    (folder / "ten-seed1-0123abcd" / STATE).write_text(json.dumps(reason))
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory, rough):
    folder = half_finished(tmp_path_factory.mktemp("grid"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_save", rough)
        write_report(folder)
    return folder


def test_page_of_a_half_finished_grid(half):
    page = check_self_contained(half / "report" / "report.html")
    assert page.words.count(HOSTILE) > 5 and f"memory {HOSTILE}" in page.words
    assert "3 of 6 cells finished" in page.words and "model.k = 2" in page.words
    for state in ("✓ done", "✗ failed", "… running", "pending"):
        assert state in page.words
    assert "synthetic phantoms" in page.words  # a notice of the data
    assert "cannot be drawn: data.root is empty" in page.words  # the missing data set
    want = {"rows", "differences", "axis", "dice_by_organ", "hd95_by_organ", "training", "timing"}
    assert check_figures(half / "report" / "figures") == want


def test_charts_of_a_grid(half):
    """Log axis, one whisker where there are two seeds, differences against an own computation."""
    figures = half / "report" / "figures"
    ax = redraw(figures, "axis", LIGHT).axes[0]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "slices (%)"
    rows = read_csv((figures / "rows.csv").read_text())
    assert [(row["label"], row["seed"]) for row in rows] == [
        (HOSTILE, "0"),
        (HOSTILE, "1"),
        ("ten $ a $", "0"),
    ]
    rows = read_csv((figures / "differences.csv").read_text())
    assert {row["seeds"] for row in rows} == {"1"} and len(rows) == 12
    ten, one = (made_up(row, 0, level=level) for row, level in (("ten", 0.8), ("one", 0.7)))
    for row in rows:
        case = row["case"]
        want = 0.0 if case == "0003" else np.mean(ten[case]) - np.mean(one[case])
        assert float(row["difference"]) == pytest.approx(want, abs=1e-12)


def test_page_of_a_run_that_recorded_its_cost(tmp_path, sketched):
    workdir = write_run(tmp_path / "r", None, cost=cost_record(0.625))
    page = check_self_contained(write_report(workdir))
    assert "Cost Parameters, operations, time and memory" in page.words
    assert page.words.count("0.6250 GFLOP") == 1 and "Not evaluated yet." in page.words
    assert check_figures(workdir / "report" / "figures") == {"training", "timing"}


def priced(folder, costs):
    """A grid of two rows and seeds with the Dice 70 and 80 % of `one`, 60 % of `two`."""
    levels = {("one", 0): 0.7, ("one", 1): 0.8, ("two", 0): 0.6, ("two", 1): 0.6}
    scores = lambda row, seed: {case: [levels[row, seed]] * 2 for case in ("a", "b")}  # noqa: E731
    rows = {"one": {}, "two": {"model.k": 2}}
    return write_grid(folder, rows, (0, 1), scores=scores, costs=costs)


def test_cost_of_a_grid(tmp_path, monkeypatch, sketched):
    """A section with its table, apart from the results, and a chart of what differs."""
    for other in ("comparison", "distribution", "training", "timing"):
        monkeypatch.setattr(charts, f"{other}_charts", lambda *_: [])

    def costs(row, seed):
        return cost_record(0.5 if row == "one" else 20.0, 0.2 + 0.2 * seed, 100)

    folder = priced(tmp_path / "g", costs)
    page = check_self_contained(write_report(folder))
    assert page.words.count("operations, time and memory") == 1
    assert "Cost Parameters, operations, time and memory" in page.words
    assert "0.300 (0.200 to 0.400)" in page.words
    assert "cost" in check_figures(folder / "report" / "figures")
    forward, seconds, memory = redraw(folder / "report" / "figures", "cost", LIGHT).axes
    assert forward.get_xscale() == "log" and seconds.get_xlim()[0] == 0 == memory.get_xlim()[0]
    for ax, wanted in ((forward, (0.5, 20)), (seconds, (0.3, 0.3)), (memory, (100, 100))):
        middles = [line.get_xydata() for line in ax.lines if line.get_marker() in "os"]
        np.testing.assert_allclose(middles, [[(wanted[0], 75)], [(wanted[1], 60)]])


def test_rows_of_one_cost_have_no_chart(tmp_path):
    """Time alone differs by chance; without any record there is nothing to draw either."""
    same = priced(tmp_path / "same", lambda row, seed: cost_record(seconds=1 + seed))
    none = priced(tmp_path / "none", lambda row, seed: None)
    one = priced(tmp_path / "one", lambda row, seed: cost_record() if row == "one" else None)
    for folder in (same, none, one):
        assert cost_charts(groups_of(read_grid(folder)), tmp_path) == []


def test_nothing_finished_yet(tmp_path, sketched):
    """A planned grid, a run without scores, and one that has only just begun."""
    rows = {"a": {}, "b": {"model.k": 2}}
    states = {(row, 0): "pending" for row in rows}
    page = check_self_contained(write_report(write_grid(tmp_path / "g", rows, (0,), states=states)))
    assert "0 of 2 cells finished" in page.words and "no cells evaluated yet" in page.words
    workdir = write_run(tmp_path / "r", None)
    page = check_self_contained(write_report(workdir))
    assert "Not evaluated yet." in page.words and "THE BACKBONE IS RANDOM" in page.words
    assert check_figures(workdir / "report" / "figures") == {"training", "timing"}
    (workdir / "metrics.jsonl").unlink()
    (workdir / "timing.json").unlink()
    page = check_self_contained(write_report(workdir))
    assert "No training steps recorded yet." in page.words
    assert "No timing recorded." in page.words
    assert not list((workdir / "report" / "figures").iterdir())  # those of before are gone


def test_prototype_pictures_are_shown(tmp_path, monkeypatch):
    asked = []

    def made(run, folder):
        asked.append(run.workdir)
        return [Picture("p", "Attention <i>", "Seen.", b"<svg/>", None, "image/svg+xml")]

    monkeypatch.setattr(pictures, "prototype_pictures", made)
    for other in ("training", "timing"):
        monkeypatch.setattr(charts, f"{other}_charts", lambda *_: [])
    workdir = write_run(tmp_path / "r", None)
    page = check_self_contained(write_report(workdir))
    assert asked == [workdir] and "Attention <i>" in page.words


def test_program(tmp_path, capsys, monkeypatch, sketched):
    monkeypatch.setattr(charts, "training_charts", lambda *_: [])  # others draw them
    workdir = write_run(tmp_path / "r", None)
    program.main([str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report" / "report.html")
    with pytest.raises(SystemExit) as stop:
        program.main([str(tmp_path / "nothing")])
    assert stop.value.code == 2
    assert "is not a training workdir" in capsys.readouterr().err


def luminance(color):
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_both_themes():
    """WCAG AA: 4.5 for text on every ground it stands on, 3 for the lines of charts."""
    sheets = re.findall(r":root \{(.*?)\}", stylesheet())
    for shown, sheet in zip((LIGHT, DARK), sheets, strict=True):
        colors = dict(re.findall(r"--(\w+): (#\w+)", sheet))
        for ground in ("surface", "tint", "notice"):
            assert contrast(colors["text"], colors[ground]) > 4.5
        for text in ("muted", "link"):
            assert min(contrast(colors[text], colors[g]) for g in ("surface", "tint")) > 4.5
        assert colors["surface"] == shown.surface
        assert min(contrast(color, shown.surface) for color in shown.series[:5]) > 3
        assert len(set(shown.series)) == 7


def test_draw_keeps_its_promises(tmp_path):
    """Themes reach what the figure does not set itself; films come once, the same every time."""
    seen = {}

    def make(theme):
        figure = new_figure(3, 2, theme)
        ax = figure.add_subplot(xlabel="x", title="cost $ and $")
        seen[theme.name] = ax.xaxis.label.get_color(), ax.get_facecolor()
        return figure

    chart = draw(make, tmp_path, "chart", "t", "c")
    assert seen["light"][0] == LIGHT.text and seen["dark"][0] == DARK.text
    assert seen["light"][1] != seen["dark"][1]
    assert chart.mime == "image/svg+xml" and chart.light != chart.dark
    assert chart == draw(make, tmp_path, "chart", "t", "c")
    film = draw(make, tmp_path, "film", "t", "c", raster=True)
    assert film.mime == "image/png" and film.dark is None and film.light[1:4] == b"PNG"
    names = {"chart.png", "chart.pdf", "film.png", "film.pdf"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_others_put_beside_the_report_stays(tmp_path, monkeypatch, sketched):
    monkeypatch.setattr(charts, "training_charts", lambda *_: [])  # one of the charts will do
    workdir = write_run(tmp_path / "r", None)
    page = write_report(workdir)
    figures = page.parent / "figures"
    made = {path.name for path in figures.iterdir()}
    (figures / "mine.png").write_bytes(b"mine")
    old = sorted(made)[0]
    page.write_text(page.read_text().replace("<!-- figures: ", "<!-- figures: former.csv/"))
    (figures / "former.csv").write_text("of an earlier report")
    write_report(workdir)
    assert {path.name for path in figures.iterdir()} == made | {"mine.png"} and old in made
    page.write_text("<p>my own page</p>")
    with pytest.raises(UserError, match="was not written by"):
        write_report(workdir)
    assert page.read_text() == "<p>my own page</p>"
