"""What the blocks of an encoder send on meshes, as compiled, and the gradients that come of it."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.sam.image_encoder import ImageEncoder
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.sharding import device_mesh

# Two blocks of an encoder, the second global; sizes of which few arrays share a number.
BATCH, ROWS, WIDTH, OUT = 8, 64, 40, 24
ACTIVATION = ROWS * WIDTH  # numbers of one image between blocks
QKV, PROJ, LIN = 3 * WIDTH**2, WIDTH**2, 4 * WIDTH**2
# Patch embedding, positions, neck: gathered once.
ENDS = [8 * 8 * 3 * WIDTH, ACTIVATION, WIDTH * OUT, 9 * OUT**2]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@functools.cache
def encoder_gradients(sizes):
    """The compiled gradients to LoRA, on a mesh, and the shapes that they take."""
    config = SamConfig.preset(
        "vit_t",
        64,
        8,
        width=WIDTH,
        depth=2,
        heads=4,
        global_blocks=(1,),
        window_size=4,
        out_channels=OUT,
    ).encoder
    model = nnx.eval_shape(lambda: ImageEncoder(config, LoraConfig(2), rngs=ShapeOnlyRngs()))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def gradients(lora, rest, images):
        def loss(lora):
            embedding, outputs = nnx.merge(graphdef, lora, rest)(images, (0, 1))
            return sum(jnp.sin(x).sum() for x in (embedding, *outputs))

        return jax.grad(loss)(lora)

    mesh = device_mesh.make_mesh(*sizes)
    placed = [device_mesh.state_shardings(state, mesh) for state in (lora, rest)]
    step = jax.jit(
        device_mesh.traced_on(mesh)(gradients),
        in_shardings=(*placed, device_mesh.batch_sharding(mesh)),
        out_shardings=placed[0],
    )
    images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32)
    return step.lower(lora, rest, images).compile(), (lora, rest, images), placed, mesh


def encoder_collectives(sizes) -> dict:
    """What they send: kind -> numbers in the results, of the compiled program."""
    found = {kind: Counter() for kind in KINDS}
    for line in encoder_gradients(sizes)[0].as_text().splitlines():
        operation = re.search(r" = (.*?) ([a-z-]+?)(-start)?\(", line)
        if operation and operation[2] in KINDS:
            for shape in re.findall(r"\w+\[([\d,]+)\]", operation[1]):
                found[operation[2]][math.prod(map(int, shape.split(",")))] += 1
    return {kind: counted for kind, counted in found.items() if counted}


def test_windows_stay_on_the_device_of_their_image():
    """Split by rows only, nothing is sent but the gradients of LoRA."""
    found = encoder_collectives((8, 1, 1))
    assert set(found) == {"all-reduce"}, found
    assert max(found["all-reduce"]) <= 2 * 2 * WIDTH


def test_fsdp_gathers_a_weight_for_each_pass_and_no_activation():
    """The first block's qkv has no backward product: nothing trains below it."""
    found = encoder_collectives((2, 4, 1))
    assert set(found) == {"all-reduce", "all-gather"}, found
    assert found["all-gather"] == Counter({PROJ: 4, LIN: 8, QKV: 3}) + Counter(ENDS)
    assert max(found["all-reduce"]) <= 2 * 2 * WIDTH


def test_tensor_parallel_blocks_sum_activations_twice_a_pass():
    """Forward behind proj and lin2, backward before lin1 and qkv, but for the first block's."""
    found = encoder_collectives((2, 1, 4))
    assert set(found) == {"all-reduce", "all-gather", "all-to-all"}, found
    sums = found["all-reduce"]
    local = BATCH // 2
    assert sums.pop(local * ACTIVATION) == 7
    assert max(sums) <= local * ROWS * 2  # LoRA's rank
    assert found["all-gather"] == Counter(ENDS)
    # Parts of qkv's inputs for parts of its outputs: a quarter of it, once in each pass.
    sent = sum(size * count for size, count in found["all-to-all"].items())
    assert sent == 3 * QKV // 4


def test_blocks_on_meshes_have_the_gradients_of_each_other():
    """Split by rows, with weights gathered, and by heads; relative to an array's largest."""
    found = []
    for sizes in ((8, 1, 1), (2, 4, 1), (2, 1, 4)):
        compiled, shapes, placed, mesh = encoder_gradients(sizes)
        rng = np.random.default_rng(4)
        lora, rest, images = jax.tree.map(
            lambda leaf, rng=rng: np.float32(rng.normal(0, 0.3, leaf.shape)), shapes
        )
        states = jax.device_put((lora, rest), tuple(placed))
        images = jax.device_put(images, device_mesh.batch_sharding(mesh))
        found.append([np.asarray(leaf) for leaf in jax.tree.leaves(compiled(*states, images))])
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert np.abs(ours).max() > 0
            assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(ours).max()
