"""The page: one HTML file that holds its pictures and its style and asks for nothing else."""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import registry
from pgpsam_jax.report import facts
from pgpsam_jax.report.figures import charts, slices
from pgpsam_jax.report.figures.picture import Picture
from pgpsam_jax.report.headline import header
from pgpsam_jax.report.html.css import stylesheet
from pgpsam_jax.report.html.markup import escape, figure, paragraph, section, tables
from pgpsam_jax.report.subject import Subject
from pgpsam_jax.results.runs import Run
from pgpsam_jax.results.tables.assemble import run_tables, study_tables
from pgpsam_jax.results.tables.cost_table import run_cost, study_cost
from pgpsam_jax.results.tables.study import from_grid
from pgpsam_jax.utils.files import write_text

_MADE = "Made by pgpsam_jax.report"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
{header}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>
{sections}
</main>
<footer>{made} from the files of {path}. All figures are drawn from the CSV files
beside them.</footer>
<!-- figures: {figures} -->
</body>
</html>
"""


def write_report(folder, *, data=None, base=None) -> Path:
    """Write `<folder>/report/report.html` and its figures for a run or a grid; returns its path.

    They take the place of an earlier report once all is done; what others put there stays. data:
    root of the data set; base: stem of the converted SAM; where they are not, or no longer, at the
    places that the run knows.
    """
    folder = Path(folder)
    given = {"data.root": data, "model.base": base}
    subject = Subject.read(folder, {field: str(path) for field, path in given.items() if path})
    path = folder / "report" / "report.html"
    before = _before(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as temporary:
        figures = Path(temporary) / "figures"
        figures.mkdir()
        page = _page(subject, folder, figures)
        place = path.parent / "figures"
        place.mkdir(exist_ok=True)
        for name in before:  # it may have had more figures
            (place / name).unlink(missing_ok=True)
        for made in figures.iterdir():
            made.replace(place / made.name)
        write_text(path, page)
    return path


def _before(path: Path) -> list[str]:
    """Names of the figures of an earlier report; a `UserError` where the file is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else _MADE
    if _MADE not in text:
        raise UserError(f"{path} is no report of this program; move it to another folder")
    listed = re.search(r"<!-- figures: (.*) -->", text)
    return [name for name in listed[1].split("/") if name] if listed else []


def _page(subject: Subject, folder: Path, figures: Path) -> str:
    parts = _parts(subject, figures) | _background(subject, folder)
    return _PAGE.format(
        title=escape(f"{subject.title}: report"),
        style=stylesheet(),
        header=header(subject),
        contents="".join(f'<li><a href="#{_anchor(t)}">{escape(t)}</a></li>' for t in parts),
        sections="\n".join(section(_anchor(t), t, *body) for t, body in parts.items()),
        path=escape(folder.resolve().name),
        made=_MADE,
        figures="/".join(sorted(path.name for path in figures.iterdir())),
    )


def _parts(subject: Subject, figures: Path) -> dict[str, list[str]]:
    """Title -> HTML of the sections with results."""

    def drawn(found: list[Picture], otherwise: str = "") -> list[str]:
        shown = [figure(picture, figures) for picture in found]
        return shown or ([_missing(otherwise)] if otherwise else [])

    groups, scored, grid = subject.groups, subject.scored, subject.grid
    parts = {}
    if grid:
        notes = [paragraph(note) for note in grid.notes]
        parts["Rows and cells"] = [*notes, facts.states(grid), facts.overrides(grid)]
    results, cost = _tables(subject)
    parts["Results"] = [results] if grid or scored else [_missing("Not evaluated yet.")]
    if grid:
        parts["Results"] += drawn(charts.comparison_charts(groups, grid.axis, figures))
    if scored:
        parts["Distributions"] = drawn(charts.distribution_charts(scored, figures))
    if said := no_curve(subject.run):
        parts["Training"] = [_missing(said)]
    else:
        curves = charts.training_charts(groups, figures)
        parts["Training"] = drawn(curves, "No step has been recorded yet.")
    if scored:
        parts["Qualitative results"] = _tried(lambda: drawn([slices.qualitative(scored, figures)]))
        parts["Failures"] = _tried(lambda: drawn([slices.failures(scored[-1], figures)]))
    parts["Prompts and prototypes"] = _tried(
        lambda: _with_alarm(drawn(_prototypes(groups, figures), _NO_PROTOTYPES), figures)
    )
    if cost:
        parts["Cost"] = [cost, *drawn(charts.cost_charts(groups, figures))]
    timing = charts.timing_charts(groups, figures)
    parts["Timing"] = drawn(timing, "No times were recorded.")
    return parts


_NO_PROTOTYPES = (
    "No pictures: there is no finished run, its method has no prototypes, or its checkpoint or "
    "data set cannot be read."
)


def no_curve(run: Run | None) -> str:
    """What to say where a run has no training to show: nothing trains, or it is fitted at once."""
    training = run and registry.method_of(run.config.model).training
    if training is registry.Training.NONE:
        return "Nothing of this method trains."
    if training is registry.Training.LBFGS and run.records:
        last = run.records[-1]
        return (
            f"Fitted once, to all slices of the few-shot list: loss {last['loss']:.4g} after "
            f"{last['iterations']:.0f} iterations, largest slope {last['gradient_norm']:.2g}."
        )
    return ""


def _tables(subject: Subject) -> tuple[str, str]:
    """The tables of results, and those of cost ("" without a record of it)."""
    known = [f"Note: {notice}" for notice in subject.notices]
    if subject.run:
        title, found, cost = subject.title, run_tables(subject.run), run_cost(subject.run)
    else:
        study = from_grid(subject.grid)
        title, found, cost = study.title, study_tables(study), study_cost(study)
        known += subject.grid.notes
    results = [table for table in found if table not in cost]
    return tables(results, title, known), tables(cost, title)


def _tried(make: Callable[[], list[str]]) -> list[str]:
    """The pictures, or in one sentence why there are none (a data set that was moved, say)."""
    try:
        return make()
    except (UserError, OSError) as error:
        print(f"left out: {error}", file=sys.stderr, flush=True)
        return [_missing(f"The pictures cannot be drawn: {error}.")]


def _with_alarm(shown: list[str], figures: Path) -> list[str]:
    """The section on prompts and prototypes, a warning first where there is something to see."""
    from pgpsam_jax.report.prototypes.pictures import alarm

    found = alarm(figures)
    return ([paragraph(found, "notice")] if found else []) + shown


def _prototypes(groups, figures: Path) -> list[Picture]:
    """Of the first finished run of the last row that has any."""
    from pgpsam_jax.report.prototypes.pictures import prototype_pictures

    for group in reversed(groups):
        if group.runs and (found := prototype_pictures(group.runs[0], figures)):
            return found
    return []


def _background(subject: Subject, folder: Path) -> dict[str, list[str]]:
    code = subject.grid.code if subject.grid else {}
    extra = {f"grid: code {key}": value for key, value in code.items()}
    return {
        "Configuration": [facts.configuration_tables(list(subject.configs.values()))],
        "Provenance": [facts.provenance_table(subject.runs, extra)],
        "Files": [facts.files(folder)],
    }


def _missing(text: str) -> str:
    return paragraph(text, "missing")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
