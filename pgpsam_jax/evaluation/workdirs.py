"""Evaluates a workdir, for `--mode evaluate` and at the end of training."""

from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import (
    best_parameters,
    frozen_weights,
    identity,
    locations,
    resumption,
)
from pgpsam_jax.checkpointing.workdir_lock import locked
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.data.io import array_files
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.restore import load_predictor
from pgpsam_jax.methods import build, registry
from pgpsam_jax.runtime import determinism

NO_TEST = (
    "has no test cases (data.split=all), so that nothing can be scored; pgpsam predict segments "
    "new volumes with it"
)


def evaluate_workdir(workdir, config: ConfigDict | None = None) -> dict:
    """Scores the newest or best parameters of a workdir: `--mode evaluate`.

    Args:
      workdir: of the run.
      config: with changed evaluation settings; None for the workdir's.

    Raises:
      UserError: the workdir holds another run, or its files are missing or have changed.
    """
    stored = serialization.load_config(workdir)
    determinism.demand((config or stored).deterministic)
    multihost.check_shared(workdir)
    with locked(workdir, "evaluating"):
        config = locations.resolve_paths(stored if config is None else config, workdir)
        config = build.resolve_method_defaults(config)
        split = dataset.find_split(config.data)
        config.data.axis = dataset.axis_of(config.data, split.train)
        identity.check_same(stored, config, workdir, free=identity.LENGTH)
        resumption.check_split(workdir, split)
        if not split.test:
            raise UserError(f"{workdir} {NO_TEST}")
        predictor = load_predictor(config, workdir, split.table.names)
        return run_evaluation(config, workdir, predictor, split)


def run_evaluation(config: ConfigDict, workdir, predictor, split: dataset.Split) -> dict:
    """Writes `<workdir>/evaluation`, prints a short table and returns the summary."""
    from pgpsam_jax.evaluation.evaluate import evaluate  # imports scoring and plotting libraries
    from pgpsam_jax.metrics.summary_text import format_text

    notices = [frozen_weights.base_notice(config.model, workdir), registry.notice(config.model)]
    notices.append(best_parameters.notice(config.validation, workdir))
    notices.append(resumption.notice(workdir, split))
    notices.append(predictor.settings.describe(split.table.names))
    options = {"axis": config.data.axis}
    if config.data.layout == "transunet":
        notices.append(array_files.NO_GRID)
    if config.data.split == "within_volume":
        notices.append(
            "Training and scored slices come from the same volumes: no claim of generalization. "
            f'Scored are the slices of the few-shot pool ("{config.fewshot.pool}") that were not '
            "used for training."
        )
        entries = dataset.stored_list(workdir).entries
        options["region_of"] = dataset.unseen_slices(config.fewshot, split.table, entries)
    folder = Path(workdir) / "evaluation"
    summary = evaluate(
        predictor,
        split.test,
        split.table,
        folder,
        nsd_tolerance_mm=config.eval.nsd_tolerance_mm,
        min_pixels=config.fewshot.min_pixels,
        overlays=config.eval.overlays,
        workers=config.eval.workers,
        notices=[notice for notice in notices if notice],
        **options,
    )
    multihost.print_once(format_text(summary))
    for text in summary["notices"]:  # in full in the file
        multihost.print_once(f"!!! {text.split('. ')[0].rstrip('.')}.")
    multihost.print_once(f"evaluation  {folder / 'summary.md'}: all protocols, definitions")
    return summary
