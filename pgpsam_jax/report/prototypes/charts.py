"""Charts of the prototypes: attention on organs, cosines, picks, and the scalars of Eq 5."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pgpsam_jax.visualization.theme import Theme, new_figure

_WIDE = 9.2  # inches of a full-width figure
_MOMENTS = {"learned": "learned", "refined": "after the last stage"}


def shares_figure(table: dict, names, theme: Theme) -> Figure:
    """Share of attention on each organ, per map and stage; from `prototype_shares.csv`."""
    organs = [name for name in names[1:] if (table["class"] == name).any()]
    figure, left = new_figure(_WIDE, 0.95 + 0.46 * len(organs), theme), _margin(names) + 0.4
    ax = figure.add_axes(_inches(figure, left, 0.55, _WIDE - left - 0.2, 0.46 * len(organs)))
    maps = dict.fromkeys(table["map"])
    series = [(name, n) for name in maps for n in sorted(set(table["pass"]))]
    for line, organ in enumerate(organs):
        own = table["class"] == organ
        ax.axhline(line + 0.5, color=theme.line, linewidth=0.7, zorder=0)
        for place, (name, number) in enumerate(series):
            rows = own & (table["map"] == name) & (table["pass"] == number)
            height = line + 0.7 * ((place + 0.5) / len(series) - 0.5)  # side by side
            share, marker = table["attention"][rows].mean(), "os"[name == "W_q"]
            color = theme.series[place % len(theme.series)]
            label = f"{name}, stage {number:.0f}" if line == 0 else None
            ax.plot(share, height, marker, color=color, ms=5.5, clip_on=False, label=label)
        chance, label = table["tokens"][own].mean(), "uniform attention" if line == 0 else None
        ax.plot(chance, line, "|", color=theme.text, markersize=24, label=label)
    places = [(table["class"] == organ) for organ in organs]
    count = [len(set(zip(table["case"][p], table["z"][p], strict=True))) for p in places]
    ticks = [f"{o.replace('_', ' ')} ({n})" for o, n in zip(organs, count, strict=True)]
    ax.set_yticks(range(len(organs)), ticks)
    ax.set(xlim=(0, 1), ylim=(len(organs) - 0.5, -0.5))
    ax.set_xlabel("share of the attention on tokens that overlap the organ")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    legend = ax.legend(ncols=5, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.2)
    legend.get_lines()[-1].set_markersize(12)
    return figure


def similarity_figure(table: dict, names, theme: Theme) -> Figure:
    """Cosine matrices class x class and class x inter; from `prototype_similarity.csv`."""
    moments = [moment for moment in _MOMENTS if (table["prototypes"] == moment).any()]
    height = 0.26 * len(names)
    figure = new_figure(_WIDE, len(moments) * (height + 0.45) + 1.35, theme)
    colors = [theme.series[0], theme.surface, theme.series[1]]
    cmap = LinearSegmentedColormap.from_list("cosine", colors)
    labels = [name.replace("_", " ") for name in names]
    start, side = _margin(names), min(height, 3.5)
    boxes = {"intra": (start, side), "inter": (start + side + 0.25, _WIDE - start - side - 0.45)}
    for place, moment in enumerate(moments):
        low = 1.15 + (len(moments) - 1 - place) * (height + 0.45)
        for kind, (left, width) in boxes.items():
            own = (table["prototypes"] == moment) & (table["with"] == kind)
            cosine = table["cosine"][own].reshape(len(names), -1)  # written class by class
            ax = figure.add_axes(_inches(figure, left, low, width, height))
            image = ax.imshow(cosine, cmap=cmap, vmin=-1, vmax=1, aspect="auto")
            ticks = range(len(names))
            ax.set_yticks(ticks, labels if kind == "intra" else [])
            ax.tick_params(length=0)
            last = place == len(moments) - 1
            if kind == "intra":
                shown = labels if last else []
                ax.set_xticks(ticks, shown, rotation=60, ha="right", rotation_mode="anchor")
                ax.set_title(f"classes, {_MOMENTS[moment]}")
                if len(cosine) <= 12:
                    _numbers(ax, cosine, theme)
            else:
                ax.set_title(f"inter prototypes, {_MOMENTS[moment]}")
                if not last:
                    ax.set_xticks([])
    bar = figure.add_axes(_inches(figure, _WIDE - 3.2, 0.45, 3.0, 0.12))
    figure.colorbar(image, cax=bar, orientation="horizontal", label="cosine")
    bar.xaxis.set_label_position("top")
    return figure


def _numbers(ax, values, theme: Theme) -> None:
    for k, q in np.ndindex(values.shape):
        strong = abs(values[k, q]) > 0.5
        text = f"{values[k, q]:.2f}".replace("0.", ".")
        style = {"ha": "center", "va": "center", "fontsize": 6.5}
        ax.text(q, k, text, color=theme.surface if strong else theme.text, **style)


def picks_figure(table: dict, names, theme: Theme) -> Figure:
    """Class x inter matrix per stage, columns by first pick; from `prototype_picks.csv`."""
    stages = sorted(set(table["pass"]))
    matrices = [table["picked"][table["pass"] == n].reshape(len(names), -1) for n in stages]
    order = pick_order(matrices)
    height = 0.2 * len(names)
    figure = new_figure(_WIDE, len(stages) * (height + 0.4) + 0.95, theme)
    labels = [name.replace("_", " ") for name in names]
    cmap = LinearSegmentedColormap.from_list("picks", [theme.surface, theme.series[0]])
    for place, (number, matrix) in enumerate(zip(stages, matrices, strict=True)):
        low = 0.85 + (len(stages) - 1 - place) * (height + 0.4)
        left = _margin(names)
        ax = figure.add_axes(_inches(figure, left, low, _WIDE - left - 0.2, height))
        image = ax.imshow(matrix[:, order], cmap=cmap, vmin=0, vmax=1, aspect="auto")
        ax.set_yticks(range(len(names)), labels)
        ax.set_xticks(np.arange(len(order) + 1) - 0.5, [], minor=True)
        ax.set_yticks(np.arange(len(names) + 1) - 0.5, [], minor=True)
        ax.grid(which="minor", linewidth=0.5)
        ax.tick_params(length=0, which="both")
        ax.set_title(f"stage {number:.0f}")
        last = place == len(stages) - 1
        shown = list(map(str, order)) if last else []
        ax.set_xticks(range(len(order)), shown, fontsize=6, rotation=90)
        if last:
            ax.set_xlabel("inter prototype", loc="left")
    bar = figure.add_axes(_inches(figure, _WIDE - 3.2, 0.32, 3.0, 0.12))
    figure.colorbar(image, cax=bar, orientation="horizontal")
    x, y = 1 - 3.35 / _WIDE, 0.38 / figure.get_figheight()
    figure.text(x, y, "share of slices", ha="right", va="center", fontsize=9)
    return figure


def pick_order(matrices) -> list[int]:
    """Order of the inter prototypes by the first class that picks them; unused ones last."""

    def rank(q):
        return [int(m[:, q].argmax()) if m[:, q].any() else len(m) for m in matrices]

    return sorted(range(matrices[0].shape[1]), key=rank)


def mixing_figure(table: dict, theme: Theme) -> Figure:
    """alpha and beta of PPR per stage and their initial value; from `prototype_mixing.csv`."""
    stages = table["pass"]
    figure = new_figure(_WIDE / 2, 0.9 + 0.42 * len(stages), theme)
    ax = figure.add_axes(_inches(figure, 0.8, 0.5, _WIDE / 2 - 1.15, 0.42 * len(stages)))
    start = table["start"][0]
    ax.axvline(start, color=theme.muted, linewidth=1, linestyle="--", label="initial value")
    symbols = {"alpha": "alpha (class)", "beta": "beta (query)"}
    for place, (key, label) in enumerate(symbols.items()):
        color = theme.series[place]
        ax.plot(table[key], stages, "os"[place], color=color, markersize=8, label=label)
    ax.set_yticks(stages, [f"stage {n:.0f}" for n in stages])
    values = [*table["alpha"], *table["beta"]]
    ax.set_xlim(min(0, *values), max(2 * start, *values))
    ax.set_ylim(stages[-1] + 0.5, stages[0] - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3)
    return figure


def _margin(names) -> float:
    """Inches for the longest class name."""
    return 0.15 + 0.08 * max(map(len, names))


def _inches(figure, left, bottom, width, height) -> tuple[float, float, float, float]:
    wide, high = figure.get_size_inches()
    return left / wide, bottom / high, width / wide, height / high
