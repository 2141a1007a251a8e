"""Every config file fits the code: model, data settings and one train step, by shapes alone."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from pgpsam_jax.config import exclusive_fields, serialization
from pgpsam_jax.data.dataset import find_split, label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import make_predict_step
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models import parameters
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.training.train_step import make_train_step
from tests.support import micro
from tests.support.places import REPOSITORY, shared

CONFIGS = [
    ("synapse", ()),
    ("ventricle", ()),
    ("ventricle", ("head_mr",)),
    ("synapse_release", ()),
    ("ventricle_release", ()),
    ("phantom", ()),
    ("abdomen_ct", ()),
    ("abdomen_ct", ("small",)),
    ("abdomen_ct", ("lite_medsam",)),
    ("hippocampus", ()),
    ("hippocampus", ("20slices",)),
    ("phantom_lite_medsam", ()),
    ("baseline", ("samed",)),
    ("baseline", ("hsam",)),
    ("baseline", ("autosam",)),
    ("baseline", ("samlst",)),
    ("baseline", ("surgicalsam",)),
    ("baseline", ("fssp",)),
    ("baseline", ("sam",)),
    ("baseline", ("unet",)),
    ("baseline", ("unet_large",)),
]


def load(name, arguments=()):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments), module.__doc__


def test_all_config_files_are_listed():
    files = {path.stem for path in (REPOSITORY / "configs").glob("*.py")}
    assert files == {name for name, _ in CONFIGS}


# Tracing a step of ViT-b takes ten seconds, of one stage of a small encoder two.
SMALL = dict(encoder=micro.NAME, base="", image_size=32, patch_size=8, stage_taps=(0,))
# PGP-SAM again, with other data or as released: here on a small encoder, below as they are.
AGAIN = ("ventricle", "synapse_release", "ventricle_release", "phantom", "abdomen_ct")
AGAIN += ("hippocampus", "phantom_lite_medsam")


@functools.cache
def synapse():
    """What its file makes of settings and model, for several tests."""
    settings, _ = load("synapse")
    return settings, build.abstract_model(settings.model, 9)


@pytest.mark.parametrize(("name", "arguments"), CONFIGS)
def test_a_config_makes_model_optimizer_and_settings_of_a_step(name, arguments, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings, record = load(name, arguments)
    for word in ("Command:", "Data:"):
        assert word in record
    assert settings.data.root in ("", f"datasets/{settings.data.root[9:]}")  # none from elsewhere
    classes, sizes = label_table(settings.data).num_classes, settings.model
    whole = SamConfig.preset(sizes.encoder, sizes.image_size, sizes.patch_size).encoder
    assert max(sizes.stage_taps, default=0) < len(whole.tap_widths)
    if name in AGAIN:
        sizes.update(SMALL)
    made = synapse()[1] if name == "synapse" else build.abstract_model(settings.model, classes)
    graphdef, params, _ = made
    optimizer = TrainingPlan.from_config(settings).make_optimizer(126)
    jax.eval_shape(lambda p: init_state(p, optimizer, seed=0, epoch_size=126), params)
    make_train_step(graphdef, optimizer, TrainingPlan.from_config(settings).step)


TINY_VIT = dict(encoder="tiny_vit", base="", image_size=64, patch_size=4)
STEPS = [("baseline", ("autosam",), SMALL), ("baseline", ("samed",), TINY_VIT)]
STEPS += [("baseline", ("unet",), dict(image_size=32))]
STEPS += [pytest.param(*config, {}, marks=pytest.mark.slow) for config in CONFIGS]
STEPS += [
    pytest.param(*config, TINY_VIT, marks=pytest.mark.slow)
    for config in CONFIGS
    if config[0] in ("synapse", "synapse_release", "baseline")
    and config[1] not in (("samed",), ("unet",), ("unet_large",))
]


@pytest.mark.parametrize(("name", "arguments", "model"), STEPS)
def test_one_step_by_shapes(name, arguments, model, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings, _ = load(name, arguments)
    settings.model.update(model)
    settings.train.encoded_copies = 0  # a batch of slices, not of features
    classes = label_table(settings.data).num_classes
    graphdef, params, frozen = build.abstract_model(settings.model, classes)
    optimizer = TrainingPlan.from_config(settings).make_optimizer(126)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, seed=0, epoch_size=126), params)
    size, batch = settings.model.image_size, settings.train.batch_size
    slices = jax.ShapeDtypeStruct((batch, size, size), jnp.float16)
    labels = jax.ShapeDtypeStruct((batch, size, size), jnp.uint8)
    oracle = registry.method_of(settings.model).oracle
    if not oracle:
        step = make_train_step(graphdef, optimizer, TrainingPlan.from_config(settings).step)
        after, metrics = jax.eval_shape(step, state, frozen, {"image": slices, "label": labels})
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    told = (labels,) if oracle else ()
    logits = jax.eval_shape(make_predict_step(graphdef), params, frozen, slices, *told)
    grid = size // settings.model.patch_size
    # H-SAM's are the mean of outputs of two sizes.
    side = size if settings.model.name in ("hsam", "unet") else 4 * grid
    assert logits.shape == (batch, side, side, classes)


def test_the_synapse_config_is_the_paper_run():
    settings, (_, params, frozen) = synapse()
    assert settings.optim.learning_rate == 3e-3 and settings.optim.weight_decay == 0.1
    assert settings.train.batch_size == 12 and settings.train.epochs == 300
    assert settings.model.image_size == 512 and settings.model.lora_rank == 4
    assert TrainingPlan.from_config(settings).total_steps(126) == 3150
    paths = parameters.flat_paths(params)
    encoder = [p for p in paths if p.startswith("image_encoder")]
    assert encoder and all("/lora/" in p for p in encoder)
    assert sum(math.prod(paths[p].shape) for p in encoder) == 147_456
    assert "total" in parameters.report(params, frozen)


@pytest.mark.parametrize(
    "budget, wanted", [("1volumes", ("volumes", 1, None)), ("100slices", ("random", None, 100))]
)
def test_budgets_of_the_hippocampus_config(budget, wanted):
    settings, _ = load("hippocampus", (budget,))
    exclusive_fields.check_run_settings(settings)
    assert (settings.fewshot.rule, settings.fewshot.volumes, settings.fewshot.count) == wanted
    for wrong in ("volumes", "0volumes", "5 volumes", "5persons", ""):
        with pytest.raises(ValueError, match="Nvolumes or Nslices"):
            load("hippocampus", (wrong,))


@pytest.mark.golden
def test_the_hippocampus_split_is_by_person(monkeypatch):
    """About 60 volumes of persons that are not trained on, on the 200 volumes at hand."""
    settings, _ = load("hippocampus")
    settings.data.root = str(shared("data/msd_hippocampus"))
    monkeypatch.chdir(REPOSITORY)
    split = find_split(settings.data)
    parts = [split.train, split.validation, split.test]
    assert sum(map(len, parts)) == 200
    persons = [{(int(case.case_id[-3:]) + 1) // 2 for case in part} for part in parts]
    assert sum(map(len, persons)) == len(set.union(*persons)) == 132
    assert abs(len(split.test) - 60) <= 5 and [len(p) for p in persons[1:]] == [13, 40]


def test_stored_configurations_round_trip():
    settings, _ = load("abdomen_ct", ("small",))
    again = serialization.from_json(serialization.to_json(settings))
    assert serialization.to_json(again) == serialization.to_json(settings)
    with pytest.raises(UserError, match="does not fit this version"):
        serialization.from_json({"no_such_section": {"a": 1}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 500, "not divisible by the patch size 16"),
        ("encoder", "vit_x", "choose one of"),
        ("train_encoder", "some", "choose one of"),
        ("name", "vnet", "choose from pgpsam/paper"),
        ("lora_targets", ("q", "x"), "unknown; choose from"),
        ("stage_taps", (99,), "must be indices from 0 to 11"),
        ("compute_dtype", "float8", "choose float32 or bfloat16"),
    ],
)
def test_settings_that_make_no_model(field, value, message):
    settings, _ = load("synapse")
    settings.model[field] = value
    with pytest.raises(UserError, match=message):
        build.abstract_model(settings.model, 9)
