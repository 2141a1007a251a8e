"""The numpy transcription of the release's model, and the small golden set computed with it.

The stored outputs, losses and gradients are those of the transcription, and the transcription is
what the authors' code computes, as far as that is recorded.
"""

import json
import runpy

import numpy as np
import pytest

from tests.reference import release_numpy
from tests.reference.golden import golden_rule
from tests.reference.release_state import VIT_B, release_shapes
from tests.support.places import REPOSITORY, shared

STEM = REPOSITORY / "tests" / "reference" / "golden" / "release_small"
STORED = 1e-6  # float32 storage of float64 results
RECORDED = 1e-4  # the record is float32 from end to end; its own rounding reaches 7e-5
EPOCH = 10


def relative(got, expected) -> float:
    """Relative L2 error of an image's array to a recorded batch of one."""
    assert got.shape == expected.shape[1:]
    return np.linalg.norm(got - expected[0]) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def small():
    """Description, stored arrays, weights, image and labels of the small set."""
    meta = json.loads(STEM.with_suffix(".json").read_text())
    shapes, size, seed = meta["state_dict"].items(), meta["image_size"], meta["seed"]
    weights = {name: golden_rule.tensor(name, s, seed).astype(float) for name, s in shapes}
    image = golden_rule.image(1, size, seed)[0].astype(float)
    labels = golden_rule.labels(1, size, meta["num_classes"], seed)[0]
    return meta, np.load(STEM.with_suffix(".npz")), weights, image, labels


def total(weights, image, labels):
    return release_numpy.loss(release_numpy.forward(image, weights), labels, EPOCH)["total"]


def flattened(loss):
    return {**loss.pop("pre"), **{f"final {k}": v for k, v in loss.pop("final").items()}, **loss}


def null_names(meta):
    return [name for name, pair in meta["gradients"].items() if pair is None]


def test_forward_pass_gives_the_stored_outputs_and_losses(small):
    meta, stored, weights, image, labels = small
    out = release_numpy.forward(image, weights)
    loss = flattened(release_numpy.loss(out, labels, EPOCH))
    assert loss == pytest.approx(flattened(dict(meta["loss"])), rel=1e-7)
    out["logits_pre_32"] = out.pop("logits_pre")
    out["logits_final_64_stride4"] = out.pop("logits_final")[:, ::4, ::4]
    assert out.keys() == set(stored.files)
    for name, array in out.items():
        assert stored[name].dtype == np.float32
        assert relative(array, stored[name]) <= STORED, name


def test_gradients_are_the_slopes_of_the_loss(small):
    """Central differences along the probes, of one sign draw after the other for all tensors."""
    meta, _, weights, image, labels = small
    products = {name: pair[1] for name, pair in meta["gradients"].items() if pair}
    probes = {
        name: golden_rule.tensor(f"probe.{name}.kernel", weights[name].shape) for name in products
    }
    rng, h = np.random.default_rng(0), 1e-7
    for _ in range(8):
        sign = dict(zip(products, rng.choice([-1, 1], len(products)), strict=True))

        def at(step, sign=sign):
            moved = {name: weights[name] + step * sign[name] * probes[name] for name in products}
            return total(weights | moved, image, labels)

        slope = sum(sign[name] * products[name] for name in products)
        assert (at(h) - at(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)


def test_tensors_without_gradient_are_never_read(small):
    meta, _, weights, image, labels = small
    null = set(null_names(meta))
    assert {name.split(".")[1] for name in null} == {
        "transformer",  # the cosine attention's discarded branch
        "mask_norm",
        "mask_proj1",
        "mask_proj2",
    }
    poisoned = {name: np.full_like(weights[name], np.nan) for name in null}
    assert total(weights | poisoned, image, labels) == total(weights, image, labels)


def test_all_but_the_frozen_encoder_trains(small):
    meta = small[0]
    trainable = [n for n in meta["state_dict"] if "lora" in n or not n.startswith("image_encoder.")]
    assert meta["trainable"] == trainable == list(meta["gradients"])


@pytest.mark.golden
def test_recorded_set_has_the_same_null_gradients_and_trainable_names(small):
    """Of the names that both sizes have; the larger one has more blocks and classes."""
    record = json.loads(shared("golden/release_synapse.json").read_text())
    both = set(record["state_dict"]) & set(small[0]["state_dict"])
    for part in (lambda meta: meta["trainable"], null_names):
        assert both & set(part(record)) == both & set(part(small[0]))


@pytest.mark.golden
def test_transcription_gives_what_the_authors_code_gave():
    """From the recorded outputs of the encoder to the final logits, at the published size."""
    recorded = np.load(shared("golden/release_synapse.npz"))
    rule = runpy.run_path(str(shared("golden/golden_weights.py")))
    weights = {
        name: rule["tensor"](name, shape, 0).astype(float)
        for name, shape in release_shapes(VIT_B).items()
        if not name.startswith("image_encoder.")
    }
    neck, *taps = (
        recorded[f"image_encoder.{name}"][0].astype(float)
        for name in ("neck", "tap_first", "tap_last")
    )
    out = release_numpy.decode(neck, taps, weights)
    assert len(out) == len(recorded.files) - 5  # three of the encoder, two more of the logits
    for name, array in out.items():
        assert relative(array, recorded[name]) <= RECORDED, name
    out["logits_pre"] = out["mask_decoder.call0.out0"]
    out["logits_final"] = release_numpy.resize(out["mask_decoder.call2.out0"], 512, 512)
    loss = release_numpy.loss(out, rule["labels"](1, 512, 9, 0)[0], EPOCH)
    expected = json.loads(shared("golden/release_synapse.json").read_text())["loss"]
    assert flattened(loss) == pytest.approx(flattened(expected), rel=2e-6)
