"""Gradients of every module against central differences, in float64.

Each module is small, all its parameters are random, and every parameter and input is moved by
itself, along its gradient and a random direction together. So a wrong gradient of any of them is
seen, however little it adds to the whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.models import losses
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.pgpsam import cfm, ppg, ppr
from pgpsam_jax.models.pgpsam_release import cfm as release_cfm
from pgpsam_jax.models.pgpsam_release import mask_decoder as release_decoder
from pgpsam_jax.models.pgpsam_release import ppg as release_ppg
from pgpsam_jax.models.pgpsam_release import ppr as release_ppr
from pgpsam_jax.models.sam import mask_decoder
from pgpsam_jax.models.sam.attention import attention
from pgpsam_jax.models.sam.attention_kernels import attend
from pgpsam_jax.models.sam.image_encoder import EncoderConfig, ImageEncoder
from pgpsam_jax.models.sam.lora import LoraConfig, LoraQKV

STEP = 1e-6
TOLERANCE = 2e-6  # of a leaf's gradient, see `check`; the largest found is 7e-7
B, H, W, C, K, Q, D = 2, 4, 5, 16, 3, 6, 12
DECODER = mask_decoder.DecoderConfig(width=C, depth=2, heads=2, mlp_dim=16)
ENCODER = EncoderConfig(
    grid=(5, 4),
    patch_size=4,
    width=D,
    depth=2,
    heads=2,
    global_blocks=(1,),
    window_size=3,
    out_channels=C,
    attention="lean",
)


def make(module, *args, **kwargs):
    return module(*args, dtype=jnp.float64, rngs=nnx.Rngs(0), **kwargs)


def feature(channels=C):
    return B, H, W, channels


# name -> (module, shapes of its inputs). Integer inputs are part of the call.
MODULES = {
    "lora": (lambda: make(LoraQKV, D, LoraConfig(2)), [(B, 3, D)]),
    "cfm": (lambda: make(cfm.ContextualFeatureModulation, D, C, k=3, enabled=True),
            [feature(D), feature()]),
    "ppr": (lambda: make(ppr.PrototypeRefinement, C, K, 2, (H, W)),
            [feature(), feature(K), (B, K, C), (B, Q, C)]),
    "ppg": (lambda: make(ppg.PromptGenerator, C, K, Q), [feature(), (B, K, C), (B, Q, C)]),
    "mask decoder": (lambda: make(mask_decoder.MaskDecoder, DECODER, K, iou_head=False),
                     [feature(), (H, W, C), (B, K, C), feature()]),
    "encoder": (lambda: make(ImageEncoder, ENCODER, LoraConfig(2)), [(B, 20, 16, 3)]),
    "release csm": (lambda: make(release_cfm.ChannelSemantics, C), [feature()]),
    "release cfm": (lambda: make(release_cfm.ContextualFeatureModulation, D, C, k=3),
                    [feature(D), feature()]),
    "release ppr": (lambda: make(release_ppr.PrototypeRefinement, C, K, Q, 2, (H, W)),
                    [feature(), feature(K), feature(K), (B, K, C), (B, Q, C)]),
    "release ppg": (lambda: make(release_ppg.PromptGenerator, C, K, Q, dcn="deformable"),
                    [feature(), (B, K, C), (B, Q, C), feature(K)]),
    "release decoder": (
        lambda: make(release_decoder.MaskDecoder, DECODER, K, (H, 4), token_order="released"),
        [(B, H, 4, C), (B, K, C), (B, H, 4, C), (B, 4 * H, 16, C // 8), (B, H, 4, K), (B, H, 4, K)],
    ),
}  # fmt: skip


def output_of(name, module, inputs):
    """What the module returns, all of it real numbers."""
    if name == "mask decoder":
        masks, image, _ = module.run(*inputs)
        return module.masks(masks, image), mask_decoder.class_features(masks, image)
    if name == "release decoder":
        *prompts, up, classes, low = inputs
        return module(*prompts, (up, classes, low, jax.nn.softmax(low)))
    if name == "encoder":
        return jax.tree.leaves(module(*inputs, taps=(0, 1)))
    return [x for x in jax.tree.leaves(module(*inputs)) if x.dtype != jnp.int32]  # but for picks


def check(function, leaves):
    """The gradient of `function`, of a dictionary of arrays, to each of them; the largest error.

    It is relative to the length of the leaf's gradient or, if more, a thousandth of the longest:
    some biases do not matter at all.
    """
    both, leaves = jax.jit(jax.value_and_grad(function)), jax.device_put(leaves)
    gradients = jax.tree.map(np.asarray, both(leaves)[1])
    lengths = {name: np.linalg.norm(gradient) for name, gradient in gradients.items()}
    rng, longest, errors = np.random.default_rng(7), max(lengths.values()), {}
    for name, leaf in leaves.items():
        away = rng.standard_normal(leaf.shape)
        away = away / np.linalg.norm(away) + gradients[name] / max(lengths[name], 1e-300)
        ends = (float(both(leaves | {name: leaf + step * away})[0]) for step in (STEP, -STEP))
        difference = np.subtract(*ends) / (2 * STEP)
        error = abs((gradients[name] * away).sum() - difference)
        errors[name] = error / max(lengths[name], 1e-3 * longest)
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, (worst, errors[worst])
    return errors[worst]


def weighed(outputs):
    """One number of all outputs, each of which it depends on."""
    rng = np.random.default_rng(5)
    assert all(x.dtype == jnp.float64 for x in outputs)
    return sum((x * rng.standard_normal(x.shape)).sum() for x in outputs)


# Plain layers in long rows, and long to compile: the rules of differentiation that are our own are
# in attention, and of deformable convolutions in `test_deform`. Those of the release are also held
# against the authors' gradients, by `test_release_parity`.
SLOW = {"mask decoder", "cfm", "encoder"}
SLOW |= {f"release {part}" for part in ("cfm", "ppr", "ppg", "decoder")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODULES]
)
def test_of_a_module(name):
    with jax.enable_x64(True):
        make_module, shapes = MODULES[name]
        graphdef, state = nnx.split(nnx.eval_shape(make_module))
        rng = np.random.default_rng(3)
        leaves = {path: draw(rng, leaf.shape) for path, leaf in flat_paths(state).items()}
        leaves |= {f"input {i}": rng.standard_normal(shape) for i, shape in enumerate(shapes)}

        def value(leaves):
            moved = jax.tree.map(lambda leaf: leaf, state)
            for path, leaf in flat_paths(moved).items():
                leaf.set_value(leaves[path])
            inputs = [leaves[f"input {i}"] for i in range(len(shapes))]
            return weighed(output_of(name, nnx.merge(graphdef, moved), inputs))

        print(name, check(value, leaves))


def draw(rng, shape):
    """A parameter: a scale around one, or a kernel that keeps what it multiplies of that size."""
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 1
    return rng.standard_normal(shape) * max(fan_in, 4) ** -0.5 + (len(shape) < 2)


@pytest.mark.parametrize("backend", ["naive", "folded", "lean"])
@pytest.mark.parametrize("window", [(3, 4), (4, 5)], ids=["whole", "overhangs"])
def test_of_attention(backend, window):
    with jax.enable_x64(True):
        rng, grid, shape = np.random.default_rng(0), (3, 4), (2, 2, 12, 6)
        shapes = dict.fromkeys(("q", "k", "v"), shape)
        shapes |= {f"rel_{side}": (2 * n - 1, 6) for side, n in zip("hw", window, strict=True)}
        if window != grid:
            shapes |= {"padding k": (2, 6), "padding v": (2, 6)}
        leaves = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

        def value(leaves):
            *operands, padding = *(leaves[name] for name in shapes if "padding" not in name), None
            if window != grid:
                padding = leaves["padding k"], leaves["padding v"]
            return weighed([attention(backend, *operands, grid, padding)])

        print(check(value, leaves))


def test_of_attention_with_factors():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        shapes = {"q": (2, 2, 5, 4), "k": (2, 2, 7, 4), "v": (2, 2, 7, 3), "gate": (2, 1, 5, 7)}
        leaves = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        print(check(lambda leaves: weighed([attend(**leaves)]), leaves))


def test_of_losses():
    """Cross-entropy and Dice of both outputs, each at its own resolution."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        labels = rng.integers(0, K, (2, 8, 8))
        leaves = {
            "bootstrap": rng.standard_normal((2, 2, 2, K)),
            "final": rng.standard_normal((2, 8, 8, K)),
        }
        print(check(lambda outputs: losses.deep_supervision_loss(outputs, labels, 3)[0], leaves))


def test_a_wrong_gradient_is_found():
    """Of one leaf of two, by a thousandth, and a missing one."""

    @jax.custom_vjp
    def off(x, by):
        return x**2

    off.defvjp(lambda x, by: (x**2, (x, by)), lambda kept, g: (g * 2 * kept[0] * kept[1], 0.0))
    with jax.enable_x64(True):
        leaves = {"large": np.full(3, 30.0), "small": np.ones(3)}
        for by in (1.001, 0.0):
            with pytest.raises(AssertionError, match="small"):
                check(lambda x, by=by: (x["large"] ** 2).sum() + off(x["small"], by).sum(), leaves)
        assert check(lambda x: (x["large"] ** 2).sum() + off(x["small"], 1.0).sum(), leaves) < 1e-6
