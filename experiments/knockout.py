"""Measures the Dice that a trained model loses when one of its parts is switched off at test time.

Editing weights silences a part (a mixing scalar or the last layer of a prompt path set to zero,
gates closed); then all test cases are segmented again. The drop says how much the trained model
*relies* on the part; `table3` measures training without it.

Examples:
  python -m experiments.knockout runs/phantom --output knockout.csv
  python -m experiments.knockout runs/table3 --only ppr
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pgpsam_jax.checkpointing import locations
from pgpsam_jax.config import load_config
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import read_case
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.methods.registry import method_of
from pgpsam_jax.metrics import surface
from pgpsam_jax.metrics.aggregate import defined_mean
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.results.grid import is_grid, read_grid
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.files import csv_text, write_text
from pgpsam_jax.utils.markdown import pipe_table

_LORA = {"LoRA of the encoder": {r"image_encoder/(blocks|stages/\d+)/\d+/attn/lora/b": 0.0}}

# Part -> {pattern of parameter paths: value}. A gate is a sigmoid: a large negative bias closes it.
# A silent dense prompt is its last bias, initialized as SAM's no-mask embedding.
_PGPSAM = {
    "CFM gates (Eq 1-2)": {
        r"cfm/\d+/(spatial/column|channel/expand)/kernel": 0.0,
        r"cfm/\d+/(spatial/column|channel/expand)/bias": -1e4,
    },
    "dense prompts (Eq 6)": {r"(ppg/\d+|pre_prompt/ppg)/dense/mlp/lin2/kernel": 0.0},
    "sparse prompts (Eq 7)": {r"(ppg/\d+|pre_prompt/ppg)/sparse/mlp/lin2/(kernel|bias)": 0.0},
    "PPR (Eq 5)": {r"ppr/\d+/(alpha|beta)": 0.0},
    "class attention W_c (Eq 4)": {r"ppr/\d+/alpha": 0.0},
    "query attention W_q (Eq 5)": {r"ppr/\d+/beta": 0.0},
    "fine maps (plus)": {r"refine/\d+/project_out/(kernel|bias)": 0.0},
    "context gates (release)": {r"cfm/\d+/(alpha|beta)": 0.0},
    "update by attention (release)": {r"ppr/\d+/(inter|intra)_gain": 0.0},
    "skip connection (release)": {r"mask_decoder/skip/norm2/(scale|bias)": 0.0},
    "class maps (release)": {r"mask_decoder/class_maps/attention/out_proj/(kernel|bias)": 0.0},
}
# By `config.model.name`. The other methods have no optional part.
PARTS = {
    "pgpsam": _PGPSAM | _LORA,
    "samed": _LORA,
    "hsam": _LORA | {"second decoder": {r"second/hyper_mlps/layers/4/(kernel|bias)": 0.0}},
    "samlst": {"CNN": {"gate": 1e4}, "features of SAM": {"gate": -1e4}},
    "surgicalsam": {
        "dense prompts": {r"prompter/dense2/kernel": 0.0},
        "sparse prompts": {r"prompter/sparse2/(kernel|bias)": 0.0},
    },
}
COLUMNS = ("run", "part", "case", "class", "dice")
WHOLE = "nothing"


def parts_of(config: ConfigDict, workdir) -> dict:
    """Returns the parts of a run's method; raises `UserError` if it has none."""
    if config.model.name not in PARTS:
        raise UserError(
            f"{workdir} is a run of {method_of(config.model).label}, which has no part to switch "
            f"off; give a run of {', '.join(PARTS)} (of a grid by --only ROW)"
        )
    return PARTS[config.model.name]


def silenced(params, edits: dict):
    """Returns the parameters with the leaves of `edits` set; None if a pattern matches none."""
    copy = jax.tree.map(lambda leaf: leaf, params)
    found = set()
    for path, leaf in flat_paths(copy).items():
        for pattern, value in edits.items():
            if re.fullmatch(pattern, path):
                leaf.set_value(jnp.full_like(leaf[...], value))
                found.add(pattern)
    return copy if found == set(edits) else None


def knock_out(workdir) -> list[dict]:
    """Returns rows of `COLUMNS` for a run: every part, test case and class."""
    run = load_run(workdir)
    split = dataset.find_split(locations.resolve_paths(run.config, workdir).data)
    predictors = {WHOLE: run.predictor}
    for part, edits in parts_of(run.config, workdir).items():
        params = silenced(run.predictor.params, edits)
        if params is not None:
            predictors[part] = run.predictor.with_params(params)
    rows = []
    for case in tqdm(split.test, desc=Path(workdir).name, unit="case"):
        volume, truth = read_case(case, split.table, run.config.data.axis)
        for part, predictor in predictors.items():
            prediction = predictor(volume)
            start = {"run": Path(workdir).name, "part": part, "case": case.case_id}
            for k, name in enumerate(split.table.names[1:], 1):
                dice = surface.dice(prediction == k, truth == k)
                rows.append(start | {"class": name, "dice": dice})
    return rows


def summary(rows) -> str:
    """Returns a Markdown table: mean Dice (class mean, %) and its change with each part off."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    table = [["switched off", "runs", "Dice (%)", "change", "smallest to largest change"]]
    whole = {run: _class_mean(rows, run, WHOLE) for run in runs}
    for part in parts:
        means = {run: _class_mean(rows, run, part) for run in runs}
        means = {run: mean for run, mean in means.items() if not np.isnan(mean)}
        change = [100 * (mean - whole[run]) for run, mean in means.items()]
        cells = [part, str(len(means)), f"{100 * np.mean(list(means.values())):.2f}"]
        cells += [f"{np.mean(change):+.2f}", f"{min(change):+.2f} to {max(change):+.2f}"]
        table.append(cells)
    return "\n".join(pipe_table(table)) + "\n"


def _class_mean(rows, run: str, part: str) -> float:
    by_class: dict[str, list[float]] = {}
    for row in rows:
        if row["run"] == run and row["part"] == part:
            by_class.setdefault(row["class"], []).append(row["dice"])
    means = [defined_mean(np.array(values)) for values in by_class.values()]
    return float(defined_mean(np.array(means))) if means else float("nan")


def main(arguments=None) -> None:
    """Entry point; `arguments` replace those of the command line."""
    parser = Parser("experiments.knockout", __doc__)
    parser.add_argument("folder", metavar="RUN_OR_GRID", help="workdir of a run, folder of a grid")
    parser.add_argument("--only", default="", metavar="ROW", help="of a grid: the runs of this row")
    parser.add_argument("--output", metavar="FILE", help="CSV with every case and class")
    with running():
        options = parser.parse_args(arguments)
        folders = [options.folder]
        if is_grid(options.folder):
            runs = read_grid(options.folder).runs()
            if options.only and options.only not in runs:
                raise UserError(f"{options.folder} has no row {options.only!r}; {', '.join(runs)}")
            chosen = [options.only] if options.only else list(runs)
            folders = [run.workdir for row in chosen for run in runs[row]]
        if not folders:
            raise UserError(f"{options.folder} has no finished run yet")
        for folder in folders:  # check all runs before hours are spent on the first
            parts_of(load_config(folder), folder)
        rows = [row for folder in folders for row in knock_out(folder)]
        if options.output:
            write_text(options.output, csv_text(COLUMNS, rows))
        print(summary(rows))


if __name__ == "__main__":
    main()
