"""The evaluation summary as Markdown, `summary.md`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pgpsam_jax.metrics.aggregate import INTERVAL, SMALL, SMALL_SAMPLE
from pgpsam_jax.metrics.protocols import DEFINITIONS, METRICS
from pgpsam_jax.utils.markdown import escape_cell, pipe_table


def format_markdown(summary: Mapping[str, Any]) -> str:
    """Formats the summary as Markdown: notices, tables (one row per organ), definitions."""
    strict, transunet = summary["strict"], summary["transunet"]
    tolerance = summary.get("nsd_tolerance_mm")
    at = "" if tolerance is None else f" at {tolerance:g} mm"
    head = ["organ", "n", "Dice", "SD", "95 % CI", "HD95 (mm)", f"NSD{at}", "missed"]
    head += ["hallucinated", "absent", "Dice (transunet)", "HD95 (transunet, voxels)"]
    lines = [f"# Evaluation of {summary['n_cases']} case(s)", ""]
    for notice in summary.get("notices", ()):
        lines += [f"> **Note:** {' '.join(str(notice).split())}", ""]
    rows = [head]
    for name, entry in strict["per_class"].items():
        counts = [entry[f"n_{kind}"] for kind in ("missed", "hallucinated", "both_empty")]
        label, other = escape_cell(name), transunet["per_class"][name]
        rows.append(_table_row(label, entry["n"], entry, "dice", counts, other))
    for kind in ("class", "case"):
        means, others = (
            {metric: part[f"{metric}_{kind}_mean"] for metric in METRICS[protocol]}
            for protocol, part in (("strict", strict), ("transunet", transunet))
        )
        label = f"**{kind} mean**"
        rows.append(
            _table_row(label, summary["n_cases"], strict | means, f"dice_{kind}", [""] * 3, others)
        )
    lines += pipe_table(rows)
    if "slice_dice" in summary.get("release", {}):
        lines += ["", *_release_table(summary)]
    return "\n".join([*lines, "", *_explanations(summary)]) + "\n"


def _release_table(summary: Mapping[str, Any]) -> list[str]:
    """Formats both modes of `release`; its "Dice" and "mcDice" are our case and class means."""
    release, n = summary["release"], summary["n_cases"]
    head = ["organ (`release`)", "n volumes", "Dice of volumes", "n slices", "Dice of slices"]
    keys = "n", "dice", "n_slices", "slice_dice"
    rows = [
        [escape_cell(name), *(entry[key] for key in keys)]
        for name, entry in release["per_class"].items()
    ]
    of_slices = release["n_slices"], release["slice_mcdice"], release["slice_dice"]
    rows.append(["**mcDice**", n, release["dice_class_mean"], *of_slices[:2]])
    rows.append(["**Dice**", n, release["dice_case_mean"], *of_slices[::2]])
    cells = [[*row[:2], _number(row[2]), row[3], _number(row[4])] for row in rows]
    return pipe_table([[str(cell) for cell in row] for row in [head, *cells]])


def _table_row(
    label: str,
    n: int,
    strict: Mapping[str, Any],
    spread: str,
    counts: Sequence[object],
    transunet: Mapping[str, Any],
) -> list[str]:
    """Formats a table row; `spread` is the key prefix of SD and interval, blank if missing."""
    sd, ends = (strict.get(f"{spread}_{part}", "") for part in ("sd", "ci95"))
    cells = [label, n, _number(strict["dice"]), _number(sd), _interval(ends)]
    cells += [_number(strict["hd95"], 2), _number(strict["nsd"]), *counts]
    cells += [_number(transunet["dice"]), _number(transunet["hd95"], 2)]
    return [str(cell) for cell in cells]


def _explanations(summary: Mapping[str, Any]) -> list[str]:
    definitions = summary.get("definitions", DEFINITIONS)
    lines = [
        "- Columns without a protocol are `strict`; n is the number of cases with a defined Dice; "
        "HD95 averages over cases with the organ in both truth and prediction.",
        "- Class mean: mean over organs of their mean over cases. Case mean: mean over cases of "
        "the mean over the organs defined in the case.",
        f"- Interval: {summary.get('interval', INTERVAL)}.",
    ]
    if "valid_min_pixels" in summary:
        least = summary["valid_min_pixels"]
        lines.append(f"- A slice is valid if some organ has at least {least} pixels in it.")
    if summary.get("n_groups", summary["n_cases"]) < SMALL:
        lines.append(f"- {SMALL_SAMPLE}.")
    return lines + [f"- `{name}`: {text}." for name, text in definitions.items()]


def _number(value: Any, digits: int = 3) -> str:
    """Formats a number; None as n/a, and "" (not applicable) stays blank."""
    return value if value == "" else "n/a" if value is None else f"{value:.{digits}f}"


def _interval(ends: Any) -> str:
    return " to ".join(_number(end) for end in ends) if ends else _number(ends)
