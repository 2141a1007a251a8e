"""The table of names between the authors' release and this package, and its transforms."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pgpsam_jax.errors import UserError
from tests.reference.release_state import SMALL, VIT_B, release_shapes, release_state
from tests.reference.sam_official import assert_equal
from tests.support.optional import F, torch
from tests.support.places import shared
from weights_conversion import release
from weights_conversion.remap import read, write


@pytest.mark.golden
def test_names_and_shapes_are_those_of_the_release():
    recorded = json.loads(shared("golden/release_synapse.json").read_text())["state_dict"]
    expected = {name: tuple(shape) for name, shape in recorded.items()}
    assert list(release_shapes(VIT_B).items()) == list(expected.items())


def test_arithmetic_of_the_transforms():
    """Each kind of layer that SAM has not computes what torch computes."""
    state, rng = release_state(SMALL), np.random.default_rng(1)
    ours = read(release.RELEASE, state)
    width = SMALL["E"]
    x = rng.standard_normal((2, 4, 6, width), np.float32)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)

    def check(found, expected):
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5, rtol=0)

    refine = "prototype_prompt_encoder.feature_refinement.1"
    for name, shape, path in (
        ("sem_conv.0", (1, 5), "cfm/1/spatial/row/kernel"),
        ("sem_conv.1", (5, 1), "cfm/1/spatial/column/kernel"),
    ):
        weight = torch.from_numpy(state[f"{refine}.scm.{name}.conv.weight"])
        kernel = ours[path].reshape(*shape, 1, width)
        layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=width)
        found = lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), "SAME", **layout)
        check(found, F.conv2d(nchw, weight, padding="same", groups=width))

    name = "pre_prompt.prompt_generator.dense_prompt_generator.dcn"
    weight, bias = (
        torch.from_numpy(state[f"{name}.out_proj.1.conv.{leaf}"]) for leaf in ("weight", "bias")
    )
    found = lax.conv_general_dilated(
        x,
        jnp.asarray(ours["pre_prompt/ppg/dense/deform/depthwise/kernel"])[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=width,
    )
    found = found + ours["pre_prompt/ppg/dense/deform/depthwise/bias"]
    check(found, F.conv2d(nchw, weight, bias, padding="same", groups=width))

    weight = torch.from_numpy(state[f"{refine}.final.project_in.conv.weight"])
    check(x @ ours["cfm/1/ffn/project_in/kernel"], F.conv2d(nchw, weight))

    tokens = torch.from_numpy(rng.standard_normal((3, SMALL["D"])).astype(np.float32))
    for place, part in enumerate("qv"):
        a, b = (
            torch.from_numpy(state[f"image_encoder.blocks.2.attn.lora_linear_{leaf}_{part}.weight"])
            for leaf in "ab"
        )
        lora = [ours[f"image_encoder/blocks/2/attn/lora/{leaf}"][place] for leaf in "ab"]
        expected = F.linear(F.linear(tokens, a), b).numpy()
        np.testing.assert_allclose(tokens.numpy() @ lora[0] @ lora[1], expected, atol=1e-5, rtol=0)


def test_round_trip_of_all_names():
    """The 770 tensors of the release's vit_b, but narrow, each number at a place of its own."""
    narrow = VIT_B | dict(D=96, G=4, P=4, C=8, E=64)
    state = {
        name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in release_shapes(narrow).items()
    }
    assert list(state) == list(release_shapes(VIT_B)) and len(state) == 770
    back = write(release.RELEASE, read(release.RELEASE, state))
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_more_than_ten_classes():
    state = release_state(SMALL | {"N": 12})
    ours = read(release.RELEASE, state)
    for m in range(12):
        expected = state[f"mask_decoder.output_hypernetworks_mlps.{m}.layers.2.bias"]
        np.testing.assert_array_equal(ours["mask_decoder/hyper_mlps/layers/2/bias"][m], expected)
    assert_equal(write(release.RELEASE, ours), state)
    ours["mask_decoder/hyper_mlps/layers/2/bias"] = np.zeros((11, 8), np.float32)
    with pytest.raises(UserError, match=r"layers/2/bias is \(11, 8\), expected \(12, 8\)"):
        write(release.RELEASE, ours)


def test_templates_of_the_table_are_unique():
    for side in ("ours", "theirs"):
        assert len({getattr(row, side) for row in release.TABLE}) == len(release.TABLE)
