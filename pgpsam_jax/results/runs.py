"""Runs (workdirs of `pgpsam_jax.main`), finished or not, read back from disk."""

import dataclasses
import re
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.config import serialization
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.utils.files import read_metrics, read_record


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir. Results that are not written yet are empty or None."""

    workdir: Path
    config: ConfigDict
    names: tuple[str, ...]  # K class names, background first
    provenance: dict
    timing: dict  # seconds by activity
    cost: dict  # cost.json: parameters, FLOPs, memory, seconds per step
    records: list[dict]  # of metrics.jsonl
    cases: list[dict]  # rows of evaluation/cases.csv
    summary: dict  # evaluation/summary.json
    list_hash: str | None  # of the few-shot slices
    # Case -> group, such as a person; empty if not known.
    groups: dict = dataclasses.field(default_factory=dict)
    # New paths of files that have moved: "data.root", "model.base".
    path_overrides: dict = dataclasses.field(default_factory=dict)

    @property
    def notices(self) -> list[str]:
        """The caveats of its scores, each once."""
        return list(dict.fromkeys(self.summary.get("notices", ())))

    @property
    def unscored(self) -> str:
        """Why it has no scores."""
        if self.config.data.split == "all":
            return "Not scored: it has no test cases (data.split=all)."
        return "Not evaluated yet."


def read_run(workdir) -> Run:
    """Reads the settings and results of a workdir; `UserError` if the folder is none."""
    from pgpsam_jax.metrics.summary import read_cases

    workdir = Path(workdir)
    config = serialization.load_config(workdir)
    evaluation = workdir / "evaluation"
    cases = evaluation / "cases.csv"
    return Run(
        workdir,
        config,
        tuple(load_label_table(workdir / "labels.json").names),
        read_record(workdir / "provenance.json", missing={}),
        read_record(workdir / "timing.json", missing={}),
        read_record(workdir / "cost.json", missing={}),
        read_metrics(workdir / "metrics.jsonl"),
        read_cases(cases) if cases.is_file() else [],
        read_record(evaluation / "summary.json", missing={}),
        _list_hash(workdir / "fewshot.txt"),
        read_record(workdir / "groups.json", missing={}),
    )


def _list_hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    match = re.search(r"^# hash: ([0-9a-f]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None
