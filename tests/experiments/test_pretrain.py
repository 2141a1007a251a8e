"""The small SAM of the phantom's tables: what is asked of it in training, and its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import pretrain
from pgpsam_jax.models.baselines.sam_oracle import OracleSam
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.models.sam.weights import TrainedFor, load_base
from pgpsam_jax.models.segmenter import to_input
from tests.support import micro

SIZE, DRAWS = 32, 64


def asked(labels):
    """Masks, points and boxes of many draws for one slice, on the host."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.tree.map(
        np.asarray, jax.jit(jax.vmap(pretrain.sample_prompts, (0, None)))(keys, labels)
    )


def test_a_class_of_the_slice_is_asked_for_by_a_point_within_and_a_box_about_it():
    labels = np.zeros((SIZE, SIZE), np.int32)
    labels[3:12, 5:25] = 4
    labels[20:30, 8:18] = 7
    labels[15:17, 2:4] = 9  # too small
    masks, points, boxes = asked(jnp.asarray(labels))
    seen = set()
    for mask, (x, y), box in zip(masks, points.astype(int), boxes, strict=True):
        (chosen,) = np.unique(labels[mask == 1])
        seen.add(int(chosen))
        np.testing.assert_array_equal(mask, labels == chosen)
        assert mask[y, x] == 1
        rows, columns = np.nonzero(mask)
        tight = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
        sides = np.tile(tight[2:] - tight[:2], 2)
        assert (np.abs(box - tight) <= 0.1 * sides + 1e-5).all()
    assert seen == {4, 7}
    assert len(np.unique(boxes, axis=0)) == DRAWS


def test_of_a_slice_without_organs_all_is_asked_for():
    masks, _, _ = asked(jnp.zeros((SIZE, SIZE), jnp.int32))
    assert masks.all()


def test_it_is_trained_on_the_colors_that_its_files_name(tmp_path):
    """As the methods that prompt it show it a slice: the same masks for the same boxes."""
    colors = pretrain.sam_config(SIZE).encoder.colors
    config = SamConfig.preset(micro.NAME, SIZE, 8, colors=colors)
    model = Sam(config, rngs=nnx.Rngs(0))
    labels = np.zeros((1, SIZE, SIZE), np.int32)
    labels[0, 4:20, 6:25] = 1
    image = jnp.asarray(np.random.default_rng(0).random((1, SIZE, SIZE), np.float32))
    prompted = OracleSam(config, 2, prompt="box", rngs=nnx.Rngs(0))
    nnx.update(prompted, nnx.state(model))
    box = jnp.array([[6.0, 4.0, 24.0, 19.0]])

    @nnx.jit
    def masks(model, prompted):
        ours, _ = model.predict(model.encode_image(to_input(image)), boxes=box, multimask=False)
        return ours, prompted.predict(to_input(image), jnp.asarray(labels))[..., 1:]

    got, wanted = masks(model, prompted)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    pretrain.store(model, tmp_path / "small")
    assert colors == TrainedFor.of(tmp_path / "small").colors == "normalized"


def test_its_files_are_a_base(tmp_path, capsys):
    model = Sam(SamConfig.preset(micro.NAME, SIZE, 8), rngs=nnx.Rngs(0))
    pretrain.store(model, tmp_path / "new" / "small")
    base = load_base(tmp_path / "new" / "small")
    leaves = flat_paths(nnx.state(model))
    assert base.tensors.keys() == leaves.keys()
    assert all(np.array_equal(base.tensors[path], leaf[...]) for path, leaf in leaves.items())
    assert (base.meta["variant"], base.meta["image_size"]) == ("custom", SIZE)
    assert "no published SAM" in base.meta["source"]
    assert "small.safetensors" in capsys.readouterr().out


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--steps", "0"])
    assert stop.value.code == 2 and "--steps" in capsys.readouterr().err
