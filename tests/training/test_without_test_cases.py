"""data.split=all: training on every case, without a score; folds: a part of them each."""

import pytest

from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.tune import tune
from pgpsam_jax.evaluation.workdirs import evaluate_workdir
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.report.page import write_report
from pgpsam_jax.utils.untrusted_text import read_user_json
from tests.support import faults, tiny_method
from tests.support.small_run import write_data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), "abcd")


def test_a_run_on_all_cases_is_trained_reported_and_used_but_not_scored(root, tmp_path, capsys):
    split = {"data__split": "all", "data__split_file": ""}
    assert faults.again(root, tmp_path, **split) == {}
    assert "has no test cases (data.split=all), so that nothing" in capsys.readouterr().out
    assert not (tmp_path / "evaluation").exists()
    parts = read_user_json(tmp_path / "split.json", "split")
    assert sorted(parts["train"]) == list("abcd") and "test" not in parts
    assert faults.again(root, tmp_path, **split) == {}  # finished: nothing is trained again
    with tiny_method.known():
        with pytest.raises(UserError, match="has no test cases"):
            evaluate_workdir(tmp_path)
        with pytest.raises(UserError, match="has no validation cases"):
            tune(tmp_path)
        assert load_run(tmp_path).segment(root / "images" / "a.nii.gz").shape == (24, 20, 10)
        page = write_report(tmp_path).read_text()
    assert page.count("Not scored: it has no test cases (data.split=all).") == 2


@pytest.mark.parametrize("fold", [0, 1])
def test_a_fold_is_scored_by_the_others(root, tmp_path, fold):
    fields = {"data__split": "folds", "data__split_file": "", "data__folds": 2, "data__fold": fold}
    summary = faults.again(root, tmp_path, **fields)
    parts = read_user_json(tmp_path / "split.json", "split")
    assert summary["n_cases"] == len(parts["test"]) == len(parts["train"]) == 2
