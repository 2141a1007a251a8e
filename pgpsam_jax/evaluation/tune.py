"""Chooses how the masks of a run are made, by the Dice of its validation cases.

Tried are averages over shifted passes, smoothing across slices, and dropping small connected
components of each organ (docs/predict.md). The choice is stored in the run's inference.json, which
evaluation and prediction use from then on; test cases are not read.

Examples:
  pgpsam tune runs/mine
  pgpsam evaluate --workdir runs/mine
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pgpsam_jax.checkpointing import locations
from pgpsam_jax.config import load_config
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.io.volumes import read_grid
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.postprocessing import keep_components, smooth_slices
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.settings import FILE, PLAIN, InferenceSettings, write
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.methods.registry import method_of
from pgpsam_jax.metrics.aggregate import defined_mean
from pgpsam_jax.metrics.overlap import dice_of_counts, overlap_counts
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.markdown import one_line, pipe_table

SHIFTS = (1, 5)
SMOOTH = (0.0, 0.5, 1.0, 1.5)  # SDs in slices of the median spacing
SHARES = (0.0, 0.3, 1.0)  # of the largest component
MARGIN = 1e-3  # of mean Dice, which a costlier setting must add


def score(
    predictor: Predictor, cases: Sequence[Case], table: LabelTable, axis: str, smooth
) -> np.ndarray:
    """Returns Dice (cases, shifts, smooth, shares, K - 1) of all settings; NaN for absent organs.

    smooth: SDs in mm. Arguments else as for `evaluate`.
    """
    classes = table.num_classes
    found = np.empty((len(cases), len(SHIFTS), len(smooth), len(SHARES), classes - 1))
    for of_case, case in zip(found, tqdm(cases, desc="tuning", unit="case"), strict=True):
        volume, truth = read_case(case, table, axis)
        for of_shifts, shifts in zip(of_case, SHIFTS, strict=True):
            mean = predictor.with_settings(InferenceSettings(shifts)).probabilities(volume)
            for of_smooth, mm in zip(of_shifts, smooth, strict=True):
                if shifts > 1 or mm:
                    near = smooth_slices(mean, mm / volume.spacing[0]) if mm else mean
                    ids = near.argmax(axis=-1).astype(np.uint8)
                else:
                    ids = predictor(volume)  # by logits, which are finer
                for of_share, share in zip(of_smooth, SHARES, strict=True):
                    kept = keep_components(ids, (share,) * (classes - 1))
                    of_share[:] = dice_of_counts(overlap_counts(kept, truth, classes).sum(axis=1))
    return found


def choose(dice: np.ndarray, smooth: Sequence[float]) -> InferenceSettings:
    """Returns the first settings, from cheap to costly, within `MARGIN` of the best mean Dice.

    Each organ has the share of components that is best for it. Arguments as `score` returns and
    takes them.

    Raises:
      UserError: there is no organ whose Dice is defined.
    """
    means = defined_mean(dice, axis=0)  # (shifts, smooth, shares, K - 1)
    organs = np.isfinite(means).all(axis=(0, 1, 2))
    if not organs.any():
        raise UserError("no validation case has an organ, so nothing can be chosen by its Dice")
    overall = means[..., organs].max(axis=2).mean(axis=-1)
    i, j = np.argwhere(overall >= overall.max() - MARGIN)[0]
    of_shares = np.nan_to_num(means[i, j])
    best = of_shares.argmax(axis=0)
    gain = of_shares.max(axis=0) - of_shares[0]
    shares = [SHARES[s] if g > MARGIN else 0.0 for s, g in zip(best, gain, strict=True)]
    return InferenceSettings(SHIFTS[i], float(smooth[j]), tuple(shares) if any(shares) else ())


def tune(workdir) -> InferenceSettings:
    """Chooses the settings of a run, writes them and prints the table.

    Raises:
      UserError: the run has no validation cases, or its method needs labels.
    """
    config = load_config(workdir)  # cheap checks first
    if method_of(config.model).oracle:
        raise UserError(f"{workdir} is a run of an oracle, whose masks need no settings")
    split = dataset.find_split(locations.resolve_paths(config, workdir).data)
    if not split.validation:
        raise UserError(
            f"{workdir} has no validation cases to choose by, and test cases must not decide; "
            "train with data.validation_fraction, or with validation cases in data.split_file"
        )
    run, axis = load_run(workdir), config.data.axis
    names = run.label_names
    grids = [read_grid(case.image).along(axis) for case in split.validation]
    spacing = float(np.median([grid.spacing[0] for grid in grids]))
    smooth = [round(factor * spacing, 3) for factor in SMOOTH]
    plain = run.predictor.with_settings(PLAIN)
    dice = score(plain, split.validation, split.table, axis, smooth)
    chosen = choose(dice, smooth)
    overall = defined_mean(defined_mean(dice, axis=0), axis=-1)
    evidence = {
        "chosen_on": [case.case_id for case in split.validation],
        "dice": [
            {
                "shifts": s,
                "smooth_mm": mm,
                "components": share,
                "class_mean": float(overall[i, j, k]),
            }
            for i, s in enumerate(SHIFTS)
            for j, mm in enumerate(smooth)
            for k, share in enumerate(SHARES)
        ],
    }
    write(chosen, workdir, names, evidence)
    rows = [["passes", "smoothed by (mm)", *(f"components {share:g}" for share in SHARES)]]
    for i, shifts in enumerate(SHIFTS):
        for j, mm in enumerate(smooth):
            cells = (f"{100 * value:.2f}" for value in overall[i, j])
            rows.append([str(shifts), f"{mm:g}", *cells])
    print(f"Dice (%), class mean over {len(split.validation)} validation cases")
    print(*pipe_table(rows), sep="\n")
    print(f"{one_line(chosen.describe(names) or 'Masks stay plain.')} {Path(workdir) / FILE}")
    return chosen


def main(arguments=None) -> None:
    """Entry point; `arguments` replace those of the command line."""
    parser = Parser("pgpsam_jax.evaluation.tune", __doc__)
    parser.add_argument("workdir", metavar="RUN", help="workdir of a finished run")
    with running():
        tune(parser.parse_args(arguments).workdir)


if __name__ == "__main__":
    main()
