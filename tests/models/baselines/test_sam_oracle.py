"""SAM with the true prompts: what it is told, who else is not, and that all it writes says so."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pgpsam_jax import predict
from pgpsam_jax.config import method_recipes
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models.baselines.sam_oracle import OracleSam
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.report.headline import header
from pgpsam_jax.report.page import missing_curve_text
from pgpsam_jax.report.subject import Subject
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.results.tables.cost_table import run_cost
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import step_cost, train
from pgpsam_jax.utils.files import file_digest, write_json
from tests.support import micro, tiny_method
from tests.support.method_runs import CLASSES, small_config, squares
from tests.support.small_run import config_for, write_data


class Told(nnx.Module):
    """Stands for an oracle: its classes are the labels it is given."""

    def predict(self, images, labels):
        return jax.nn.one_hot(labels, 4)


class Blind(nnx.Module):
    def predict(self, images):
        return jax.nn.one_hot((images[..., 0] > 0.5).astype(jnp.int32), 4)


def predictor_of(model, **options):
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
    sizes = dict(preprocessing=Preprocessing(16, (0.0, 1.0)), batch_size=3)
    return Predictor(graphdef, params, frozen, mesh=mesh, **sizes, **options)


def test_labels_reach_an_oracle_and_nobody_else():
    """Seven slices in batches of three; an edge is off by the resizing of logits at most."""
    volume = Volume(np.random.default_rng(0).random((7, 16, 16), np.float32), (3.0, 1.0, 1.0), None)
    truth = np.random.default_rng(1).integers(0, 4, (7, 16, 16)).astype(np.uint8)
    np.testing.assert_array_equal(predictor_of(Told(), oracle=True)(volume, truth), truth)
    with pytest.raises(UserError, match="there are none"):
        predictor_of(Told(), oracle=True)(volume)
    with pytest.raises(ValueError, match="for an oracle only"):
        predictor_of(Blind())(volume, truth)
    np.testing.assert_array_equal(predictor_of(Blind())(volume), volume.array > 0.5)


def test_one_method_is_an_oracle_and_is_called_so():
    for (name, _), method in registry.METHODS.items():
        assert method.oracle == ("ORACLE" in method.label) == (name == "sam")


def test_prompts_are_those_of_the_true_masks():
    config, batch = small_config("sam"), squares(2)
    graphdef, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
    assert not jax.tree.leaves(params)
    images = jnp.repeat(jnp.float32(batch["image"])[..., None], 3, -1)
    labels = jnp.asarray(batch["label"], jnp.int32)
    found = jax.jit(lambda f: nnx.merge(graphdef, params, f).predict(images, labels))(frozen)
    assert found.shape == (2, 16, 16, CLASSES)

    @jax.jit
    def ask(frozen, boxes):
        model = nnx.merge(graphdef, params, frozen)
        sparse, dense = model.prompt_encoder(boxes=boxes)
        positions = model.prompt_encoder.pe_layer.grid((4, 4))
        return model.mask_decoder(model.encode(images), positions, sparse, dense, multimask=False)

    boxes = []
    for i, label in enumerate(batch["label"]):
        rows, columns = (np.flatnonzero((label == i + 1).any(axis)) for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1], rows[-1]])
    wanted, _ = ask(frozen, jnp.array(boxes, jnp.float32))
    for i in range(2):
        there, absent = i + 1, 2 - i
        np.testing.assert_allclose(found[i, ..., there], wanted[i, ..., 0], atol=1e-5)
        assert (found[i, ..., absent] < -1e3).all() and not found[i, ..., 0].any()


@pytest.mark.parametrize("name", ["surgicalsam", "fssp", "sam"])
def test_all_of_a_converted_sam_is_loaded(name, tmp_path):
    sam = nnx.eval_shape(lambda: Sam(SamConfig.preset(micro.NAME, 64, 8), rngs=ShapeOnlyRngs()))
    rng, leaves = np.random.default_rng(7), flat_paths(nnx.state(sam))
    tensors = {path: np.float32(rng.random(leaf.shape)) for path, leaf in leaves.items()}
    stem = tmp_path / "sam"
    save_file(tensors, f"{stem}.safetensors")
    sidecar = {"format": weights.FORMAT, "format_version": weights.FORMAT_VERSION}
    write_json(f"{stem}.json", sidecar | {"sha256": file_digest(f"{stem}.safetensors")})
    config = small_config(name, model__base=str(stem))
    _, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
    leaves = flat_paths(params) | flat_paths(frozen)
    for path, wanted in weights.fit_base(tensors, (4, 4), global_blocks=(1,)).items():
        np.testing.assert_array_equal(leaves[path][...], wanted, err_msg=path)
    own = {path.split("/")[0] for path in leaves.keys() - tensors.keys()}
    assert own == {"surgicalsam": {"prompter", "prototypes"}, "fssp": {"classifier"}}.get(
        name, set()
    )


class Small(tiny_method.Tiny):
    """The smallest model that is given the labels."""

    label, training, oracle = OracleSam.label, OracleSam.training, True
    frozen = ("first", "second")

    def predict(self, images, labels):
        logits = self.first(self.encode(images))
        return logits + 9 * jax.nn.one_hot(labels[:, ::4, ::4], logits.shape[-1])


@pytest.fixture(params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def small_or_whole(request, monkeypatch):
    """The oracle as it is, or with the smallest model in place of SAM."""
    if request.param == "small":
        monkeypatch.setitem(registry.METHODS, ("sam", ""), Small)


def test_a_run_says_what_it_is_and_predicts_nothing(small_or_whole, tmp_path, capsys, monkeypatch):
    config = config_for(write_data(tmp_path / "data"), eval__overlays=False)
    method_recipes.apply_recipe(config, "sam")
    run = tmp_path / "run"
    summary = train.train(config, run)
    said = "ORACLE: SAM is prompted with the true boxes"
    printed = capsys.readouterr().out
    assert printed.count(said) == 2 and printed.index(said) < printed.index("devices ")
    assert any(said in notice for notice in summary["notices"])
    assert said in (run / "evaluation/summary.md").read_text()
    assert any(said in notice for notice in Subject.read(run).notices)
    assert not (run / "checkpoints").exists()
    assert "training   none: no parameters to train" in printed
    assert "epochs" not in printed and "few-shot   7 slices" in printed and "(not used)" in printed
    spent = step_cost.read_record(run)
    assert spent["kind"] == "none" and spent["parameters"]["trained"] == 0
    assert spent["flops_per_image"]["forward"] > 0 and spent["peak_bytes"]["process"] > 0
    assert missing_curve_text(read_run(run)) == "This method has no trainable parameters."
    assert "seed 0, no trainable parameters" in header(Subject.read(run))
    (table,) = run_cost(read_run(run))
    assert "No trainable parameters, hence no training step." in table.notes
    stored = json.loads((run / "evaluation/summary.json").read_text())
    assert workdirs.evaluate_workdir(run)["strict"] == summary["strict"] == stored["strict"]
    image = str(tmp_path / "data/images/c.nii.gz")
    with pytest.raises(UserError, match="takes its prompts from the labels"):
        load_run(run).segment(image)
    arguments = [
        "predict",
        "--workdir",
        str(run),
        "--input",
        image,
        "--output",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        predict.main()
    assert "takes its prompts from the labels" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
