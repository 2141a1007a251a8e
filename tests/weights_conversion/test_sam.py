"""SAM checkpoints to our weights and back: names, shapes, arithmetic, bits, bad tensors."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from safetensors.numpy import load_file

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import load_base
from tests.reference.sam_official import SMALL, VIT_B, assert_equal, official_shapes, random_state
from tests.support.optional import F, torch, transformers
from tests.support.places import shared
from weights_conversion import convert as program
from weights_conversion import sam_table
from weights_conversion.sam import (
    OF_SAM,
    describe,
    detect_layout,
    from_huggingface,
    from_official,
    to_huggingface,
    to_official,
)


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL)


@pytest.fixture(scope="module")
def ours(state):
    return from_official(state)


@pytest.mark.golden
def test_names_and_shapes_are_those_of_the_official_checkpoint():
    recorded = json.loads(shared("golden/sam_vit_b_1024.json").read_text())["state_dict"]
    assert official_shapes(VIT_B) == {name: tuple(shape) for name, shape in recorded.items()}


def test_paths_and_shapes_of_our_layout(ours):
    """A hand-written sample with every kind of transform; numbers are `SMALL`'s."""
    expected = {
        "image_encoder/pos_embed": (1, 4, 4, 8),
        "image_encoder/patch_embed/kernel": (4, 4, 3, 8),
        "image_encoder/patch_embed/bias": (8,),
        "image_encoder/blocks/2/norm1/scale": (8,),
        "image_encoder/blocks/0/attn/qkv/kernel": (8, 24),
        "image_encoder/blocks/0/attn/qkv/bias": (24,),
        "image_encoder/blocks/0/attn/rel_pos_h": (3, 4),
        "image_encoder/blocks/1/attn/rel_pos_w": (7, 4),
        "image_encoder/blocks/1/mlp/lin1/kernel": (8, 20),
        "image_encoder/neck/conv1/kernel": (1, 1, 8, 16),
        "image_encoder/neck/norm1/scale": (16,),
        "image_encoder/neck/conv2/kernel": (3, 3, 16, 16),
        "image_encoder/neck/norm2/bias": (16,),
        "prompt_encoder/pe_layer/gaussian_matrix": (2, 8),
        "prompt_encoder/point_embeddings": (4, 16),
        "prompt_encoder/not_a_point_embed": (16,),
        "prompt_encoder/no_mask_embed": (16,),
        "prompt_encoder/mask_downscaling/conv1/kernel": (2, 2, 1, 2),
        "prompt_encoder/mask_downscaling/norm1/scale": (2,),
        "prompt_encoder/mask_downscaling/conv2/kernel": (2, 2, 2, 8),
        "prompt_encoder/mask_downscaling/norm2/bias": (8,),
        "prompt_encoder/mask_downscaling/conv3/kernel": (1, 1, 8, 16),
        "mask_decoder/iou_token": (1, 16),
        "mask_decoder/mask_tokens": (4, 16),
        "mask_decoder/transformer/layers/1/self_attn/q_proj/kernel": (16, 16),
        "mask_decoder/transformer/layers/0/cross_attn_token_to_image/k_proj/kernel": (16, 6),
        "mask_decoder/transformer/layers/1/cross_attn_image_to_token/out_proj/kernel": (6, 16),
        "mask_decoder/transformer/layers/1/norm4/scale": (16,),
        "mask_decoder/transformer/layers/0/mlp/lin2/kernel": (12, 16),
        "mask_decoder/transformer/final_attn_token_to_image/v_proj/bias": (6,),
        "mask_decoder/transformer/norm_final_attn/bias": (16,),
        "mask_decoder/upscaling/conv1/kernel": (16, 2, 2, 4),
        "mask_decoder/upscaling/norm/scale": (4,),
        "mask_decoder/upscaling/conv2/kernel": (4, 2, 2, 2),
        "mask_decoder/hyper_mlps/layers/0/kernel": (4, 16, 16),
        "mask_decoder/hyper_mlps/layers/2/kernel": (4, 16, 2),
        "mask_decoder/hyper_mlps/layers/2/bias": (4, 2),
        "mask_decoder/iou_head/layers/0/kernel": (16, 10),
        "mask_decoder/iou_head/layers/2/kernel": (10, 4),
    }
    assert expected == {name: ours[name].shape for name in expected}
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in ours.values())
    # Seven stacks of four: the point embeddings, and three kernels and biases of the hyper-MLPs.
    assert len(ours) == len(official_shapes(SMALL)) - 7 * 3


def test_arithmetic_of_every_transform(state, ours):
    """Each layer computes with our tensor what torch computes with the official one."""
    rng = np.random.default_rng(1)

    def check(found, expected):
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-5, rtol=0)

    def torch_layer(name):
        return (torch.from_numpy(state[f"{name}.{leaf}"]) for leaf in ("weight", "bias"))

    x = rng.standard_normal((5, 8), np.float32)
    qkv = "image_encoder/blocks/1/attn/qkv"
    expected = F.linear(torch.from_numpy(x), *torch_layer("image_encoder.blocks.1.attn.qkv"))
    check(x @ ours[f"{qkv}/kernel"] + ours[f"{qkv}/bias"], expected)

    x = rng.standard_normal((2, 8, 8, 3), np.float32)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = F.conv2d(nchw, *torch_layer("image_encoder.patch_embed.proj"), stride=4)
    kernel = jnp.asarray(ours["image_encoder/patch_embed/kernel"])
    found = lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    check(found + ours["image_encoder/patch_embed/bias"], expected.permute(0, 2, 3, 1))

    x = rng.standard_normal((2, 3, 5, 16), np.float32)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    layer = torch_layer("mask_decoder.output_upscaling.0")
    expected = F.conv_transpose2d(nchw, *layer, stride=2)
    pixels = np.einsum("bhwc,cijo->bhiwjo", x, ours["mask_decoder/upscaling/conv1/kernel"])
    found = pixels.reshape(2, 6, 10, 4) + ours["mask_decoder/upscaling/conv1/bias"]
    check(found, expected.permute(0, 2, 3, 1))

    x = rng.standard_normal((7, 16), np.float32)
    mlp = "mask_decoder/hyper_mlps/layers/2"
    found = np.einsum("bi,mio->mbo", x, ours[f"{mlp}/kernel"]) + ours[f"{mlp}/bias"][:, None]
    for m in range(4):
        layer = torch_layer(f"mask_decoder.output_hypernetworks_mlps.{m}.layers.2")
        check(found[m], F.linear(torch.from_numpy(x), *layer))

    for m in range(4):
        row = state[f"prompt_encoder.point_embeddings.{m}.weight"][0]
        np.testing.assert_array_equal(ours["prompt_encoder/point_embeddings"][m], row)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_round_trips_are_exact(data):
    """Official -> ours -> official, and on through the Hugging Face names, for any sizes."""
    draw = data.draw
    depth = draw(st.integers(1, 11))
    sizes = {k: draw(st.integers(1, 9)) for k in "DGPCMAFI"} | {"depth": depth, "S": 3}
    sizes |= {"E": 8 * draw(st.integers(1, 3)), "T": 4 * draw(st.integers(1, 3))}
    sizes["whole"] = draw(st.sets(st.integers(0, depth - 1)))
    state = random_state(sizes, seed=depth)
    ours = from_official(state)
    assert_equal(to_official(ours), state)
    assert_equal(from_huggingface(to_huggingface(ours)), ours)


def test_extreme_floats_survive_bit_for_bit(state):
    state = dict(state)
    values = np.array([0.0, -0.0, 1e-45, -3.4028235e38, 1.1754942e-38, 1, -1, 2], np.float32)
    state["image_encoder.blocks.0.norm1.weight"] = values
    assert_equal(to_official(from_official(state)), state)


def test_templates_of_the_table_are_unique():
    for rows in (sam_table.OFFICIAL, sam_table.HUGGINGFACE):
        for side in ("ours", "theirs"):
            assert len({getattr(row, side) for row in rows}) == len(rows)


# Hugging Face. The official name is derived by these replacements, not by our table.
RENAMES = (
    ("shared_image_embedding.", "prompt_encoder.pe_layer."),
    (".positional_embedding", ".positional_encoding_gaussian_matrix"),
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.", "image_encoder."),
    ("patch_embed.projection", "patch_embed.proj"),
    ("neck.conv1", "neck.0"),
    ("neck.layer_norm1", "neck.1"),
    ("neck.conv2", "neck.2"),
    ("neck.layer_norm2", "neck.3"),
    (".point_embed.", ".point_embeddings."),
    ("mask_embed.conv1", "mask_downscaling.0"),
    ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"),
    ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"),
    ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"),
    ("layer_norm", "norm"),
    (".layers.0.weight", ".layers.1.weight"),  # the middle layer of an MLP of three
    (".layers.0.bias", ".layers.1.bias"),
    ("proj_in", "layers.0"),
    ("proj_out", "layers.2"),
)
COPY = "prompt_encoder.shared_embedding.positional_embedding"
ORIGINAL = "shared_image_embedding.positional_embedding"


def official_name(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def hf_model():
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=dict(
            hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4,
            window_size=2, global_attn_indexes=[1], output_channels=16, mlp_dim=20, num_pos_feats=8,
        ),
        prompt_encoder_config=dict(
            hidden_size=16, image_size=16, patch_size=4, mask_input_channels=8
        ),
        mask_decoder_config=dict(
            hidden_size=16, mlp_dim=12, num_attention_heads=2, iou_head_hidden_dim=10
        ),
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    for parameter in model.parameters():  # many start as zeros or ones
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def hf_folder(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "sam-small"
    hf_model.save_pretrained(folder)
    return folder


def test_huggingface_equals_its_official_counterpart(hf_folder, tmp_path):
    saved = load_file(hf_folder / "model.safetensors")
    official = {official_name(n): a for n, a in saved.items() if n != COPY}
    sizes = SMALL | {"A": 8}  # transformers has no setting for the attention downsampling rate 2
    assert {n: a.shape for n, a in official.items()} == official_shapes(sizes)
    converted = program.convert(hf_folder, tmp_path / "w", log=lambda line: None)
    assert converted["layout"] == "huggingface"
    assert_equal(load_base(tmp_path / "w").tensors, from_official(official))


def test_huggingface_copy_of_the_position_matrix(hf_folder):
    saved = load_file(hf_folder / "model.safetensors")
    matrix = saved[ORIGINAL]
    expected = from_huggingface(saved)
    assert_equal(from_huggingface(saved | {COPY: matrix}), expected)
    only_copy = {n: a for n, a in saved.items() if n != ORIGINAL} | {COPY: matrix}
    assert_equal(from_huggingface(only_copy), expected)
    with pytest.raises(UserError, match="differs from its copy"):
        from_huggingface(saved | {COPY: matrix + 1})


def test_reversed_huggingface_file_loads_in_transformers(hf_model, hf_folder, tmp_path):
    program.convert(hf_folder, tmp_path / "w", log=lambda line: None)
    out = tmp_path / "back"
    out.mkdir()
    (out / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    program.reverse(tmp_path / "w", out / "model.safetensors", "huggingface", log=lambda line: None)
    expected = {n: t.numpy() for n, t in hf_model.state_dict().items()}
    loaded = transformers.SamModel.from_pretrained(out).state_dict()
    assert_equal({n: t.numpy() for n, t in loaded.items()}, expected)


# Bad tensors.


def test_all_problems_come_in_one_message(state):
    bad = dict(state)
    bad["image_encoder.blocks.0.attn.lora.weight"] = np.zeros((2, 2), np.float32)
    bad["prompt_encoder.point_embeddings.4.weight"] = np.zeros((1, 16), np.float32)
    bad["image_encoder.blocks.00.norm1.weight"] = np.zeros(8, np.float32)
    bad["image_encoder.blocks.123456789.norm1.weight"] = np.zeros(8, np.float32)
    del bad["image_encoder.neck.0.weight"]
    del bad["mask_decoder.output_hypernetworks_mlps.2.layers.1.bias"]
    bad["image_encoder.pos_embed"] = np.zeros((1, 5, 4, 8), np.float32)
    bad["prompt_encoder.no_mask_embed.weight"] = np.zeros((2, 16), np.float32)
    bad["prompt_encoder.not_a_point_embed.weight"] = np.zeros((0, 16), np.float32)
    bad["image_encoder.blocks.2.attn.qkv.weight"] = np.zeros((8, 24), np.float32)
    bad["image_encoder.blocks.2.norm1.bias"] = np.zeros((), np.float32)
    bad["image_encoder.blocks.2.mlp.lin1.bias"] = np.zeros(20, np.int64)
    with pytest.raises(UserError) as caught:
        from_official(bad, "x.pth")
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("x.pth does not fit the official SAM layout in ")
    expected = [
        "unexpected: image_encoder.blocks.0.attn.lora.weight",
        "unexpected: prompt_encoder.point_embeddings.4.weight",
        "unexpected: image_encoder.blocks.00.norm1.weight",
        "unexpected: image_encoder.blocks.123456789.norm1.weight",
        "missing: image_encoder.neck.0.weight",
        "missing: mask_decoder.output_hypernetworks_mlps.2.layers.1.bias",
        "wrong shape: prompt_encoder.no_mask_embed.weight is (2, 16), expected (1, 16)",
        "wrong shape: prompt_encoder.not_a_point_embed.weight is (0, 16), expected (1, 16)",
        "wrong shape: image_encoder.blocks.2.attn.qkv.weight is (8, 24), expected (24, 8)",
        "wrong shape: image_encoder.blocks.2.norm1.bias is (), expected (8,)",
        "wrong type: image_encoder.blocks.2.mlp.lin1.bias is int64, expected floats",
    ]
    found = [line.strip() for line in lines]
    assert set(expected) <= set(found)
    # The grid is 5 or 4; either way the position embedding is named.
    assert any(line.startswith("wrong shape: image_encoder.pos_embed is (1, 5") for line in found)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"0.attn.rel_pos_h": 4, "0.attn.rel_pos_w": 4}, r"blocks.0.attn.rel_pos_h has 4 rows"),
        ({"2.attn.rel_pos_h": 5, "2.attn.rel_pos_w": 5}, r"expected one of \[3, 7\]"),
        ({"0.attn.rel_pos_h": 7}, "rel_pos_h and .*rel_pos_w differ"),
    ],
)
def test_wrong_tables(state, tables, message):
    bad = {
        f"image_encoder.blocks.{n}": np.zeros((rows, 4), np.float32) for n, rows in tables.items()
    }
    with pytest.raises(UserError, match=message):
        from_official(state | bad)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_single_missing_name_is_reported(state, ours, every):
    """One of each kind, or all: kinds differ in more than the number of a block or layer."""
    kinds = {re.sub(r"\d+", "", name): name for name in state}
    for name in state if every else kinds.values():
        rest = {n: a for n, a in state.items() if n != name}
        with pytest.raises(UserError, match=f"in 1 places.*\n  missing: {name}$"):
            from_official(rest)
    rest = {n: a for n, a in ours.items() if n != "mask_decoder/iou_token"}
    with pytest.raises(UserError, match=r"missing: mask_decoder/iou_token$"):
        to_official(rest)


def test_values_that_are_not_finite(state):
    for value in (np.nan, np.inf):
        bad = np.full(8, value, np.float32)
        with pytest.raises(UserError, match="not finite in float32: image_encoder/neck/norm1/bias"):
            from_official(state | {"image_encoder.neck.1.bias": np.repeat(bad, 2)})
    huge = np.full(16, 1e300)
    with pytest.raises(UserError, match="not finite"):
        from_official(state | {"image_encoder.neck.1.bias": huge})


def test_layout_is_found_from_the_names(state, ours):
    assert detect_layout(state, "x") == "official"
    assert detect_layout(to_huggingface(ours), "x") == "huggingface"
    with pytest.raises(UserError, match="already in this project's layout"):
        detect_layout(ours, "x")
    with pytest.raises(UserError, match=r"x holds no SAM image encoder .*backbone"):
        detect_layout({"backbone.weight": np.zeros(1)}, "x")


@pytest.mark.parametrize(
    ("width", "depth", "variant"),
    [
        (768, 12, "vit_b"),
        (1024, 24, "vit_l"),
        (1280, 32, "vit_h"),
        (96, 4, "vit_t"),
        (768, 24, "custom"),
    ],
)
def test_variant(width, depth, variant):
    tensors = {
        "image_encoder/pos_embed": np.broadcast_to(np.float32(0), (1, 32, 32, width)),
        "image_encoder/patch_embed/kernel": np.broadcast_to(np.float32(0), (16, 16, 3, width)),
    } | {f"image_encoder/blocks/{i}/attn/qkv/kernel": np.zeros(0) for i in range(depth)}
    wanted = {"variant": variant, "image_size": 512, "patch_size": 16}
    assert describe(tensors) == wanted | OF_SAM


def test_what_tiny_vit_was_trained_for():
    """LiteMedSAM is known by its embedding of 1 x 1 pixels."""
    embed = "image_encoder/patch_embed/0/kernel"
    lite = {"image_size": 256, "patch_size": 4, "colors": "unit", "mask_tokens": [0]}
    mobile = {"image_size": 1024, "patch_size": 16} | OF_SAM
    for shape, wanted in (((3, 32), lite), ((3, 3, 3, 32), mobile)):
        assert describe({embed: np.zeros(shape)}) == {"variant": "tiny_vit"} | wanted
