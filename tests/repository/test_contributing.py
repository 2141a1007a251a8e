"""The method that CONTRIBUTING.md adds: registered and trained as its text says."""

import json
import re
from unittest import mock

from pgpsam_jax.methods import registry
from pgpsam_jax.training import train
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data


def test_the_example_is_a_method_that_trains(tmp_path):
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 60
    with mock.patch.dict(registry.METHODS):
        exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "linear_probe"})
        config = config_for(write_data(tmp_path / "data"), model__name="linear", train__steps=2)
        config.model.train_encoder = "frozen"
        train.train(config, tmp_path / "run")
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(record)["loss"] for record in records]
    assert len(losses) == 2 and losses[1] < losses[0]
