"""Reading converted weights, fitting them to another input size, giving them to a model."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import (
    TrainedFor,
    check_encoder,
    fit_base,
    load_base,
    read_safetensors,
    select_base,
)
from pgpsam_jax.utils.files import file_digest
from tests.reference.sam_official import SMALL, random_state, save_pth
from tests.support.optional import F, torch
from weights_conversion.convert import convert
from weights_conversion.sam import from_official

POSITION = "image_encoder/pos_embed"


def table(block: int, axis: str) -> str:
    return f"image_encoder/blocks/{block}/attn/rel_pos_{axis}"


@pytest.fixture
def stem(tmp_path):
    source = save_pth(tmp_path / "small.pth", random_state(SMALL))
    convert(source, tmp_path / "base" / "sam_vit_l", log=lambda line: None)
    return tmp_path / "base" / "sam_vit_l"


def test_load_base_by_stem_and_by_file(stem):
    expected = from_official(random_state(SMALL))
    file = stem.with_name("sam_vit_l.safetensors")
    for path in (stem, str(stem), file, stem.with_name("sam_vit_l.json")):
        base = load_base(path)
        assert base.digest == base.meta["sha256"] == file_digest(file)
        assert base.meta["variant"] == "custom" and base.meta["image_size"] == 16
        assert base.tensors.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(base.tensors[name], array, strict=True)


def change_sidecar(stem, **fields):
    sidecar = stem.with_name(f"{stem.name}.json")
    meta = json.loads(sidecar.read_text()) | fields
    sidecar.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


def test_what_a_base_was_trained_for(stem):
    assert TrainedFor.of(stem) == TrainedFor(None, 4, "normalized", (0, 1, 2, 3))
    change_sidecar(stem, variant="tiny_vit", colors="unit", mask_tokens=[0])
    assert TrainedFor.of(stem) == TrainedFor("tiny_vit", 4, "unit", (0,))
    change_sidecar(stem, colors=None, mask_tokens=None)  # of before these were written
    assert TrainedFor.of(stem) == TrainedFor("tiny_vit", 4)
    assert TrainedFor.of(stem.with_name("nowhere")) == TrainedFor()


@pytest.mark.parametrize(
    "fields", [{"colors": "gray"}, {"mask_tokens": []}, {"mask_tokens": [4]}, {"mask_tokens": 0}]
)
def test_sidecars_that_say_nothing_sensible(stem, fields):
    change_sidecar(stem, **fields)
    with pytest.raises(UserError, match=r"unit or normalized and numbers from 0 to 3 belong"):
        TrainedFor.of(stem)


def test_an_encoder_that_is_not_the_base_s_is_refused_with_the_fields_to_set(stem):
    check_encoder(stem, "vit_b", 4)  # of sizes without a name: their shapes tell
    change_sidecar(stem, variant="tiny_vit")
    check_encoder(stem, "tiny_vit", 4)
    with pytest.raises(UserError) as caught:
        check_encoder(stem, "vit_b", 16)
    assert str(caught.value) == (
        f"model.encoder is vit_b and model.patch_size is 16, which model.base ({stem}) is not for; "
        "set --config.model.encoder=tiny_vit --config.model.patch_size=4"
    )
    with pytest.raises(UserError, match=r"; set --config\.model\.patch_size=4$"):
        check_encoder(stem, "tiny_vit", 16)


@pytest.mark.parametrize("gone", ["sam_vit_l.safetensors", "sam_vit_l.json"])
def test_missing_base_says_how_to_get_it(stem, gone):
    stem.with_name(gone).unlink()
    with pytest.raises(UserError) as caught:
        load_base(stem)
    message = str(caught.value)
    assert f"{gone} does not exist" in message
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth" in message
    assert f"pgpsam convert --source sam_vit_l_0b3195.pth --output {stem}" in message


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "does not describe SAM weights"),
        ('{"format": "other"}', "does not describe SAM weights"),
        ('{"format": "pgpsam_jax SAM weights", "format_version": 2}', "format version 2"),
        ('{"format": "pgpsam_jax SAM weights", "format_version": 1}', "not the file that"),
    ],
)
def test_strange_sidecar(stem, sidecar, message):
    stem.with_name("sam_vit_l.json").write_text(sidecar)
    with pytest.raises(UserError, match=message):
        load_base(stem)


def test_changed_weights(stem):
    file = stem.with_name("sam_vit_l.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the file that sam_vit_l\.json describes"):
        load_base(stem)
    # A truncated file whose sidecar was forged to match.
    file.write_bytes(content[:-4])
    sidecar = stem.with_name("sam_vit_l.json")
    meta = json.loads(sidecar.read_text()) | {"sha256": file_digest(file)}
    sidecar.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_base(stem)


def test_unusual_number_format(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"a\.safetensors is not a complete safetensors file"):
        read_safetensors(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")


def encoder(grid, rows, width=6, head=3, seed=0) -> dict[str, np.ndarray]:
    """Position embedding and tables; `rows` are the lengths (h, w) of each block's tables."""
    rng = np.random.default_rng(seed)
    tensors = {POSITION: rng.standard_normal((1, *grid, width), np.float32)}
    for block, lengths in enumerate(rows):
        for axis, n in zip("hw", lengths, strict=True):
            tensors[table(block, axis)] = rng.standard_normal((n, head), np.float32)
    return tensors | {"mask_decoder/iou_token": rng.standard_normal((1, 4), np.float32)}


def torch_position(array, grid):
    nchw = torch.from_numpy(array).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, grid, mode="bilinear", align_corners=False, antialias=False)
    return resized.permute(0, 2, 3, 1).numpy()


def torch_table(array, rows):
    resized = F.interpolate(torch.from_numpy(array).T[None], rows, mode="linear")
    return resized[0].T.numpy()


sides = st.integers(2, 70)


@settings(max_examples=60, deadline=None)
@given(own=st.tuples(sides, sides), grid=st.tuples(sides, sides))
def test_fit_equals_torch(own, grid):
    """Shrinking and growing, height and width apart; windows of length 1 are never touched."""
    whole = (2 * own[0] - 1, 2 * own[1] - 1)
    tensors = encoder(own, [(1, 1), whole, (1, 1), whole])
    fitted = fit_base(tensors, grid)
    assert fitted.keys() == tensors.keys()
    np.testing.assert_allclose(
        fitted[POSITION], torch_position(tensors[POSITION], grid), atol=1e-6, rtol=0, strict=True
    )
    for block in (1, 3):
        for axis, size in zip("hw", grid, strict=True):
            name = table(block, axis)
            expected = torch_table(tensors[name], 2 * size - 1)
            np.testing.assert_allclose(fitted[name], expected, atol=1e-6, rtol=0, strict=True)
    for name in (table(0, "h"), table(2, "w"), "mask_decoder/iou_token"):
        assert fitted[name] is tensors[name]


def test_official_sizes_to_512_pixels():
    """vit_b's grid of 64 and windows of 14, to 32; a constant stays constant at the borders."""
    blocks = [(127, 127) if i in (2, 5, 8, 11) else (27, 27) for i in range(12)]
    tensors = encoder((64, 64), blocks)
    tensors[POSITION][..., 0] = 7
    fitted = fit_base(tensors, (32, 32))
    np.testing.assert_array_equal(fitted[POSITION][..., 0], np.full((1, 32, 32), 7, np.float32))
    rows = [len(fitted[table(i, "h")]) for i in range(12)]
    assert rows == [63 if i in (2, 5, 8, 11) else 27 for i in range(12)]
    # Not antialiased: 64 -> 32 averages the two middle neighbors in each direction.
    pairs = tensors[POSITION].reshape(1, 32, 2, 32, 2, 6).mean((2, 4))
    np.testing.assert_allclose(fitted[POSITION], pairs, atol=1e-6)


def test_own_grid_changes_nothing():
    tensors = encoder((14, 14), [(27, 27)] * 2)
    fitted = fit_base(tensors, (14, 14))
    assert all(fitted[name] is array for name, array in tensors.items())


def test_grid_of_one_window_needs_the_global_blocks():
    tensors = encoder((14, 14), [(27, 27)] * 3)
    with pytest.raises(UserError, match="global_blocks"):
        fit_base(tensors, (32, 32))
    fitted = fit_base(tensors, (32, 20), global_blocks=(1,))
    rows = [(len(fitted[table(i, "h")]), len(fitted[table(i, "w")])) for i in range(3)]
    assert rows == [(27, 27), (63, 39), (27, 27)]


def test_encoder_without_global_blocks():
    fitted = fit_base(encoder((8, 8), [(5, 5)] * 2), (4, 4))
    assert fitted[POSITION].shape == (1, 4, 4, 6) and len(fitted[table(1, "h")]) == 5


def test_impossible_grid():
    with pytest.raises(UserError, match="impossible"):
        fit_base(encoder((8, 8), [(5, 5)]), (0, 4))


TENSORS = {
    "image_encoder/pos_embed": np.zeros((1, 2)),
    "mask_decoder/a": np.ones(3),
    "mask_decoder/hyper_mlps/b": np.full(4, 2.0),
    "mask_decoder_extra": np.full(5, 3.0),
}


def test_select_renames_by_whole_components():
    shapes = {"sam/encoder/pos_embed": (1, 2), "decoder/a": (3,), "decoder/own/b": (4,)}
    rename = {
        "sam/encoder": "image_encoder",
        "decoder": "mask_decoder",
        "decoder/own": "mask_decoder/hyper_mlps",  # the longer prefix wins
    }
    chosen = select_base(TENSORS, shapes, rename, ignore=("mask_decoder_extra",))
    assert {path: array[..., 0].max() for path, array in chosen.items()} == {
        "sam/encoder/pos_embed": 0,
        "decoder/a": 1,
        "decoder/own/b": 2,
    }
    same = select_base(TENSORS, {name: array.shape for name, array in TENSORS.items()})
    assert all(same[name] is array for name, array in TENSORS.items())
    prefixed = {f"sam/{name}": array.shape for name, array in TENSORS.items()}
    assert len(select_base(TENSORS, prefixed, {"sam": ""})) == len(TENSORS)


def test_select_reports_everything_at_once():
    shapes = {"image_encoder/pos_embed": (1, 3), "mask_decoder/a": (3,), "mask_decoder/c": (3,)}
    with pytest.raises(UserError) as caught:
        select_base(TENSORS, shapes, ignore=("mask_decoder/hyper_mlps",))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "wrong shape: image_encoder/pos_embed is (1, 2), image_encoder/pos_embed needs (1, 3)",
        "missing: mask_decoder/c (for mask_decoder/c)",
        "not used: mask_decoder_extra",  # a prefix ends at a slash
    ]
