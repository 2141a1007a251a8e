"""`model.class_tokens=sam`: each class's mask token and hypernetwork start as copies of SAM's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.config import default_config, serialization, use_small_encoder
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build, pretrained
from pgpsam_jax.methods.registry import METHODS
from pgpsam_jax.models.parameters import flat_paths, under
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from tests.support import micro
from weights_conversion import sam as conversion

CLASSES, SIZE, TOKEN, SCALE = 3, 32, 2, 0.1
FROM_SAM = [key for key, method in METHODS.items() if method.class_tokens]


@pytest.fixture(scope="module")
def tensors():
    """A SAM with random weights, trained biases too."""
    model = Sam(SamConfig.preset(micro.NAME, SIZE, 8), rngs=nnx.Rngs(3))
    rng = np.random.default_rng(3)
    return {
        path: np.asarray(leaf[...]) + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flat_paths(nnx.state(model)).items()
    }


@pytest.fixture(scope="module")
def base(tensors, tmp_path_factory):
    """Stem of it; the first token that was trained is the third."""
    stem = tmp_path_factory.mktemp("base") / "sam"
    conversion.store(stem, tensors, {}, trained={"mask_tokens": [3, TOKEN]})
    return str(stem)


def settings_of(base, key, class_tokens="sam", **fields):
    made = default_config()
    use_small_encoder(made)
    made.model.update(name=key[0], preset=key[1] or "paper", encoder=micro.NAME, image_size=SIZE)
    made.model.update(base=base, train_encoder="lora", stage_taps=(1,), class_tokens=class_tokens)
    made.model.update(**fields)
    return made.model


def leaves_of(settings, seed=0):
    _, params, frozen, _ = build.init_model(settings, CLASSES, seed)
    leaves = flat_paths(params) | flat_paths(frozen)
    return {path: np.asarray(leaf[...]) for path, leaf in leaves.items()}


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


def test_which_methods_have_them():
    names = "pgpsam/paper pgpsam/plus samed hsam autosam samlst"
    assert {"/".join(filter(None, key)) for key in FROM_SAM} == set(names.split())


@pytest.mark.parametrize("key", FROM_SAM, ids="_".join)
def test_they_start_near_sam_s_and_all_else_as_ever(base, tensors, key):
    found, drawn = leaves_of(settings_of(base, key)), leaves_of(settings_of(base, key, "random"))
    changed = METHODS[key].class_tokens
    assert all(any(under(path, (prefix,)) for path in found) for prefix in changed)
    for path, value in found.items():
        if not under(path, changed):
            np.testing.assert_array_equal(value, drawn[path], err_msg=path)
            continue
        wanted = tensors[path][TOKEN]
        noise = value - wanted  # broadcast over classes
        assert len(value) == CLASSES and value.dtype == np.float32
        if path.endswith("bias"):  # which start at zero
            np.testing.assert_array_equal(noise, 0)
            continue
        np.testing.assert_allclose(rms(noise), SCALE * rms(wanted), rtol=1e-4)
        cosine = np.vdot(noise, drawn[path]) / np.linalg.norm(noise) / np.linalg.norm(drawn[path])
        assert cosine > 0.999  # the random initialization, made small
        assert all((value[i] != value[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_seed_and_the_scale_decide_the_noise(base, tensors):
    path, key = "mask_decoder/mask_tokens", ("samed", "")
    one, again, other = (leaves_of(settings_of(base, key), seed)[path] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    exact = leaves_of(settings_of(base, key, start_scale=0.0))[path]
    np.testing.assert_array_equal(exact, np.broadcast_to(tensors[path][TOKEN], exact.shape))


def test_classes_part_at_the_first_step(base):
    """Even exact copies: every class has labels of its own."""
    settings = settings_of(base, ("samed", ""), start_scale=0.0)
    graphdef, params, frozen, _ = build.init_model(settings, CLASSES, 0)
    rng = np.random.default_rng(0)
    feature = jnp.asarray(rng.standard_normal((1, 4, 4, 32), np.float32))
    labels = jnp.asarray(rng.integers(0, CLASSES, (1, 16, 16)))

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = nnx.merge(graphdef, params, frozen).segment(feature)["final"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    found = flat_paths(gradient(params))
    for path in ("mask_decoder/mask_tokens", "mask_decoder/hyper_mlps/layers/0/kernel"):
        each = np.asarray(found[path][...]).reshape(CLASSES, -1)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert np.linalg.norm(each[i] - each[j]) > 0.1 * np.linalg.norm(each[i])


def test_frozen_ones_come_back_from_the_workdir(base, tmp_path):
    """SAM-LST never trains them: a workdir holds what no converted SAM has."""
    settings = settings_of(base, ("samlst", ""))

    def pinned(seed):
        _, _, frozen, digest = build.init_model(settings, CLASSES, seed)
        own = pretrained.randomly_initialized_frozen_params(settings, frozen)
        frozen_weights.pin_frozen_weights(tmp_path, base, digest, frozen, own)
        return flat_paths(frozen)

    first, restored = pinned(5), pinned(None)
    assert "mask_decoder/mask_tokens" in first
    for path, leaf in first.items():
        np.testing.assert_array_equal(restored[path][...], leaf[...], err_msg=path)


@pytest.mark.parametrize("key", [key for key in METHODS if key not in FROM_SAM], ids="_".join)
def test_methods_without_them_refuse(base, key):
    with pytest.raises(UserError, match=r"has no mask token of a class on SAM's decoder; set it"):
        build.abstract_model(settings_of(base, key, train_encoder="frozen"), CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": ""}, r"model\.class_tokens is 'sam', but model\.base is empty"),
        ({"class_tokens": "meta"}, r"is 'meta'; choose from random, sam"),
    ],
)
def test_other_settings_are_refused(base, fields, message):
    settings = settings_of(base, ("samed", ""))
    settings.update(fields)
    with pytest.raises(UserError, match=message):
        build.abstract_model(settings, CLASSES)


def test_runs_of_before_had_random_ones():
    stored = json.loads(json.dumps(serialization.to_json(default_config())))
    del stored["model"]["class_tokens"]
    assert serialization.from_json(stored).model.class_tokens == "random"
