"""Tables of cost: the rows of a study side by side, or one run in detail."""

import math
import statistics

from pgpsam_jax.results.runs import Run
from pgpsam_jax.results.tables.study import Study
from pgpsam_jax.results.tables.text import NONE, Table, class_mean, percent

# Key of `quantities` -> (head of its column, significant digits).
COLUMNS = {
    "trained_millions": ("trainable (M)", 4),
    "parameters_millions": ("parameters (M)", 4),
    "forward_gflop": ("forward pass (GFLOP)", 4),
    "training_gflop": ("training step (GFLOP)", 4),
    "step_seconds": ("s per step", 3),
    "step_mib": ("step memory (MiB)", 3),
    "evaluation_seconds": ("evaluation (s per volume)", 3),
}
_TITLE = "parameters, operations, time and memory"
_FLOPS = (
    "GFLOP: 1e9 operations per image, counted by XLA before optimization (a multiply-add is two); "
    "forward pass: slice to logits; training step: augmentation, forward pass, backward pass and "
    "update"
)
_TIME = (
    "median over the logged intervals of a run, excluding compilation, checkpointing and validation"
)
_EVALUATION = (
    "Evaluation: wall-clock time from reading a volume to its scores and overlays, including "
    "compilation"
)


TRAINING, FIT, NO_STEP = "training", "fit", "none"  # kinds of steps in `cost.json`
# Why numbers of a training step are missing.
_MISSING_REASON = {
    FIT: "Fitted in one step, on all slices of the few-shot list at once; its operations depend "
    "on the number of iterations and are not counted",
    NO_STEP: "No trainable parameters, hence no training step",
}


def quantities(run: Run) -> dict[str, float | None]:
    """{key of `COLUMNS`: value} of a run with a cost record; None if unknown."""
    counts, flops = run.cost["parameters"], run.cost["flops_per_image"]
    volumes = len({row["case"] for row in run.cases})
    evaluating = run.timing.get("evaluate")
    return {
        "trained_millions": counts["trained"] / 1e6,
        "parameters_millions": (counts["trained"] + counts["frozen"]) / 1e6,
        "forward_gflop": _giga(flops["forward"]),
        "training_gflop": _giga(flops["training"]),
        "step_seconds": run.cost.get("step_seconds", {}).get("median"),
        "step_mib": _step_mib(run),
        "evaluation_seconds": evaluating / volumes if evaluating and volumes else None,
    }


def study_cost(study: Study) -> list[Table]:
    """Table with a line per row, median over its seeds; none if no run has a cost record."""
    recorded = [[run for run in line.runs.values() if run.cost] for line in study.lines]
    if not any(recorded):
        return []
    by_label = [(line.label, runs) for line, runs in zip(study.lines, recorded, strict=True)]
    rows = []
    for line, runs in zip(study.lines, recorded, strict=True):
        known = [quantities(run) for run in runs]
        dice = class_mean(line.scores("strict", "dice"), percent)
        cells = [_over_seeds([one[key] for one in known], COLUMNS[key][1]) for key in COLUMNS]
        rows.append([line.label, f"{len(runs)}/{line.planned}", dice, *cells])
    notes = [
        "Dice: class mean (`strict`), ± SD over seeds. Parameters in millions: trainable, and "
        f"trainable plus frozen. {_FLOPS}.",
        f"s per step: {_TIME}. Step memory: arguments, outputs and temporaries of a training step "
        f"per device, as planned by the compiler. {_EVALUATION}.",
        "With several seeds: median, and (smallest to largest) where they differ; seeds: with a "
        "cost record/planned.",
        *_dash_notes(by_label),
        *_setting_notes(by_label),
    ]
    head = ["row", "seeds", "Dice (%)", *(head for head, _ in COLUMNS.values())]
    return [Table(f"{study.title}: {_TITLE}", head, rows, notes)]


def run_cost(run: Run) -> list[Table]:
    """Table of one run with a line per quantity; none if it has no cost record."""
    if not run.cost:
        return []
    known = quantities(run)
    each = {key: significant(known[key], digits) for key, (_, digits) in COLUMNS.items()}
    counts, parts, kind = run.cost["parameters"], run.cost["step_bytes"], _kind(run)
    step = "the fit" if kind == FIT else "a step"
    rows = [
        ["trainable parameters", f"{counts['trained']:,}"],
        ["all parameters", f"{counts['trained'] + counts['frozen']:,}"],
    ]
    for key, what in (("forward_gflop", "forward pass"), ("training_gflop", "training step")):
        if known[key] is not None:
            rows.append([f"{what}, per image", f"{each[key]} GFLOP"])
    if time := run.cost.get("step_seconds"):
        low, high = map(significant, time["quartiles"])
        rows.append([f"time of {step}", f"{each['step_seconds']} s"])
        if kind != FIT:  # a fit is a single interval
            rows.append([f"quartiles over {time['intervals']} intervals", f"{low} to {high} s"])
        rows.append(["images per s", significant(run.cost["batch_size"] / time["median"])])
    if parts:
        rows += [
            [f"memory of {step}, per device", f"{each['step_mib']} MiB"],
            ["arguments, per device", _mib(parts["arguments"])],
            ["temporaries, per device", _mib(parts["temporaries"])],
        ]
    peaks = run.cost.get("peak_bytes", {})
    for key, what in (("process", "the process"), ("device", "a device")):
        if peaks.get(key):
            rows.append([f"peak memory of {what}", _mib(peaks[key])])
    if known["evaluation_seconds"]:
        rows.append(["evaluation, per volume", f"{each['evaluation_seconds']} s"])
    notes = [f"Measured on {_setting(run)}.", f"{_FLOPS}, divided by the batch size."]
    notes += [f"{_MISSING_REASON[kind]}."] if kind in _MISSING_REASON else []
    if kind == NO_STEP:
        notes += [f"{_EVALUATION}; peaks: measured over the whole evaluation."]
    else:
        notes += [
            f"Time of {step}: {_TIME}. {_EVALUATION}.",
            f"Memory of {step}: as planned by the compiler, outputs that reuse argument buffers "
            "counted once; peaks: measured during training, including compilation.",
        ]
    return [Table(f"{run.config.name}: {_TITLE}", ["quantity", "value"], rows, notes)]


def significant(value: float | None, digits: int = 3) -> str:
    """Formats a number to significant digits without an exponent; `NONE` for None."""
    if value is None:
        return NONE
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:,.{max(0, places)}f}"


def _over_seeds(values, digits: int) -> str:
    values = sorted(value for value in values if value is not None)
    if not values:
        return NONE
    low, high = significant(values[0], digits), significant(values[-1], digits)
    middle = significant(statistics.median(values), digits)
    return middle if low == high else f"{middle} ({low} to {high})"


def _setting(run: Run) -> str:
    cost, devices = run.cost, run.cost["devices"]
    setting = (
        f"{devices['count']} x {devices['kind']}, {cost['compute_dtype']}, {cost['image_size']} px"
    )
    return setting + (f", batch {cost['batch_size']}" if _kind(run) == TRAINING else "")


def _kind(run: Run) -> str:
    return run.cost.get("kind", TRAINING)  # older runs have no kind


def _dash_notes(by_label) -> list[str]:
    """Notes on rows without numbers of a training step, with the reason."""
    notes = []
    for kind, why in _MISSING_REASON.items():
        names = [label for label, runs in by_label if kind in map(_kind, runs)]
        notes += [f"{', '.join(names)}: {why[0].lower()}{why[1:]}."] if names else []
    absent = [label for label, runs in by_label if not runs]
    return notes + ([f"No cost record yet: {', '.join(absent)}."] if absent else [])


def _setting_notes(by_label) -> list[str]:
    """Note on the devices and settings of the measurements; a warning if they differ."""
    settings: dict[str, dict] = {}
    for label, runs in by_label:
        for run in runs:
            settings.setdefault(_setting(run), {})[label] = None
    for setting in [one for one in settings if any(o.startswith(f"{one}, ") for o in settings)]:
        del settings[setting]  # the same but without a training step
    if len(settings) == 1:
        return [f"Measured on {next(iter(settings))}."]
    listed = "; ".join(f"{setting}: {', '.join(names)}" for setting, names in settings.items())
    return [f"Warning: times and memory were measured in different settings ({listed})."]


def _step_mib(run: Run) -> float | None:
    if not (parts := run.cost["step_bytes"]):
        return None
    held = parts["arguments"] + parts["outputs"] + parts["temporaries"] - parts["aliased"]
    return held / 2**20


def _giga(flops: float | None) -> float | None:
    return None if flops is None else flops / 1e9


def _mib(count: int) -> str:
    return f"{significant(count / 2**20)} MiB"
