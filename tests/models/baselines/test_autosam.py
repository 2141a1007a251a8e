"""AutoSAM: a decoder pass for every class, all in one batch; what trains; what it starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.methods import build
from pgpsam_jax.models import losses
from pgpsam_jax.models.baselines.autosam import AutoSam
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import count, flat_paths
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.utils.files import file_digest, write_json
from tests.reference import decoder_numpy
from tests.reference.equations_numpy import sub
from tests.support import micro
from tests.support.method_runs import CLASSES, loss_falls, run_of, small_config

SAM = SamConfig.preset(micro.NAME, (32, 48), 8)
STEPS = 50


@functools.cache
def small(dtype=jnp.float32):
    """A model at its start, the same numbers whatever the compute type."""
    state = nnx.state(AutoSam(SAM, CLASSES, rngs=nnx.Rngs(0)) if dtype == jnp.float32 else small())
    model = nnx.eval_shape(lambda: AutoSam(SAM, CLASSES, dtype=dtype, rngs=ShapeOnlyRngs()))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def feature():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 32)), jnp.float32)


_segment = nnx.jit(lambda model, feature: model.segment(feature)["final"])


def segment(model, feature):
    return np.asarray(_segment(model, feature))


def test_parameters_of_the_original():
    """docs/methods.md#autosam: the decoder without its quality head, two mask tokens per class."""
    config = default_config()
    method_recipes.apply_recipe(config, "autosam")
    for classes in (5, 9):
        _, params, frozen = build.abstract_model(config.model, classes)
        assert count(params) == 3_644_832 + 2 * classes * 256
        assert count(frozen) == 87_278_848 + 2 * 128 + classes * 256


def test_a_class_is_a_pass_of_its_own(feature):
    """Against float64 numpy, one class of one image at a time; measured 1.3e-6 of the largest."""
    model = small()
    leaves = flat_paths(nnx.state(model))
    p = {path.replace("/", "."): np.asarray(leaf[...], float) for path, leaf in leaves.items()}
    decoder = sub(p, "mask_decoder")
    positions = decoder_numpy.fourier_positions(p["pe_layer.gaussian_matrix"], (4, 6))
    logits = segment(model, feature)
    assert logits.shape == (2, 16, 24, CLASSES) and logits.dtype == np.float32
    for b, k in np.ndindex(2, CLASSES):
        own = np.concatenate([decoder["iou_token"][k], decoder["mask_tokens"][k]])
        tokens, image = decoder_numpy.transformer(
            np.asarray(feature[b], float).reshape(24, 32),
            positions.reshape(24, 32),
            own,
            sub(decoder, "transformer"),
            depth=1,
            heads=2,
        )
        wanted = decoder_numpy.masks(tokens[1:2], image.reshape(4, 6, 32), decoder)[..., 0]
        error = np.abs(logits[b, ..., k] - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-5, (b, k, error)


def test_classes_and_images_know_nothing_of_each_other(feature):
    model = nnx.clone(small())
    before = segment(model, feature)
    tokens = model.mask_decoder.mask_tokens
    tokens.set_value(tokens[...].at[1].add(1.0))
    after = segment(model, feature.at[1].add(1.0))
    changed = np.abs(after - before).max(axis=(1, 2)) > 1e-3
    assert changed.tolist() == [[False, True, False], [True, True, True]]


def test_what_trains_has_a_gradient_and_nothing_else_trains():
    run = run_of("autosam", STEPS)
    slopes = run.slopes()
    every = slopes.keys() | flat_paths(run.frozen).keys()
    assert slopes.keys() == {p for p in every if p.startswith("mask_decoder") and "iou" not in p}
    assert {path for path, slope in slopes.items() if not slope.any()} == set()
    for path, slope in slopes.items():
        if "hyper_mlps" in path:  # of the second mask only the token counts, by self-attention
            assert slope[0].any() and not slope[1].any()
    assert slopes["mask_decoder/mask_tokens"].any(axis=-1).all()


@pytest.mark.slow
def test_bfloat16_is_close(feature):
    """Largest difference over largest logit: measured 0.020."""
    full, half = segment(small(), feature), segment(small(jnp.bfloat16), feature)
    assert half.dtype == np.float32
    assert np.abs(full - half).max() / np.abs(full).max() <= 0.05


def test_starts_from_sams_decoder_without_tokens_and_positions(tmp_path):
    """Of SAM's four hypernetworks the first two; mask and quality tokens and positions are new."""
    rng = np.random.default_rng(7)
    shapes = nnx.eval_shape(lambda: Sam(SamConfig.preset(micro.NAME, 64, 8), rngs=ShapeOnlyRngs()))
    tensors = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flat_paths(nnx.state(shapes)).items()
    }
    stem = tmp_path / "sam_tiny"
    save_file(tensors, f"{stem}.safetensors")
    sidecar = {"format": weights.FORMAT, "format_version": weights.FORMAT_VERSION}
    write_json(f"{stem}.json", sidecar | {"sha256": file_digest(f"{stem}.safetensors")})
    states = [
        build.init_model(small_config("autosam", model__base=base).model, CLASSES, 0)[1:3]
        for base in (str(stem), "")
    ]
    ours, fresh = (flat_paths(params) | flat_paths(frozen) for params, frozen in states)
    fitted = weights.fit_base(tensors, (4, 4), global_blocks=(1,))
    for path, leaf in ours.items():
        if path.startswith(("pe_layer", "mask_decoder/mask_tokens", "mask_decoder/iou_token")):
            wanted = fresh[path][...]
        else:
            wanted = fitted[path][:2] if "hyper_mlps" in path else fitted[path]
        np.testing.assert_array_equal(leaf[...], wanted, err_msg=path)


@jax.jit
def judge(logits, labels):
    step = TrainingPlan.from_config(small_config("autosam")).step
    return losses.entropy_and_foreground_dice({"final": logits}, labels, 0, step)


def test_loss_by_hand():
    """Against float64 numpy, to 1e-6; class 3 is absent, the background is left out of Dice."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 4, 4))
    value, parts = judge(logits, labels)
    p = np.exp(logits.astype(float))
    p /= p.sum(-1, keepdims=True)
    y = np.eye(4)[labels]
    dice = [
        (2 * (p * y)[..., k].sum() + 1) / ((p**2)[..., k].sum() + y[..., k].sum() + 1)
        for k in (1, 2, 3)
    ]
    entropy = -np.log((p * y).sum(-1)).mean()
    assert float(parts["dice"]) == pytest.approx(1 - np.mean(dice), rel=1e-6)
    assert float(value) == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-6)


def test_the_loss_is_taken_at_the_size_of_the_labels():
    coarse = np.random.default_rng(4).standard_normal((1, 4, 4, 3)).astype(np.float32)
    labels = np.zeros((1, 8, 8), np.int32)
    value, _ = judge(coarse, labels)
    fine = jax.jit(lambda x: jax.image.resize(x, (1, 8, 8, 3), "bilinear"))(coarse)
    wanted, _ = judge(fine, labels)
    assert float(value) == pytest.approx(float(wanted), rel=1e-6)


def test_the_optimizer_is_plain_adam_at_a_constant_rate():
    config = small_config("autosam")
    rates = TrainingPlan.from_config(config).learning_rates(126)
    np.testing.assert_array_equal(rates, np.float32(5e-4))
    params = {"a": np.ones(3, np.float32)}
    optimizer = TrainingPlan.from_config(config).make_optimizer(126)
    update = jax.jit(lambda slope, p: optimizer.update(slope, optimizer.init(p), p)[0])
    updates = update({"a": np.zeros(3, np.float32)}, params)
    np.testing.assert_array_equal(updates["a"], 0)  # no weight decay


def test_training_lowers_the_loss():
    """Fifty steps on squares, encoder random and frozen: measured 1.754 to 1.211."""
    found = loss_falls("autosam", STEPS)
    assert found[-1] < 0.8 * found[0]
