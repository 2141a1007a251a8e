"""FSSP-SAM: the regression against SciPy, its prompts, a fit as a step of a run, any mesh."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from scipy import optimize

from pgpsam_jax.checkpointing.checkpoint import Checkpoints
from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models import losses
from pgpsam_jax.models.baselines.fssp_sam import Fssp
from pgpsam_jax.models.parameters import count, flat_paths
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.report.page import missing_curve_text
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import step_cost, train
from pgpsam_jax.training.lbfgs_step import minimize
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step
from tests.support import micro, tiny_method
from tests.support.method_runs import CLASSES, small_config, squares
from tests.support.small_run import config_for, write_data

SAM = SamConfig.preset(micro.NAME, (32, 64), 8, depth=1, global_blocks=(0,))


def regression(seed=0, rows=600, width=12, classes=3):
    """Features and class ids with overlap between the classes; the last 40 ids are unknown."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width))
    ids = (x @ rng.standard_normal((width, classes)) + rng.gumbel(size=(rows, classes))).argmax(-1)
    ids[-40:] = -1
    return x, ids


def test_the_fit_is_that_of_one_regression_per_class():
    """Against SciPy in float64, one class after the other."""
    x, ids = regression()
    wanted = []
    for k in (1, 2):
        a, y = x[ids >= 0], ids[ids >= 0] == k

        def objective(w, a=a, y=y):  # scikit-learn's, C = 1
            z = a @ w[1:] + w[0]
            p = 1 / (1 + np.exp(-z))
            slope = np.concatenate([[np.sum(p - y)], a.T @ (p - y) + w[1:]])
            return np.sum(np.logaddexp(0, z) - y * z) + w[1:] @ w[1:] / 2, slope

        options = dict(ftol=1e-15, gtol=1e-9, maxiter=5000)
        found = optimize.minimize(objective, np.zeros(13), jac=True, options=options)
        wanted.append(found.x)
    features, ids = jnp.float32(x)[None, None], jnp.asarray(ids)[None, None, :, None]
    shares = jnp.where(ids < 0, -1, ids == jnp.array([1, 2]))

    def loss(params):
        outputs = {"coarse": features @ params["w"] + params["b"], "kernel": params["w"]}
        return losses.one_against_rest(outputs, shares, 0, None)[0]

    start = {"w": np.zeros((12, 2), np.float32), "b": np.zeros(2, np.float32)}
    fit = jax.jit(lambda p, iterations: minimize(loss, p, iterations=iterations, tolerance=1e-6))
    found = fit(start, 1000)
    assert found.slope <= 1e-6 and 3 < found.iterations < 200
    np.testing.assert_allclose(found.params["w"].T, np.array(wanted)[:, 1:], atol=2e-4)
    np.testing.assert_allclose(found.params["b"], np.array(wanted)[:, 0], atol=2e-4)
    assert fit(start, 2).iterations == 2


def test_what_trains():
    config = default_config()
    method_recipes.apply_recipe(config, "fssp")
    _, params, _ = build.abstract_model(config.model, 9)
    assert set(flat_paths(params)) == {"classifier/kernel", "classifier/bias"}
    assert count(params) == 8 * 257


@functools.cache
def initial():
    """Graph, trained and frozen state of a model of the squares."""
    return build.init_model(small_config("fssp", model__encoder="vit_t").model, CLASSES, 0)[:3]


def fitted(sizes, encoded=0):
    """(metrics, parameters) of the fit of the ten squares, four at a time, on a mesh."""
    config = small_config(
        "fssp", model__encoder="vit_t", train__batch_size=4, train__encoded_copies=encoded
    )
    graphdef, params, frozen = jax.tree.map(jnp.copy, initial())  # the step donates them
    mesh = device_mesh.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    batch = dict(squares(10))
    if encoded:  # two copies of the set, of which the second is another one
        images = jnp.repeat(jnp.float32(batch.pop("image"))[..., None], 3, -1)
        features = jax.jit(lambda f: nnx.merge(graphdef, params, f).encode(images))(frozen)
        batch["encoded"] = jnp.concatenate([features, features[::-1]])
        batch["label"] = np.tile(batch["label"], (2, 1, 1))
    batch = jax.device_put(batch, device_mesh.replicated(mesh))
    batch["rows"] = jax.device_put(np.arange(4), device_mesh.batch_sharding(mesh))
    step = shard_step(
        TrainingPlan.from_config(config),
        mesh,
        graphdef,
        params,
        frozen,
        batch,
        epoch_size=10,
        seed=0,
    )
    frozen = jax.device_put(frozen, jax.tree.map(lambda leaf: leaf.sharding, step.frozen))
    state, metrics = step.run(step.start(params), frozen, batch)
    assert state.step == 1
    found = {path: np.asarray(leaf[...]) for path, leaf in flat_paths(state.params).items()}
    return {name: float(value) for name, value in metrics.items()}, found


@pytest.fixture(scope="module")
def alone():
    return fitted((1, 1, 1))


def test_the_fit_separates_what_it_was_given(alone):
    """From log 2 for each of two classes down to, measured, 0.13 above what shares leave."""
    metrics, _ = alone
    shares = np.float64(losses.class_shares(squares(10)["label"], (4, 4), CLASSES - 1))
    least = np.mean(scipy.special.entr(shares) + scipy.special.entr(1 - shares), axis=(0, 1, 2))
    assert 0 < metrics["ce"] - least.sum() < 0.1 * 2 * np.log(2)
    assert metrics["gradient_norm"] <= 1e-4 and metrics["iterations"] < 1000


@pytest.mark.parametrize(
    ("sizes", "encoded"),
    [
        pytest.param((2, 2, 2), 0, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 2, marks=pytest.mark.slow),
        ((2, 2, 2), 2),
    ],
    ids=str,
)
def test_meshes_and_stored_features_agree(alone, sizes, encoded):
    """To what the tolerance of the fit leaves open."""
    metrics, params = fitted(sizes, encoded)
    assert metrics["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
    for path, value in alone[1].items():
        np.testing.assert_allclose(params[path], value, atol=0.02 * np.abs(value).max() + 1e-3)


def test_a_list_that_is_sent_in_parts_is_refused():
    config = small_config("fssp", model__encoder="vit_t")
    graphdef, params, frozen = initial()
    mesh = device_mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    batch = device_mesh.put_batch(squares(), mesh)
    step = shard_step(
        TrainingPlan.from_config(config),
        mesh,
        graphdef,
        params,
        frozen,
        batch,
        epoch_size=8,
        seed=0,
    )
    with pytest.raises(UserError, match=r"all slices .* data\.resident_gib; raise it"):
        step.lower()


@pytest.fixture(scope="module")
def model():
    return Fssp(SAM, CLASSES, prompt="both", rngs=nnx.Rngs(0))


@nnx.jit
def encoded(model, images):
    return model.encode(images)


@nnx.jit
def asked(model, feature, given):
    sparse, dense = model.prompt_encoder(**given)
    positions = model.prompt_encoder.pe_layer.grid((4, 8))
    return model.mask_decoder(feature, positions, sparse, dense, multimask=False)[0]


def with_rough_masks(model, tokens):
    """The model with a classifier that finds class 1 at these (row, column) tokens, 2 nowhere."""
    feature = np.asarray(encoded(model, IMAGES))[0]
    wanted = np.full(feature.shape[:2], -1.0)
    wanted[tuple(np.transpose(tokens))] = 1
    flat = feature.reshape(-1, feature.shape[-1])
    kernel = np.zeros((flat.shape[1], 2), np.float32)
    # LayerNorm leaves one direction empty: what rounding has there must not become a large weight.
    kernel[:, 0] = np.linalg.lstsq(flat, wanted.ravel(), rcond=1e-5)[0]
    model.classifier.kernel.set_value(jnp.asarray(kernel))
    model.classifier.bias.set_value(jnp.array([0.0, -1.0]))


IMAGES = np.random.default_rng(0).random((1, 32, 64, 3), np.float32)


@pytest.mark.parametrize(
    "prompt", [*(pytest.param(p, marks=pytest.mark.slow) for p in ("point", "box")), "both"]
)
def test_prompts_of_a_rough_mask_are_sams_own(model, prompt):
    """Two by two tokens of 8 px: a hand-made prompt gives the same mask; no tokens, no mask."""
    with_rough_masks(model, [(1, 3), (1, 4), (2, 3), (2, 4)])
    model.prompt = prompt
    found = nnx.jit(lambda model: model.predict(IMAGES))(model)
    assert found.shape == (1, 16, 32, CLASSES)
    given = {}
    if prompt != "box":  # rows 8 to 23, columns 24 to 39: the first of the four deepest pixels
        given = {"points": jnp.array([[[31.0, 15.0]]]), "labels": jnp.ones((1, 1), jnp.int32)}
    if prompt != "point":  # 3 px off by erosion, 5 + 4.75 on: 10 in all
        given["boxes"] = jnp.array([[24.0 + 3 - 10, 8 + 3 - 10, 39 - 3 + 10, 23 - 3 + 10]])

    wanted = asked(model, encoded(model, IMAGES), given)
    np.testing.assert_allclose(found[..., 1], wanted[..., 0], atol=1e-5)
    assert not found[..., 0].any() and (found[..., 2] < -1e3).all()


class Fitted(tiny_method.Tiny):
    """The smallest model with this method's outputs for its loss."""

    label, loss, training = Fssp.label, staticmethod(Fssp.loss), Fssp.training
    frozen = ("second",)

    def __init__(self, sam, num_classes, **options):
        super().__init__(sam, num_classes - 1, **options)

    def segment(self, features, keys=None):
        return {"coarse": self.first(features), "kernel": self.first.kernel[...]}

    def predict(self, images):
        return jnp.pad(self.first(self.encode(images)), [(0, 0)] * 3 + [(1, 0)])


@pytest.fixture(params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def small_or_whole(request, monkeypatch):
    """This method as it is, or with the smallest model in place of SAM's."""
    if request.param == "small":
        monkeypatch.setitem(registry.METHODS, ("fssp", ""), Fitted)


def test_a_run_fits_once_and_goes_on_like_any(small_or_whole, tmp_path, capsys):
    """Checkpoint 1 is the last, whatever `train.steps`; a further start changes no score."""
    config = config_for(write_data(tmp_path / "data"), eval__overlays=False)
    method_recipes.apply_recipe(config, "fssp")
    config.train.steps = 3
    summary = train.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "fit        once, to all 7 slices of 32 px; encoded 8 at a time" in printed
    assert "GFLOP" not in printed and "epochs" not in printed
    spent = step_cost.read_record(tmp_path / "run")
    assert spent["kind"] == "fit" and spent["batch_size"] == 7
    assert spent["flops_per_image"]["forward"] > 0 and spent["step_bytes"]["temporaries"] > 0
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest == 1
    checkpoints.close()
    (record,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["loss"] > 0 and 1 < record["iterations"] <= 1000
    assert "learning_rate" not in record
    assert not (tmp_path / "run/training.png").exists()
    said = f"Fitted once, on all slices of the few-shot list: loss {record['loss']:.4g} after"
    assert missing_curve_text(read_run(tmp_path / "run")).startswith(said)
    seconds = 7 / record["images_per_second"]
    assert spent["step_seconds"]["median"] == pytest.approx(seconds, rel=1e-3)
    for again in (
        train.train(config, tmp_path / "run"),
        workdirs.evaluate_workdir(tmp_path / "run"),
    ):
        assert again["strict"] == summary["strict"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "mask", "choose from point, box, both"),
        ("train_encoder", "full", "does not train SAM.s encoder; set"),
    ],
)
def test_refusals(field, value, message):
    config = small_config("fssp", **{f"model__{field}": value})
    with pytest.raises(UserError, match=message):
        build.abstract_model(config.model, CLASSES)
