"""The report page: one self-contained HTML file with embedded figures and style."""

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
from pgpsam_jax.results.grid import Grid
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
<footer>{made} from the files in {path}. Each figure is drawn from the CSV file beside it.</footer>
<!-- figures: {figures} -->
</body>
</html>
"""


def write_report(folder, *, data=None, base=None) -> Path:
    """Writes the report of a run or an experiment grid, replacing an earlier one when complete.

    Files of other programs in the report folder are kept.

    Args:
        folder: workdir of a run, or folder of an experiment grid.
        data: root of the data set, if it has moved.
        base: stem of the converted SAM weights, if they have moved.

    Returns:
        The path of `<folder>/report/report.html`.

    Raises:
        UserError: the folder holds neither a run nor a grid, or `report.html` is not ours.
    """
    folder = Path(folder)
    moved = {"data.root": data, "model.base": base}
    subject = Subject.read(folder, {field: str(path) for field, path in moved.items() if path})
    path = folder / "report" / "report.html"
    before = _earlier_figures(path)
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


def _earlier_figures(path: Path) -> list[str]:
    """Names of the figures of an earlier report; `UserError` if the file is not a report."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else _MADE
    if _MADE not in text:
        raise UserError(f"{path} was not written by pgpsam_jax.report; move it to another folder")
    listed = re.search(r"<!-- figures: (.*) -->", text)
    return [name for name in listed[1].split("/") if name] if listed else []


def _page(subject: Subject, folder: Path, figures: Path) -> str:
    parts = _result_sections(subject, figures) | _background_sections(subject, folder)
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


def _result_sections(subject: Subject, figures: Path) -> dict[str, list[str]]:
    """{title: HTML parts} of the sections with results."""

    def figures_html(pictures: list[Picture], if_empty: str = "") -> list[str]:
        parts = [figure(picture, figures) for picture in pictures]
        return parts or ([_missing(if_empty)] if if_empty else [])

    groups, scored, source = subject.groups, subject.scored, subject.source
    results, cost = _tables(subject)
    parts = {}
    if isinstance(source, Grid):
        notes = [paragraph(note) for note in source.notes]
        parts["Rows and cells"] = [*notes, facts.cell_tables(source), facts.override_table(source)]
        compared = charts.comparison_charts(groups, source.axis, figures)
        parts["Results"] = [results, *figures_html(compared)]
    else:
        parts["Results"] = [results] if scored else [_missing(source.unscored)]
    if scored:
        parts["Distributions"] = figures_html(charts.distribution_charts(scored, figures))
    if isinstance(source, Run) and (reason := missing_curve_text(source)):
        parts["Training"] = [_missing(reason)]
    else:
        curves = charts.training_charts(groups, figures)
        parts["Training"] = figures_html(curves, "No training steps recorded yet.")
    if scored:
        parts["Qualitative results"] = _or_reason(
            lambda: figures_html([slices.qualitative(scored, figures)])
        )
        parts["Failures"] = _or_reason(lambda: figures_html([slices.failures(scored[-1], figures)]))
    parts["Prompts and prototypes"] = _or_reason(lambda: _prototypes(groups, figures))
    if cost:
        parts["Cost"] = [cost, *figures_html(charts.cost_charts(groups, figures))]
    timing = charts.timing_charts(groups, figures)
    parts["Timing"] = figures_html(timing, "No timing recorded.")
    return parts


_NO_PROTOTYPES = (
    "No figures: no run has finished, the method has no prototypes, or the checkpoint or data set "
    "cannot be read."
)


def missing_curve_text(run: Run) -> str:
    """Text in place of a training curve, for methods that are fitted at once or not trained."""
    training = registry.method_of(run.config.model).training
    if training is registry.Training.NONE:
        return "This method has no trainable parameters."
    if training is registry.Training.LBFGS and run.records:
        last = run.records[-1]
        return (
            f"Fitted once, on all slices of the few-shot list: loss {last['loss']:.4g} after "
            f"{last['iterations']:.0f} iterations, gradient norm {last['gradient_norm']:.2g}."
        )
    return ""


def _tables(subject: Subject) -> tuple[str, str]:
    """HTML of the result tables and of the cost tables ("" without a cost record)."""
    known = [f"Note: {notice}" for notice in subject.notices]
    source, title = subject.source, subject.title
    if isinstance(source, Run):
        found, cost = run_tables(source), run_cost(source)
    else:
        study = from_grid(source)
        title, found, cost = study.title, study_tables(study), study_cost(study)
        known += source.notes
    results = [table for table in found if table not in cost]
    return tables(results, title, known), tables(cost, title)


def _or_reason(make: Callable[[], list[str]]) -> list[str]:
    """Returns what `make` returns, or a sentence with the reason (a data set that moved, say)."""
    try:
        return make()
    except (UserError, OSError) as error:
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        return [_missing(f"These figures cannot be drawn: {error}.")]


def _prototypes(groups, figures: Path) -> list[str]:
    """Figures of the first finished run of the last row that has any, and a warning if needed."""
    from pgpsam_jax.report.prototypes import pictures

    for group in reversed(groups):
        if group.runs and (found := pictures.prototype_pictures(group.runs[0], figures)):
            warning = pictures.prompt_warning(figures)
            notice = [paragraph(warning, "notice")] if warning else []
            return notice + [figure(picture, figures) for picture in found]
    return [_missing(_NO_PROTOTYPES)]


def _background_sections(subject: Subject, folder: Path) -> dict[str, list[str]]:
    code = subject.source.code if isinstance(subject.source, Grid) else {}
    extra = {f"grid: code {key}": value for key, value in code.items()}
    return {
        "Configuration": [facts.configuration_tables(list(subject.configs.values()))],
        "Provenance": [facts.provenance_table(subject.runs, extra)],
        "Files": [facts.file_list(folder)],
    }


def _missing(text: str) -> str:
    return paragraph(text, "missing")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
