"""SAMed: sizes, outputs, what trains, the loss on squares. Its parts are tested where they are."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.methods import build
from pgpsam_jax.models.parameters import count, flat_paths
from pgpsam_jax.models.segmenter import to_input
from tests.support.method_runs import CLASSES, SIZE, loss_falls, run_of, small_config

# Registered, and read by nothing, here as in the original.
IDLE = r"mask_decoder/iou_head/|prompt_encoder/(point|not_a_point|mask_down)"


def test_parameters_are_those_of_the_original():
    """ViT-b, 512 px, 9 classes: LoRA on q and v of 12 blocks, prompt encoder, decoder."""
    config = default_config()
    method_recipes.apply_recipe(config, "samed")
    _, params, _ = build.abstract_model(config.model, 9)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat_paths(params).items()}
    lora = sum(size for path, size in sizes.items() if "/lora/" in path)
    prompts = sum(size for path, size in sizes.items() if path.startswith("prompt_encoder/"))
    assert (lora, prompts, count(params)) == (147_456, 6_220, 4_913_621)
    assert all("/lora/" in path for path in sizes if path.startswith("image_encoder/"))


def test_which_parameters_receive_a_gradient():
    """All but the idle ones; biases of keys none but rounding, as no softmax sees them."""
    run = run_of("samed")
    start, rng = run.states[0], np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf, start.params)
    for path, leaf in flat_paths(params).items():
        if path.endswith("/lora/b"):  # 0 at the start, when `a` has no gradient yet
            leaf.set_value(jnp.float32(0.1 * rng.standard_normal(leaf.shape)))
    slopes = run.slopes(dataclasses.replace(start, params=params))
    assert slopes.keys() == flat_paths(start.params).keys()
    found = {path: float(np.linalg.norm(slope)) for path, slope in slopes.items()}
    none = {path for path, size in found.items() if size == 0}
    keys_only = {n for n in found if n.endswith("k_proj/bias")}
    assert none - keys_only == {path for path in found if re.search(IDLE, path)}
    for name in keys_only:
        assert found[name] < 1e-4 * found[name.replace("bias", "kernel")] + 1e-9, name


def test_outputs_have_four_by_four_pixels_a_token():
    graphdef, *states = build.abstract_model(small_config("samed").model, CLASSES)
    image = jax.ShapeDtypeStruct((2, SIZE, SIZE), jnp.float32)

    def run(params, frozen, image):
        return jax.tree.leaves(nnx.merge(graphdef, params, frozen)(to_input(image)))

    (final,) = jax.eval_shape(run, *states, image)
    assert (final.shape, final.dtype) == ((2, SIZE // 2, SIZE // 2, CLASSES), jnp.float32)


def test_the_loss_begins_to_fall():
    loss_falls("samed")


@pytest.mark.slow
def test_the_loss_falls():
    """Beyond the best answer that does not look at the image, 0.53 of Dice."""
    values = loss_falls("samed", steps=80)
    assert values[-1] < 0.2 * values[0], values  # measured 0.17
