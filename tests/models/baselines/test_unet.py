"""U-Net: sizes, parity with PyTorch, what trains, refusals, the loss on squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.models.baselines.unet import Unet
from pgpsam_jax.models.initializers import FastRngs
from pgpsam_jax.models.parameters import count, flat_paths
from tests.support.method_runs import loss_falls


def settings(**fields):
    config = default_config()
    method_recipes.apply_recipe(config, "unet")
    config.model.update(fields)
    return config.model


@pytest.mark.parametrize(("width", "parameters"), [(16, 1_942_713), (32, 7_763_305)])
def test_all_parameters_train(width, parameters):
    _, params, frozen = build.abstract_model(settings(unet_width=width), 9)
    assert count(params) == parameters and not flat_paths(frozen)


def test_logits_and_gradients_equal_pytorch_in_float64():
    torch = pytest.importorskip("torch")
    from tests.reference import unet_torch

    with jax.enable_x64(True):
        theirs = unet_torch.Unet(8, 3).double()
        ours = Unet(8, 3, dtype=jnp.float64, rngs=FastRngs(0))
        graphdef, state = nnx.split(ours)
        rng = np.random.default_rng(0)
        leaves = flat_paths(state)
        for leaf in leaves.values():
            leaf.set_value(jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float64))
        named = {to_torch(path): leaf[...] for path, leaf in leaves.items()}
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                tensor.copy_(torch.from_numpy(layout(name, np.asarray(named[name])).copy()))
        images = rng.random((2, 32, 44, 3))  # odd from the third resolution on
        weights = rng.random((2, 32, 44, 3))

        def loss(state):
            final = nnx.merge(graphdef, state)(images)["final"]
            return jnp.sum(final * weights), final

        (_, got), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
        torch.sum(wanted.permute(0, 2, 3, 1) * torch.from_numpy(weights)).backward()
        np.testing.assert_allclose(got, wanted.detach().permute(0, 2, 3, 1), rtol=1e-9, atol=1e-11)
        found = {to_torch(path): np.asarray(leaf[...]) for path, leaf in flat_paths(slopes).items()}
        for name, tensor in theirs.named_parameters():
            size = float(tensor.grad.abs().max())
            np.testing.assert_allclose(
                layout(name, found[name]), tensor.grad, rtol=0, atol=1e-9 * size, err_msg=name
            )


def to_torch(path: str) -> str:
    """The name of a parameter in `unet_torch`: of a stage by its place in the sequence."""
    for part, place in (
        ("first/conv", 0),
        ("first/norm", 1),
        ("second/conv", 3),
        ("second/norm", 4),
    ):
        path = path.replace(part, str(place))
    return path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")


def layout(name: str, kernel: np.ndarray) -> np.ndarray:
    """A parameter in the order of PyTorch's axes."""
    if name.startswith("up.") and kernel.ndim == 4:
        return kernel.transpose(0, 3, 1, 2)
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    return kernel.T[:, :, None, None] if kernel.ndim == 2 else kernel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "weights/sam_vit_b"}, "the U-Net has no SAM; set --config.model.base="),
        ({"train_encoder": "lora"}, "set --config.model.train_encoder=full"),
        ({"remat": "blocks"}, "set --config.model.remat=none"),
        ({"unet_width": 12}, "needs a multiple of 8"),
    ],
)
def test_settings_that_it_has_no_use_for(fields, message):
    with pytest.raises(UserError, match=message):
        build.abstract_model(settings(**fields), 3)


def test_it_learns_squares():
    loss_falls("unet", steps=5, model__unet_width=8)
