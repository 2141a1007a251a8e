"""Knock-outs: what each edit silences, that only it is edited, and the table of a run."""

import csv
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import knockout
from pgpsam_jax.config import method_recipes, serialization
from pgpsam_jax.methods import build
from pgpsam_jax.metrics.summary import read_cases
from pgpsam_jax.models.parameters import flat_paths
from tests.support.method_runs import CLASSES, small_config
from tests.support.ready_run import ready_run
from tests.support.small_pgpsam import build as build_small
from tests.support.small_pgpsam import inputs_for, small
from tests.support.small_run import config_for, write_data

PARTS = knockout.PARTS["pgpsam"]
CONFIG = small(stage_taps=(1,))
ENCODER = "model.train_encoder"


@functools.cache
def small_model():
    """(graphdef, parameters) of a model with random ones, on drawn outputs of an image encoder."""
    return nnx.split(build_small(CONFIG)[0])


@functools.cache
def passes_of():
    graphdef, _ = small_model()
    return jax.jit(lambda params, inputs: nnx.merge(graphdef, params).passes(inputs))


def passes(part):
    """The decoder passes of one image with a part off."""
    graphdef, params = small_model()
    if part is not None:
        params = knockout.silenced(params, PARTS[part])
    return nnx.merge(graphdef, params), passes_of()(params, inputs_for(CONFIG, batch=1))


def test_each_edit_silences_its_part():
    _, whole = passes(None)
    model, _ = passes("CFM gates (Eq 1-2)")
    feature = np.random.default_rng(1).normal(size=(1, 4, 4, 32)).astype(np.float32)
    gates = jax.jit(lambda cfm, x: (cfm.spatial(x), cfm.channel(x)))(model.cfm[0], feature)
    assert not any(np.any(gate) for gate in gates)
    model, off = passes("dense prompts (Eq 6)")
    for generator, one in zip(model.ppg, off, strict=True):  # SAM's embedding, at every place
        bias = generator.dense.mlp.lin2.bias[...]
        np.testing.assert_array_equal(one.dense, np.broadcast_to(bias, one.dense.shape))
    assert np.ptp(whole[1].dense, axis=(1, 2)).any()
    assert np.array_equal(off[0].sparse, whole[0].sparse)
    _, off = passes("sparse prompts (Eq 7)")
    assert whole[1].sparse.any() and not any(one.sparse.any() for one in off)
    _, off = passes("PPR (Eq 5)")
    assert not np.array_equal(whole[-1].intra, whole[0].intra)
    assert np.array_equal(off[-1].intra, off[0].intra)
    assert np.array_equal(off[-1].inter, off[0].inter)


def test_half_of_eq_5_is_the_other_half():
    """The first stage's update is the sum of those with one attention off."""
    update = {
        part: np.asarray(found[1].intra) - np.asarray(found[0].intra)
        for part, (_, found) in {
            None: passes(None),
            "W_c": passes("class attention W_c (Eq 4)"),
            "W_q": passes("query attention W_q (Eq 5)"),
        }.items()
    }
    np.testing.assert_allclose(update["W_c"] + update["W_q"], update[None], atol=2e-5)


def test_the_original_weights_are_not_touched():
    _, params = small_model()
    before = {k: np.asarray(v[...]) for k, v in flat_paths(params).items()}
    for edits in PARTS.values():
        knockout.silenced(params, edits)
    after = flat_paths(params)
    assert all(np.array_equal(value, after[key][...]) for key, value in before.items())
    assert knockout.silenced(params, {"no/such/leaf": 0.0}) is None


class OneBias:
    """In the place of a predictor: finds an organ everywhere, unless its part was silenced."""

    def __init__(self, params):
        self.params = params

    def with_params(self, params):
        return OneBias(params)

    def __call__(self, volume):
        (leaf,) = self.params.values()
        return np.full(volume.array.shape, int(leaf[...] > 0), np.uint8)


def test_rows_of_a_run(tmp_path, monkeypatch):
    """Every part that the run has, every class; the whole model first, as it is."""
    root, config = write_data(tmp_path), config_for(tmp_path, data__axis="axial")
    run = types.SimpleNamespace(
        config=config, predictor=OneBias(nnx.State({"a": nnx.Param(jnp.ones(()))}))
    )
    monkeypatch.setattr(knockout, "load_run", lambda workdir: run)
    monkeypatch.setitem(knockout.PARTS, "pgpsam", {"a": {"a": 0.0}, "b": {"b": 0.0}})
    rows = knockout.knock_out(root)
    dices = {(row["part"], row["class"]): row["dice"] for row in rows}
    assert list(dices) == [(p, c) for p in (knockout.WHOLE, "a") for c in ("liver", "spleen")]
    assert dices["nothing", "liver"] > 0 == dices["a", "liver"] == dices["nothing", "spleen"]
    lines = [" ".join(line.split()) for line in knockout.summary(rows).splitlines()]
    found = 50 * dices["nothing", "liver"]
    assert lines[2:] == [
        f"| nothing | 1 | {found:.2f} | +0.00 | +0.00 to +0.00 |",
        f"| a | 1 | 0.00 | {-found:+.2f} | {-found:+.2f} to {-found:+.2f} |",
    ]


@pytest.mark.slow
def test_table_of_a_run(tmp_path, capsys):
    workdir = ready_run(write_data(tmp_path / "data"), tmp_path / "run")
    capsys.readouterr()  # what the evaluation said
    knockout.main([str(workdir), "--output", str(tmp_path / "out.csv")])
    lines = capsys.readouterr().out.strip().splitlines()
    others = "(release)", "(plus)", "LoRA"
    parts = [part for part in PARTS if not any(other in part for other in others)]
    assert len(lines) == 2 + 1 + len(parts)
    assert lines[2].startswith("| nothing ") and "+0.00" in lines[2]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    whole = {row["class"]: float(row["dice"]) for row in rows if row["part"] == knockout.WHOLE}
    scored = read_cases(workdir / "evaluation" / "cases.csv")
    for row in scored:
        if (row["protocol"], row["metric"]) == ("strict", "dice"):
            assert whole[row["class"]] == pytest.approx(row["value"], nan_ok=True)


def test_wrong_folders(tmp_path, capsys):
    with pytest.raises(SystemExit):
        knockout.main([str(tmp_path / "nothing")])
    assert "is not a training workdir" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(knockout.PARTS))
def test_the_parts_of_a_method_are_all_there(name):
    """Every pattern is one of its parameters'; PGP-SAM's are those of one of its presets."""
    paths = []
    for preset in ("paper", "release", "plus") if name == "pgpsam" else ("paper",):
        config = small_config(
            name, model__train_encoder=method_recipes.recipe_of(name).get(ENCODER, "lora")
        )
        config.model.preset = preset
        paths += flat_paths(build.abstract_model(config.model, CLASSES)[1])
    for part, edits in knockout.PARTS[name].items():
        for pattern in edits:
            assert any(re.fullmatch(pattern, path) for path in paths), part


def test_methods_without_such_parts_are_refused(tmp_path, capsys):
    serialization.save_config(small_config("autosam"), tmp_path)
    with pytest.raises(SystemExit):
        knockout.main([str(tmp_path)])
    assert "is a run of AutoSAM, which has no part to switch off" in capsys.readouterr().err
