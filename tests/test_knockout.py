"""Knock-outs: what each edit silences, that only it is edited, and the table of a run."""

import csv
import re

import jax
import numpy as np
import pytest
from method_runs import CLASSES, small_config
from ready_run import ready_run
from small_run import write_data

import pgpsam_jax
from experiments import knockout
from pgpsam_jax import build, recipes
from pgpsam_jax import config as configuration
from pgpsam_jax.evaluation.report import read_cases
from pgpsam_jax.parameters import flat_paths

PARTS = knockout.PARTS["pgpsam"]
ENCODER = "model.train_encoder"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("data"))
    return ready_run(root, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(workdir):
    return pgpsam_jax.load_run(workdir)


passes_of = jax.jit(lambda model, images: model.passes(images))


def passes(run, part):
    """The decoder passes of one image with a part off."""
    params = run.predictor.params
    if part is not None:
        params = knockout.silenced(params, PARTS[part])
    model = run.predictor.with_params(params).model
    images = np.random.default_rng(0).uniform(size=(1, 32, 32, 3)).astype(np.float32)
    return model, passes_of(model, images)


def test_each_edit_silences_its_part(run):
    _, whole = passes(run, None)
    model, _ = passes(run, "CFM gates (Eq 1-2)")
    feature = np.random.default_rng(1).normal(size=(1, 4, 4, 32)).astype(np.float32)
    assert not model.cfm[0].spatial(feature).any() and not model.cfm[1].channel(feature).any()
    _, off = passes(run, "dense prompts (Eq 6)")
    assert whole[1].dense.any() and not any(one.dense.any() for one in off)
    assert np.array_equal(off[0].sparse, whole[0].sparse)
    _, off = passes(run, "sparse prompts (Eq 7)")
    assert whole[1].sparse.any() and not any(one.sparse.any() for one in off)
    _, off = passes(run, "PPR (Eq 5)")
    assert not np.array_equal(whole[-1].intra, whole[0].intra)
    assert np.array_equal(off[-1].intra, off[0].intra)
    assert np.array_equal(off[-1].inter, off[0].inter)


def test_half_of_eq_5_is_the_other_half(run):
    """The first stage's update is the sum of those with one attention off."""
    update = {
        part: np.asarray(found[1].intra) - np.asarray(found[0].intra)
        for part, (_, found) in {
            None: passes(run, None),
            "W_c": passes(run, "class attention W_c (Eq 4)"),
            "W_q": passes(run, "query attention W_q (Eq 5)"),
        }.items()
    }
    np.testing.assert_allclose(update["W_c"] + update["W_q"], update[None], atol=2e-5)


def test_the_original_weights_are_not_touched(run):
    before = {k: np.asarray(v[...]) for k, v in flat_paths(run.predictor.params).items()}
    for edits in PARTS.values():
        knockout.silenced(run.predictor.params, edits)
    after = flat_paths(run.predictor.params)
    assert all(np.array_equal(value, after[key][...]) for key, value in before.items())
    assert knockout.silenced(run.predictor.params, {"no/such/leaf": 0.0}) is None


def test_table_of_a_run(workdir, tmp_path, capsys):
    knockout.main([str(workdir), "--output", str(tmp_path / "out.csv")])
    lines = capsys.readouterr().out.strip().splitlines()
    parts = [part for part in PARTS if "(release)" not in part and "LoRA" not in part]
    assert len(lines) == 2 + 1 + len(parts)
    assert lines[2].startswith("| nothing | 1 |") and "+0.00" in lines[2]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    whole = {row["class"]: float(row["dice"]) for row in rows if row["part"] == knockout.WHOLE}
    scored = read_cases(workdir / "evaluation" / "cases.csv")
    for row in scored:
        if (row["protocol"], row["metric"]) == ("strict", "dice"):
            assert whole[row["class"]] == pytest.approx(row["value"], nan_ok=True)


def test_wrong_folders(tmp_path, capsys):
    with pytest.raises(SystemExit):
        knockout.main([str(tmp_path / "nothing")])
    assert "no training workdir" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(knockout.PARTS))
def test_the_parts_of_a_method_are_all_there(name):
    """Every pattern is one of its parameters'; PGP-SAM's are those of one preset or the other."""
    paths = []
    for preset in ("paper", "release") if name == "pgpsam" else ("paper",):
        config = small_config(name, model__train_encoder=recipes.of(name).get(ENCODER, "lora"))
        config.model.preset = preset
        paths += flat_paths(build.abstract_model(config, CLASSES)[1])
    for part, edits in knockout.PARTS[name].items():
        for pattern in edits:
            assert any(re.fullmatch(pattern, path) for path in paths), part


def test_methods_without_such_parts_are_refused(tmp_path, capsys):
    configuration.store(small_config("autosam"), tmp_path)
    with pytest.raises(SystemExit):
        knockout.main([str(tmp_path)])
    assert "is a run of AutoSAM, of which no part can be silenced" in capsys.readouterr().err
