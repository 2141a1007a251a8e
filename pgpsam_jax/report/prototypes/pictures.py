"""Figures of the prototypes, prompts and attention of PGP-SAM (paper 2.2 and 2.3).

All figures are drawn from the CSV files of `collect.py` and, under the maps, the test volumes.
"""

import functools
from pathlib import Path

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.report.figures.csv_rows import read_columns
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.report.prototypes import charts, maps
from pgpsam_jax.report.prototypes.collect import Probe, own_token_weights, probe_run, write_tables
from pgpsam_jax.results.runs import Run

_ALIKE = 0.99  # cosine of two classes' sparse prompts that are nearly identical


def prototype_pictures(run: Run, folder) -> list[Picture]:
    """Draws the internals of the newest checkpoint; returns [] and prints the reason on failure.

    Needs the checkpoint, the data set and a method with prototypes; runs the model on up to 24
    slices. Writes `<folder>/prototype_*.{csv,png,pdf}`.
    """
    try:
        probe = probe_run(run)
    except UserError as error:
        print(f"no prototype figures: {error}", flush=True)
        return []
    folder = Path(folder)
    write_tables(probe, folder)
    pictures = [_dense(probe, folder)]
    if probe.stages:
        names = dict.fromkeys(place["map"] for place, _ in own_token_weights(probe))
        pictures += [_attention(probe, folder, name) for name in names]
        pictures.append(_shares(probe, folder))
    pictures.append(_similarity(probe, folder))
    if probe.stages:
        pictures += [_picks(probe, folder), _mixing(probe, folder)]
    return pictures


def prompt_warning(folder) -> str | None:
    """Warning if the tables of `prototype_pictures` show nearly identical prompts, else None."""
    if not (Path(folder) / "prototype_prompts.csv").is_file():
        return None
    table = _table(Path(folder), "prompts")
    last = table["pass"] == table["pass"].max()
    alike = last & (table["cosine"] > _ALIKE)
    if not alike.any():
        return None
    first = int(np.flatnonzero(alike)[0])
    return (
        f"The sparse prompts of {alike.sum()} of {last.sum()} pairs of classes are nearly "
        f"identical (cosine above {_ALIKE} in the last pass, for example {table['class'][first]} "
        f"and {table['other'][first]}): they give the decoder the same information about the image "
        "for these classes."
    )


def _table(folder: Path, name: str) -> dict[str, np.ndarray]:
    return read_columns(folder / f"prototype_{name}.csv")


def _draw(folder: Path, name: str, make, title: str, caption: str, alt: str = "") -> Picture:
    """Draws `prototype_<name>`; `alt` is given for CT images."""
    return draw(make, folder, f"prototype_{name}", title, caption, raster=bool(alt), alt=alt)


def _dense(probe: Probe, folder: Path) -> Picture:
    table = _table(folder, "dense")
    return _draw(
        folder,
        "dense",
        lambda theme: maps.dense_figure(probe, table),
        "Dense prompts",
        "The dense prompt D of each decoder pass (0: bootstrap) on its token grid, with the true "
        "organs outlined. Norm: brighter is larger, one scale per pass. Content: the first three "
        "principal components as red, green and blue; tokens of the same color give the decoder "
        "the same information. Colors are comparable only within a pass.",
        alt="Color maps of the dense prompts over CT slices, one pair per decoder pass",
    )


_ATTENTION = {
    "W_c": (
        "class_attention",
        "Class attention W_c (Eq 4)",
        "Before its softmax, W_c is one outer product per slice times a scalar per token, so all "
        "classes attend to its highest or its lowest position.",
    ),
    "W_q": (
        "query_attention",
        "Query attention W_q (Eq 5)",
        "W_q compares each prototype with every position of the fused feature.",
    ),
    "W": (
        "attention",
        "Attention of the prototypes",
        "The preset `release` has one softmax over class and query scores together; mean over its "
        "heads.",
    ),
}


def _attention(probe: Probe, folder: Path, name: str) -> Picture:
    stem, title, note = _ATTENTION[name]
    table, shares = _table(folder, "attention"), _table(folder, "shares")
    return _draw(
        folder,
        stem,
        lambda theme: maps.attention_figure(probe, table, shares, name),
        title,
        "Spatial attention of each class's own prototype token; each map is scaled to its "
        "maximum. If the slice contains the organ, it is outlined, and the number is the share of "
        f"the attention on tokens that overlap it. {note}",
        alt=f"Heat maps of {name} over CT slices, a column per class, a row per slice and stage",
    )


def _shares(probe: Probe, folder: Path) -> Picture:
    table = _table(folder, "shares")
    return _draw(
        folder,
        "shares",
        functools.partial(charts.shares_figure, table, probe.names),
        "Attention on the organs",
        "Share of each class's attention on tokens that overlap its organ, averaged over the "
        f"slices that contain it (count in parentheses, of {len(probe.slices)} slices in total). "
        "Vertical bar: the share under uniform attention.",
    )


def _similarity(probe: Probe, folder: Path) -> Picture:
    table = _table(folder, "similarity")
    same = table["with"] == "intra"
    between, length = {}, {}
    for moment in dict.fromkeys(table["prototypes"]):
        own = same & (table["prototypes"] == moment)
        classes = [probe.names[int(i)] for i in table["index"][own]]
        length[moment] = table["length"][own].mean()
        between[moment] = table["cosine"][own][table["class"][own] != np.array(classes, object)]
    words = (
        f"Mean cosine between classes: {between['learned'].mean():.2f} as learned, with mean "
        f"prototype norm {length['learned']:.1f}"
    )
    if "refined" in between:
        words += (
            f"; {between['refined'].mean():.2f} after the last stage, with norm "
            f"{length['refined']:.1f} (averaged over slices)"
        )
    return _draw(
        folder,
        "similarity",
        functools.partial(charts.similarity_figure, table, probe.names),
        "Similarity of the prototypes",
        "Cosines of each class prototype with the others (left) and with the inter prototypes "
        f"(right). {words}.",
    )


def _picks(probe: Probe, folder: Path) -> Picture:
    table = _table(folder, "picks")
    words = []
    for number in probe.stages:
        own = (table["pass"] == number) & (table["picked"] > 0)
        classes = np.bincount(table["inter"][own].astype(int))
        words.append(
            f"Stage {number}: {np.count_nonzero(classes)} of {int(table['inter'].max()) + 1} "
            f"picked, {np.count_nonzero(classes > 1)} of them by several classes."
        )
    return _draw(
        folder,
        "picks",
        functools.partial(charts.picks_figure, table, probe.names),
        "Inter prototypes picked by each class",
        f"Share of {len(probe.slices)} slices in which a class picked an inter prototype; columns "
        "are sorted by the first class that picks them. The first stage compares learned "
        f"prototypes, so its picks are the same in every slice. {' '.join(words)}",
    )


def _mixing(probe: Probe, folder: Path) -> Picture:
    table = _table(folder, "mixing")
    return _draw(
        folder,
        "mixing",
        functools.partial(charts.mixing_figure, table),
        "Weights of class and query attention",
        "Learned weights alpha of the class attention and beta of the query attention (Eq 5; in "
        "the preset `release` they weight the scores and are averaged over positions); both are "
        f"initialized to {probe.mix_start:g}.",
    )
