"""A grid folder as `experiments/run_grid.py` leaves it, with scores made up by a rule."""

import csv
import json
import zlib

import numpy as np

from pgpsam_jax.config import defaults, serialization
from pgpsam_jax.metrics.protocols import COLUMNS, METRICS
from pgpsam_jax.metrics.summary import write_evaluation
from pgpsam_jax.results.grid import DONE, PLAN, STATE
from pgpsam_jax.results.tables.assemble import study_tables
from pgpsam_jax.results.tables.study import from_grid

ORGANS = ("liver", "spleen")
CASES = tuple(f"{number:04d}" for number in range(1, 13))
NAN = float("nan")


def case_rows(dice, organs=ORGANS, truth=None):
    """Rows of `cases.csv` from {case: one Dice per organ}; None = absent from truth and prediction.

    A Dice of 0 counts as missed. HD95 is 20 (1 - Dice) mm and half of it in voxels, NSD is the
    square of Dice. truth: {case: voxels of every organ}, 1000 where it is not given, half of them
    in valid slices.
    """
    rows = []
    for case, scores in dice.items():
        for class_id, (organ, score) in enumerate(zip(organs, scores, strict=True), start=1):
            status, values = _outcome(score)
            voxels = 0 if score is None else (truth or {}).get(case, 1000)
            for protocol, metrics in METRICS.items():
                voxels -= voxels // 2 if protocol == "release" else 0
                for metric in metrics:
                    entries = (case, class_id, organ, protocol, metric, values[protocol][metric])
                    counts = (voxels, 0 if status != "ok" else voxels, status)
                    rows.append(dict(zip(COLUMNS, entries + counts, strict=True)))
    return rows


def slice_rows(dice, organs=ORGANS):
    """Rows of `slices.csv`: one slice per case, with half of the Dice of `case_rows`."""
    return [
        {"case": case, "slice": 7, "class": organ, "dice": NAN if score is None else score / 2}
        for case, scores in dice.items()
        for organ, score in zip(organs, scores, strict=True)
    ]


def _outcome(score):
    if score is None:
        strict, transunet = {"dice": NAN, "hd95": NAN, "nsd": NAN}, {"dice": 0.0, "hd95": 0.0}
        status, score = "both_empty", NAN
    elif score == 0:
        strict, transunet = {"dice": 0.0, "hd95": NAN, "nsd": 0.0}, {"dice": 0.0, "hd95": 0.0}
        status = "missed"
    else:
        away, status = 20 * (1 - score), "ok"
        strict = {"dice": score, "hd95": away, "nsd": score**2}
        transunet = {"dice": score, "hd95": away / 2}
    return status, {"strict": strict, "transunet": transunet, "release": {"dice": score}}


def made_up(row, seed, cases=CASES, organs=ORGANS, level=0.8):
    """{case: Dice of every organ} around `level`, the same in every process."""
    rng = np.random.default_rng(zlib.crc32(f"{row}/{seed}".encode()))
    difficulty = np.random.default_rng(7).normal(0, 0.05, (len(cases), len(organs)))
    scores = level + difficulty + rng.normal(0, 0.01, difficulty.shape)
    return dict(zip(cases, np.clip(scores, 0.01, 1).tolist(), strict=True))


def cost_record(gflop=0.5, seconds=0.2, mib=250, **changes):
    """A `cost.json`: GFLOP of the forward pass (a third of the step's), median time, step memory.

    Of the memory 10 MiB are arguments, and as many outputs take their place.
    """
    parts = {"arguments": 10, "outputs": 10, "temporaries": mib - 10, "aliased": 10}
    return {
        "devices": {"count": 1, "kind": "cpu", "platform": "cpu"},
        "compute_dtype": "float32",
        "image_size": 128,
        "batch_size": 4,
        "parameters": {"trained": 950_000, "frozen": 50_000},
        "flops_per_image": {"forward": gflop * 1e9, "training": 3e9 * gflop},
        "step_bytes": {name: count * 2**20 for name, count in parts.items()},
        "timed_from": 0,
        "peak_bytes": {"process": 3 * 2**30, "device": None},
        "step_seconds": {
            "median": seconds,
            "quartiles": [0.9 * seconds, 1.25 * seconds],
            "intervals": 70,
        },
    } | changes


def write_run(folder, dice, organs=ORGANS, *, tolerance=2.0, truth=None, cost=None, **settings):
    """A finished run with these scores; settings of the config as `model__k=2`, `seed=1`.

    Returns the folder. `dice` None: trained, but not evaluated. cost: content of `cost.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    serialization.save_config(_config(settings), folder)
    names = ["background", *organs]
    classes = [{"name": name, "source": [place]} for place, name in enumerate(organs, start=1)]
    (folder / "labels.json").write_text(json.dumps({"classes": classes, "other": "error"}))
    (folder / "provenance.json").write_text(json.dumps({"git": "0" * 40, "devices": ["cpu:cpu"]}))
    (folder / "timing.json").write_text(json.dumps({"train": 12.5, "evaluate": 3.0}))
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(cost))
    (folder / "fewshot.txt").write_text("# rule: {}\n# hash: 0123abcd\n0001\t5\n")
    records = [{"step": step, "loss": 1 / step, "epoch": 0} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    if dice is not None:
        rows = case_rows(dice, organs, truth)
        meta, slices = {"nsd_tolerance_mm": tolerance}, slice_rows(dice, organs)
        write_evaluation(rows, folder / "evaluation", names, meta, slices)
    return folder


def write_grid(
    root, rows, seeds=(0, 1, 2), *, organs=ORGANS, states=None, scores=None, costs=None, **plan
):
    """A grid folder; returns its path.

    rows: {row name: overrides}, e.g. `{"full": {}, "no_cfm": {"model.cfm": False}}`; the first is
    the reference. scores: `scores(row, seed)` -> {case: Dice of every organ}, `made_up` by default.
    costs: `costs(row, seed)` -> content of `cost.json` or None, none by default.
    states: {(row, seed): state} of the cells that are not done. plan: fields of `grid.json` to
    replace (`published="table3"`, `labels={row name: label}`, `values={row name: 0.1}`, ...).
    """
    scores, states = scores or made_up, states or {}
    costs = costs or (lambda row, seed: None)
    labels, values = plan.pop("labels", {}), plan.pop("values", {})
    cells = []
    for row, overrides in rows.items():
        for seed in seeds:
            settings = {key.replace(".", "__"): value for key, value in overrides.items()}
            settings |= {"seed": seed, "name": row}
            config = serialization.to_json(_config(settings))
            cell = {"name": f"{row}-seed{seed}", "row": row, "seed": seed, "config": config}
            cells.append(cell | {"folder": f"{row}-seed{seed}-0123abcd"})
            state = states.get((row, seed), DONE)
            if state == DONE:
                results = {"dice": scores(row, seed), "cost": costs(row, seed)}
                write_run(root / cells[-1]["folder"], organs=organs, **results, **settings)
            if state != "pending":
                (root / cells[-1]["folder"]).mkdir(parents=True, exist_ok=True)
                (root / cells[-1]["folder"] / STATE).write_text(json.dumps({"state": state}))
    entries = [
        {"name": name, "label": labels.get(name, name), "overrides": overrides}
        | ({"value": values[name]} if name in values else {})
        for name, overrides in rows.items()
    ]
    content = {"name": "study", "title": "A study", "variant": "phantom", "notes": []}
    content |= {"rows": entries, "cells": cells, "reference": next(iter(rows))}
    content |= {"published": None, "axis": None, "code": {"revision": None, "fingerprint": "f"}}
    root.mkdir(parents=True, exist_ok=True)
    (root / PLAN).write_text(json.dumps(content | plan))
    return root


def grid_tables(grid):
    """All tables of an experiment grid, finished or not."""
    return study_tables(from_grid(grid))


def read_csv(text):
    """Lines of a CSV text as dictionaries."""
    return list(csv.DictReader(text.splitlines()))


def _config(settings):
    config = defaults.default_config()
    config.data.layout = "phantom"
    config.model.encoder = "vit_t"
    for name, value in settings.items():
        *sections, field = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[field] = value
    return config
