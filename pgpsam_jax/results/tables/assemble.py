"""Tables of a run or an experiment grid: Dice, comparisons with a reference row, distances.

Dice and NSD in %, HD95 in mm (`strict`) or voxels (`transunet`). "-": no result yet; "n/a": the
number is undefined.
"""

from pgpsam_jax.metrics.aggregate import INTERVAL, defined_mean, grouped_note, spread
from pgpsam_jax.metrics.protocols import METRICS
from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.results.runs import Run
from pgpsam_jax.results.tables import published
from pgpsam_jax.results.tables.comparison import comparison_table, organ_table
from pgpsam_jax.results.tables.cost_table import run_cost, study_cost
from pgpsam_jax.results.tables.statistics import data_notes, group_notes, sample_notes
from pgpsam_jax.results.tables.study import Line, Study, nsd_tolerance
from pgpsam_jax.results.tables.text import (
    NONE,
    Table,
    class_mean,
    display_name,
    interval,
    number,
    percent,
    plus_minus,
)

RULES = {
    "strict": "an organ absent from both truth and prediction is excluded, one absent from either "
    "has Dice 0 and no HD95",
    "transunet": "the rule of the published tables: an organ absent from both or from the "
    "prediction has Dice 0 and HD95 0, one absent only from the truth has Dice 1 and HD95 0",
    "release": "the authors' scores on valid slices only (those with enough pixels of an organ); "
    "absent organs as in `strict`; per volume: case mean = its Dice, class mean = its mcDice",
}
MEANS = (
    "Class mean: each organ averaged over cases, then averaged over organs; case mean: each case "
    "averaged over organs, then averaged over cases"
)


def run_tables(run: Run) -> list[Table]:
    """Tables of one run: one per protocol with a row per organ, and its cost."""
    return [_run_table(run, protocol) for protocol in _protocols(run.cases)] + run_cost(run)


def study_tables(of: Study) -> list[Table]:
    """Tables of Dice per protocol, comparisons, distances, cost, and the paper's values.

    Comparisons need a second row, per-organ ones also scores, and cost a cost record.
    """
    scored = [row for line in of.lines for rows in line.cases.values() for row in rows]
    organs = list(dict.fromkeys(row["class"] for row in scored))
    tables = [_dice_table(of, protocol, organs) for protocol in _protocols(scored)]
    tables[0].notes.extend(of.notes)
    if len(of.lines) > 1:
        tables.append(comparison_table(of))
        tables += [organ_table(of, organs)] if organs else []
    tables.append(_distance_table(of))
    tables += study_cost(of)
    return tables + ([_published_table(of.published)] if of.published else [])


def _protocols(rows) -> list[str]:
    """The protocols in rows of `cases.csv`; all protocols if there are no rows."""
    written = {row["protocol"] for row in rows} or METRICS.keys()
    return [protocol for protocol in METRICS if protocol in written]


def _dice_table(of: Study, protocol, organs) -> Table:
    head = ["row", "seeds", "n", *map(display_name, organs)]
    head += ["class mean", "case mean", "95 % CI of case mean"]
    rows = [_dice_cells(line, protocol, organs) for line in of.lines]
    notes = [
        f"Dice in %. `{protocol}`: {RULES[protocol]}.",
        f"{MEANS}; all averaged over seeds, ±: sample SD over seeds; seeds: finished/planned.",
        f"CI: {INTERVAL}, with each case's score averaged over seeds.",
    ]
    if protocol == "release":
        head += ["slice Dice", "slice mcDice"]
        rows = [row + _slice_cells(line) for row, line in zip(rows, of.lines, strict=True)]
        notes.append("Slice Dice, slice mcDice: the same per slice instead of per volume.")
    if of.published:
        head.append("paper")
        for row, line in zip(rows, of.lines, strict=True):
            printed = published.find(of.published, line.config)
            row.append(NONE if printed is None else f"{printed.mean:.2f}")
        notes += published.notes(of.published)[:1] + _other_data(of.lines, of.published)
    lines = {line.label: line.cases for line in of.lines if line.runs}
    found = [one for line in of.lines if (one := line.scores(protocol, "dice")) is not None]
    if sum(len(one.seeds) for one in found) < sum(map(len, lines.values())):
        notes.append(
            "Warning: some runs were evaluated before this protocol was added and have no scores "
            "for it; evaluate them again with --mode evaluate."
        )
    counts = [len(set(one.units)) for one in found], [len(one.seeds) for one in found]
    notes += group_notes(found) + sample_notes(*counts) + data_notes(lines)
    return Table(f"{of.title}: Dice (`{protocol}`)", head, rows, notes)


def _dice_cells(line: Line, protocol, organs) -> list[str]:
    scores = line.scores(protocol, "dice")
    start = [line.label, f"{0 if scores is None else len(scores.seeds)}/{line.planned}"]
    if scores is None:
        return start + [NONE] * (len(organs) + 4)
    means = dict(zip(scores.organs, scores.organ_means(), strict=True))
    cells = [percent(means[organ]) if organ in means else NONE for organ in organs]
    cells += [plus_minus(*scores.over_seeds(kind), percent) for kind in ("class", "case")]
    ends = spread(scores.unit_scores())[1]
    return [*start, str(len(set(scores.units))), *cells, interval(ends, percent)]


def _slice_cells(line: Line) -> list[str]:
    """Cells of the slice scores of `release` from the summaries of the runs, over seeds."""
    parts = [run.summary.get("release", {}) for run in line.runs.values()]
    cells = []
    for key in ("slice_dice", "slice_mcdice"):
        found = [part[key] for part in parts if part.get(key) is not None]
        mean = float(defined_mean(found))
        cells.append(plus_minus(mean, spread(found)[0], percent) if found else NONE)
    return cells


def _other_data(lines, key: str) -> list[str]:
    """Warning if the runs are known to use other data than the paper's table `key`."""
    if "phantom" in {line.config.get("data", {}).get("layout") for line in lines}:
        data = published.published_table(key).data
        return [f"Warning: these runs use phantoms, the paper {data}: not comparable."]
    return []


def _distance_table(of: Study) -> Table:
    tolerances = {
        line.label: {nsd_tolerance(run) for run in line.runs.values()} for line in of.lines
    }
    known = set().union(*tolerances.values())
    at = f" at {min(known):g} mm" if len(known) == 1 else ""
    head = ["row", "seeds", "n", "HD95 (mm)", f"NSD{at} (%)", "missed", "hallucinated", "absent"]
    head.append("HD95 (transunet, voxels)")
    rows = [_distance_cells(line, tolerances[line.label]) for line in of.lines]
    notes = [
        "Class means (± SD over seeds), `strict` unless another protocol is named. HD95 excludes "
        "missed and hallucinated organs, so read it with their counts (sums over seeds, cases and "
        "organs); absent: from both truth and prediction."
    ]
    if len(known) > 1:
        listed = "; ".join(
            f"{label} {', '.join(f'{value:g}' for value in sorted(values))}"
            for label, values in tolerances.items()
            if values
        )
        notes.append(
            f"Warning: NSD was computed with different tolerances (mm: {listed}); rows are not "
            "comparable in it, and rows whose seeds differ have none."
        )
    return Table(f"{of.title}: distances and failures", head, rows, notes)


def _distance_cells(line: Line, tolerances) -> list[str]:
    start = [line.label, f"{len(line.runs)}/{line.planned}"]
    strict = line.scores("strict", "hd95")
    if strict is None:
        return start + [NONE] * 7
    statuses = [
        row["status"]
        for rows in line.cases.values()
        for row in rows
        if (row["protocol"], row["metric"]) == ("strict", "dice")
    ]
    cells = [str(len(set(strict.units))), class_mean(strict)]
    cells.append(
        class_mean(line.scores("strict", "nsd"), percent) if len(tolerances) == 1 else NONE
    )
    cells += [str(statuses.count(kind)) for kind in ("missed", "hallucinated", "both_empty")]
    return [*start, *cells, class_mean(line.scores("transunet", "hd95"))]


def _published_table(key: str) -> Table:
    table = published.published_table(key)
    head = ["method", *map(display_name, table.organs), "printed mean"]
    head += ["mean of organs", "difference"] if table.organs else []
    rows = []
    for row in table.rows.values():
        cells = [row.method, *(f"{value:.2f}" for value in row.organs), f"{row.mean:.2f}"]
        if table.organs:
            cells += [f"{row.computed:.2f}", f"{row.mean - row.computed:+.2f}"]
        rows.append(cells)
    title = f"The paper's Table {table.number} as printed: {table.caption}, Dice (%)"
    return Table(title, head, rows, published.notes(key))


def _run_table(run: Run, protocol) -> Table:
    recorded = run.summary.get(protocol, {})
    head = ["organ", "n", "Dice (%)", "SD", "95 % CI"]
    head += {
        "strict": ["HD95 (mm)", f"NSD at {nsd_tolerance(run):g} mm (%)"],
        "transunet": ["HD95 (voxels)"],
        "release": ["slice Dice (%)"],
    }[protocol]
    head += ["missed", "hallucinated", "absent"]
    title = f"{run.config.name}: per organ, `{protocol}`"
    labels = [*map(display_name, run.names[1:]), "class mean", "case mean"]
    if not run.cases:
        rows = [[label] + [NONE] * (len(head) - 1) for label in labels]
        return Table(title, head, rows, [run.unscored])
    summary = summarize(run.cases, groups=run.groups)
    part, n = summary[protocol], summary["n_cases"]
    organs = recorded.get("per_class", {})  # includes slice scores
    rows = [
        _organ_cells(display_name(organ), organs.get(organ, {}) | entry, protocol)
        for organ, entry in part["per_class"].items()
    ]
    for kind, of_slices in (("class", "slice_mcdice"), ("case", "slice_dice")):
        entry = {metric: part[f"{metric}_{kind}_mean"] for metric in METRICS[protocol]} | {"n": n}
        entry |= {key: part.get(f"dice_{kind}_{key[5:]}", "") for key in ("dice_sd", "dice_ci95")}
        entry["slice_dice"] = recorded.get(of_slices)
        rows.append(_organ_cells(f"{kind} mean", entry, protocol))
    notes = [
        f"`{protocol}`: {RULES[protocol]}. n: cases in which Dice is defined; SD over cases.",
        f"{MEANS}. CI: {INTERVAL}.",
        *([f"{grouped_note(summary['n_groups'])}."] if run.groups else []),
        *sample_notes([summary.get("n_groups", n)], []),
    ]
    return Table(title, head, rows, notes + [f"Note: {notice}" for notice in run.notices])


def _organ_cells(label: str, entry: dict, protocol) -> list[str]:
    """Cells of a run's table; counts of means and the spread of the class mean are left blank."""
    sd, ends = entry["dice_sd"], entry["dice_ci95"]
    cells = [label, str(entry["n"]), percent(entry["dice"])]
    cells += ["" if sd == "" else percent(sd), "" if ends == "" else interval(ends, percent)]
    cells += [number(entry["hd95"])] if "hd95" in entry else []
    cells += [percent(entry["nsd"])] if "nsd" in entry else []
    cells += [percent(entry.get("slice_dice"))] if protocol == "release" else []
    counts = [entry.get(f"n_{kind}", "") for kind in ("missed", "hallucinated", "both_empty")]
    return cells + [str(count) for count in counts]
