"""The head of the page: subject, notices, and key numbers."""

import numpy as np

from pgpsam_jax.methods import registry
from pgpsam_jax.metrics.aggregate import Scores, spread
from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.report.figures.csv_rows import Group, scores_of
from pgpsam_jax.report.html.markup import escape, paragraph
from pgpsam_jax.report.subject import Subject
from pgpsam_jax.results.grid import DONE, Grid
from pgpsam_jax.results.runs import Run
from pgpsam_jax.results.tables.text import interval, percent


def header(subject: Subject) -> str:
    """HTML of the name, notices and key numbers of a run or an experiment grid."""
    source = subject.source
    if isinstance(source, Grid):
        kind, about = f"Experiment grid, {source.variant}", _grid_line(source)
        tiles = _grid_tiles(subject.groups)
    else:
        kind, about, tiles = "Run", _run_line(source), _run_tiles(source)
    boxes = "".join(
        f'<div><dt>{escape(what)}</dt><dd class="number">{escape(number)}</dd>'
        f"<dd>{escape(more)}</dd></div>"
        for what, number, more in tiles
    )
    parts = [
        paragraph(kind, "kind"),
        f"<h1>{escape(subject.title)}</h1>",
        paragraph(about, "about"),
    ]
    parts += [f'<p class="notice">{escape(notice)}</p>' for notice in subject.notices]
    return "\n".join([*parts, f'<dl class="tiles">{boxes}</dl>' if boxes else ""])


def _run_line(run: Run) -> str:
    model, data = run.config.model, run.config.data
    if registry.method_of(model).training is registry.Training.NONE:
        step = "no trainable parameters"
    elif run.records:
        step = f"step {run.records[-1]['step']}"
    else:
        step = "no steps recorded yet"
    return (
        f"{registry.name_of(registry.key_of(model))}, {model.encoder} at {model.image_size} px, "
        f"data {data.layout}, seed {run.config.seed}, {step}"
    )


def _grid_line(grid: Grid) -> str:
    done = sum(cell.state["state"] == DONE for cell in grid.cells)
    axis = f", varying {grid.axis}" if grid.axis else ""
    rows, cells = len(grid.rows), len(grid.cells)
    return f"{grid.name}: {rows} rows{axis}, {done} of {cells} cells finished"


def _run_tiles(run: Run) -> list[tuple[str, str, str]]:
    if not run.cases:
        return [("Dice, class mean (strict)", "-", run.unscored)]
    summary = summarize(run.cases)
    strict, n = summary["strict"], summary["n_cases"]
    ends = strict["dice_case_ci95"]
    return [
        (
            "Dice, class mean (strict)",
            f"{percent(strict['dice_class_mean'])} %",
            f"mean of {len(run.names) - 1} organs, n = {n} cases",
        ),
        (
            "Dice, case mean (strict)",
            f"{percent(strict['dice_case_mean'])} %",
            f"95 % CI {interval(ends, percent)}, n = {n} cases (Student t)",
        ),
        (
            "HD95, class mean (strict)",
            "n/a" if strict["hd95_class_mean"] is None else f"{strict['hd95_class_mean']:.1f} mm",
            "missed and hallucinated organs excluded",
        ),
    ]


def _grid_tiles(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Tiles of the reference row and of the row with the highest class mean."""
    scored = [(group, found) for group in groups if (found := scores_of(group)) is not None]
    if not scored:
        return [("Dice, class mean (strict)", "-", "no cells evaluated yet")]
    best = max(scored, key=lambda pair: pair[1].over_seeds("class")[0])
    tiles = [_row_tile(*pair, "Reference row") for pair in scored if pair[0].reference]
    return tiles if best[0].reference else [*tiles, _row_tile(*best, "Best row")]


def _row_tile(group: Group, scores: Scores, what: str) -> tuple[str, str, str]:
    mean, sd = scores.over_seeds("class")
    ends = spread(scores.unit_scores())[1]
    n = int(np.isfinite(scores.unit_scores()).sum())
    seeds = "one seed" if sd is None else f"SD {percent(sd)} over {len(scores.seeds)} seeds"
    more = (
        f"Dice, class mean (strict), {seeds}; 95 % CI of the case mean {interval(ends, percent)}, "
        f"n = {n} {'groups' if scores.groups else 'cases'}"
    )
    return f"{what}: {group.label}", f"{percent(mean)} %", more
