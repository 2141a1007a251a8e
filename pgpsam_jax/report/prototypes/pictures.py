"""Pictures of the prototypes of PGP-SAM, its prompts and its attention (paper 2.2 and 2.3).

Everything is drawn from the CSV files that `prototype_data.py` writes beside the pictures; the CT
under the maps comes from the test volumes.
"""

import functools
from pathlib import Path

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.report.figures.csv_rows import read_columns
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.report.prototypes import charts, maps
from pgpsam_jax.report.prototypes.collect import Look, look_into, own_weights, write_tables
from pgpsam_jax.results.runs import Run

_ALIKE = 0.99  # cosine of the sparse prompts of two classes that are as good as one


def prototype_pictures(run: Run, folder) -> list[Picture]:
    """Draw what the run's newest checkpoint does inside; [] and a printed reason if it cannot.

    Needs the checkpoint, the data set and a method with prototypes; runs the model on up to 24
    slices. Writes `<folder>/prototype_*.{csv,png,pdf}`.
    """
    try:
        look = look_into(run)
    except UserError as error:
        print(f"no prototype pictures: {error}", flush=True)
        return []
    folder = Path(folder)
    write_tables(look, folder)
    pictures = [_dense(look, folder)]
    if look.stages:
        pictures += [_attention(look, folder, name) for name in own_weights(look, look.stages[0])]
        pictures.append(_shares(look, folder))
    pictures.append(_similarity(look, folder))
    if look.stages:
        pictures += [_picks(look, folder), _mixing(look, folder)]
    return pictures


def alarm(folder) -> str | None:
    """What to warn of in the tables that `prototype_pictures` wrote: prompts that are all one."""
    if not (Path(folder) / "prototype_prompts.csv").is_file():
        return None
    table = _table(Path(folder), "prompts")
    last = table["pass"] == table["pass"].max()
    alike = last & (table["cosine"] > _ALIKE)
    if not alike.any():
        return None
    first = int(np.flatnonzero(alike)[0])
    return (
        f"The sparse prompts of {alike.sum()} of {last.sum()} pairs of classes are as good as one "
        f"(cosine above {_ALIKE}, as of {table['class'][first]} and {table['other'][first]}, in "
        "the last pass): what they tell the decoder about the image they tell it for every class "
        "alike."
    )


def _table(folder: Path, name: str) -> dict[str, np.ndarray]:
    return read_columns(folder / f"prototype_{name}.csv")


def _dense(look: Look, folder: Path) -> Picture:
    table = _table(folder, "dense")
    return draw(
        lambda theme: maps.dense_figure(look, table),
        folder,
        "prototype_dense",
        "Dense prompts",
        "The dense prompt D of every pass (0 is the bootstrap) on its token grid, with the true "
        "organs outlined. Size: the norm of D, bright is large, one scale per pass. Content: its "
        "first three principal components as red, green and blue; tokens of one color tell the "
        "decoder the same, and colors compare within a pass only.",
        raster=True,
        alt="Color maps of the dense prompts over CT slices, one pair per decoder pass",
    )


_ATTENTION = {
    "W_c": (
        "prototype_class_attention",
        "Class attention W_c (Eq 4)",
        "Before its softmax, W_c is one outer product per slice times a number per token, so all "
        "classes look at its highest or at its lowest place.",
    ),
    "W_q": (
        "prototype_query_attention",
        "Query attention W_q (Eq 5)",
        "W_q compares each prototype with every place of the fused feature.",
    ),
    "W": (
        "prototype_attention",
        "Attention of the prototypes",
        "Preset release has one softmax over class and query scores together; mean of its heads.",
    ),
}


def _attention(look: Look, folder: Path, name: str) -> Picture:
    stem, title, note = _ATTENTION[name]
    table, shares = _table(folder, "attention"), _table(folder, "shares")
    return draw(
        lambda theme: maps.attention_figure(look, table, shares, name),
        folder,
        stem,
        title,
        f"Where the token of each class's own prototype looks: weights over space, each map "
        f"scaled to its own maximum. Outlined is that organ where the slice has it, with the share "
        f"of the weights on tokens that touch it. {note}",
        raster=True,
        alt=f"Heat maps of {name} over CT slices, a column per class, a row per slice and stage",
    )


def _shares(look: Look, folder: Path) -> Picture:
    table = _table(folder, "shares")
    return draw(
        functools.partial(charts.shares_figure, table, look.names),
        folder,
        "prototype_shares",
        "Does the attention find the organ?",
        f"Share of each class's attention that falls on tokens touching its organ, mean over the "
        f"slices that have it (their number in brackets, {len(look.slices)} slices looked at). The "
        "bar is what attention spread evenly over the slice would give.",
    )


def _similarity(look: Look, folder: Path) -> Picture:
    table = _table(folder, "similarity")
    same = table["with"] == "intra"
    between, length = {}, {}
    for moment in dict.fromkeys(table["prototypes"]):
        own = same & (table["prototypes"] == moment)
        classes = [look.names[int(i)] for i in table["index"][own]]
        length[moment] = table["length"][own].mean()
        between[moment] = table["cosine"][own][table["class"][own] != np.array(classes, object)]
    words = (
        f"Between classes the mean cosine is {between['learned'].mean():.2f} as learned, the mean "
        f"length of their prototypes {length['learned']:.1f}"
    )
    if "refined" in between:
        words += (
            f"; after the last stage it is {between['refined'].mean():.2f}, the length "
            f"{length['refined']:.1f} (means over slices)"
        )
    return draw(
        functools.partial(charts.similarity_figure, table, look.names),
        folder,
        "prototype_similarity",
        "How alike the prototypes are",
        "Cosines of every class prototype with the others (left) and with the inter prototypes "
        f"(right). {words}.",
    )


def _picks(look: Look, folder: Path) -> Picture:
    table = _table(folder, "picks")
    words = []
    for number in look.stages:
        own = (table["pass"] == number) & (table["picked"] > 0)
        classes = np.bincount(table["inter"][own].astype(int))
        words.append(
            f"stage {number}: {np.count_nonzero(classes)} of {int(table['inter'].max()) + 1} are "
            f"picked, {np.count_nonzero(classes > 1)} of them by several classes"
        )
    return draw(
        functools.partial(charts.picks_figure, table, look.names),
        folder,
        "prototype_picks",
        "Which inter prototypes each class picks",
        f"Share of {len(look.slices)} slices in which a class picked an inter prototype; columns "
        "in order of the class that picks them first. The first stage compares learned prototypes, "
        f"hence picks the same in every slice. In {'; '.join(words)}.",
    )


def _mixing(look: Look, folder: Path) -> Picture:
    table = _table(folder, "mixing")
    return draw(
        functools.partial(charts.mixing_figure, table),
        folder,
        "prototype_mixing",
        "Mixing of the two attentions",
        "The learned weights of the two, alpha of the class and beta of the query attention (Eq 5; "
        f"in preset release of their scores, mean over places); both start at {look.mix_start:g}.",
    )
