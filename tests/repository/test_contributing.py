"""The method, the layout and the metric that CONTRIBUTING.md adds work as its text says."""

import json
import re
import types
from unittest import mock

import numpy as np
import pytest

from pgpsam_jax.config import method_recipes
from pgpsam_jax.data import dataset
from pgpsam_jax.data.layouts import cases, find
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import registry
from pgpsam_jax.metrics import protocols
from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.training import train
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(heading: str, names: dict) -> dict:
    """Runs the code of a section in the namespace `names`; returns the row that it adds."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    code, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) < 60
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return eval(f"{{{row}}}", names)


def test_it_is_short():
    assert len(TEXT.splitlines()) < 160


def test_the_method_trains(tmp_path):
    with mock.patch.dict(registry.METHODS):
        row = example("Add a method", {"__name__": "linear_probe"})
        config = config_for(write_data(tmp_path / "data"), model__name="linear", train__steps=2)
        with mock.patch.dict(method_recipes.RECIPES, row):
            for field, value in method_recipes.recipe_of("linear").items():
                section, name = field.split(".")
                config[section][name] = value
        assert config.model.train_encoder == "frozen"
        train.train(config, tmp_path / "run")
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(record)["loss"] for record in records]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_layout_finds_cases(tmp_path):
    flat = types.ModuleType("flat")
    vars(flat)["flat"] = flat
    with mock.patch.dict(find.FOLDERS):
        find.FOLDERS.update(example("Add a layout", vars(flat)))
        pairs, mine = write_data(tmp_path / "pairs"), tmp_path / "flat"
        mine.mkdir()
        for folder, ending in (("images", ""), ("labels", "_seg")):
            for path in (pairs / folder).iterdir():
                case = path.name.removesuffix(".nii.gz")
                path.rename(mine / f"{case}{ending}.nii.gz")
        config = config_for(pairs, data__layout="flat", data__root=str(mine))
        parts = dataset.find_split(config.data)
        assert [case.case_id for case in parts.train] == ["a", "b"]
        assert parts.test == [cases.Case("c", mine / "c.nii.gz", mine / "c_seg.nii.gz")]
        (mine / "b_seg.nii.gz").unlink()
        with pytest.raises(UserError, match="label of b is missing; expected CASE"):
            dataset.find_split(config.data)


def test_the_metric_is_scored_and_summarized():
    strict = protocols.FORMULAS["strict"]
    with mock.patch.dict(strict, example("Add a metric", dict(vars(protocols)))):
        truth = np.zeros((2, 8, 8), np.uint8)
        truth[:, 2:6, 2:6] = 1
        truth[:, 0] = 2
        prediction = np.where(truth == 1, np.roll(truth, 2, axis=2), 0)
        rows = protocols.score_case(
            prediction, truth, (1.0, 1.0, 1.0), ("background", "liver", "spleen"), case_id="a"
        )
        means = summarize(rows)["strict"]
    found = {row["class"]: row["value"] for row in rows if row["metric"] == "jaccard"}
    assert found == {"liver": 0.5, "spleen": 0.0}
    assert means["jaccard_class_mean"] == means["jaccard_case_mean"] == 0.25
