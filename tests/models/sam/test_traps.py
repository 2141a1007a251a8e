"""One named test for each known way in which a port of SAM goes wrong while it looks right.

Numbers as in the list of parity traps; number 8 (what PGP-SAM takes from a SAM checkpoint) is
tested with the model. Every trap is shown to be visible: the wrong variant fails the bound.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import layers
from pgpsam_jax.models.sam import attention_kernels
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.sam.weights import fit_base, select_base
from tests.reference import sam_torch
from tests.reference.sam_torch import SMALL, draw, encode, first, last, relative
from tests.support.optional import F, torch
from weights_conversion.sam import from_official, to_official

TIGHT = 2e-6
VISIBLE = 1e-4  # what the wrong variant must exceed

call = nnx.jit(lambda module, *inputs: module(*inputs))


def test_1_transposed_convolution_orientation():
    official, _, sam = sam_torch.small()
    x = draw(2, 5, 3, 64)
    for layer, index, channels in (("conv1", 0, 64), ("conv2", 3, 16)):
        weight, bias = (
            torch.from_numpy(official[f"mask_decoder.output_upscaling.{index}.{leaf}"])
            for leaf in ("weight", "bias")
        )
        got = getattr(sam.mask_decoder.upscaling, layer)(x[..., :channels])
        image = first(x[..., :channels])
        assert relative(got, last(F.conv_transpose2d(image, weight, bias, stride=2))) <= TIGHT
        for wrong in (weight.flip(2), weight.flip(3), weight.transpose(2, 3)):
            assert relative(got, last(F.conv_transpose2d(image, wrong, bias, stride=2))) > 0.1


def test_2_gelu_is_the_exact_one():
    """In the encoder's MLP, the mask prompt's convolutions and the decoder's upscaling."""
    _, theirs, sam = sam_torch.small()
    tokens, image, masks = draw(2, 6, 48), draw(2, 6, 5, 64), draw(2, 8, 12, 1)
    encoder = sam.image_encoder.blocks[0].mlp, theirs.vision_encoder.layers[0].mlp
    prompt = sam.prompt_encoder.mask_downscaling, theirs.prompt_encoder.mask_embed
    decoder = theirs.mask_decoder

    def upscale(x):
        x = F.gelu(decoder.upscale_layer_norm(decoder.upscale_conv1(x)))
        return F.gelu(decoder.upscale_conv2(x))

    got = call(encoder[0], tokens), call(prompt[0], masks), call(sam.mask_decoder.upscaling, image)
    with torch.no_grad():
        expected = (
            encoder[1](torch.from_numpy(tokens)),
            last(prompt[1](first(masks))),
            last(upscale(first(image))),
        )
    assert max(map(relative, got, expected)) <= TIGHT
    tanh = jax.nn.gelu(encoder[0].lin1(tokens), approximate=True)
    assert relative(encoder[0].lin2(tanh), expected[0]) > VISIBLE


@pytest.mark.parametrize("size", [(32, 32), (20, 48), (100, 130), (64, 64)])
def test_3_resize_does_not_antialias(size):
    x = draw(1, 64, 64, 8)
    expected = last(F.interpolate(first(x), size, mode="bilinear", align_corners=False))
    assert relative(layers.resize_bilinear(x, size), expected) <= TIGHT
    if min(size) < 64:
        smooth = jax.image.resize(x, expected.shape, "bilinear", antialias=True)
        assert relative(smooth, expected) > 0.1


def test_3_position_embedding_is_resized_without_antialias():
    tensors = from_official(sam_torch.small()[0])
    position = "image_encoder/pos_embed"
    for grid in ((6, 6), (5, 9), (24, 7)):
        expected = F.interpolate(first(tensors[position]), grid, mode="bilinear")
        fitted = fit_base(tensors, grid, global_blocks=SMALL.encoder.global_blocks)
        assert relative(fitted[position], last(expected)) <= TIGHT


def norms(module):
    """Path and LayerNorm for every LayerNorm of a module."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.LayerNorm):
            yield "/".join(map(str, path)), node


def test_4_layer_norm_constants():
    """1e-6 in the encoder and in every channel norm, 1e-5 in the transformer, as torch has them.

    On inputs with a variance of 1e-6 the constant decides, so the modules are run, not only read.
    """
    _, theirs, sam = sam_torch.small()
    counts = {1e-6: 0, 1e-5: 0}
    for path, norm in norms(sam):
        right, wrong = (1e-5, 1e-6) if "/transformer/" in path else (1e-6, 1e-5)
        counts[right] += 1
        scale, bias = (torch.from_numpy(np.array(p[...])) for p in (norm.scale, norm.bias))
        x = 1e-3 * draw(7, len(scale))
        got = norm(x)
        shape = (len(scale),)
        assert relative(got, F.layer_norm(torch.from_numpy(x), shape, scale, bias, right)) <= TIGHT
        assert relative(got, F.layer_norm(torch.from_numpy(x), shape, scale, bias, wrong)) > 0.1
    assert counts == {
        eps: sum(isinstance(m, torch.nn.LayerNorm) and m.eps == eps for m in theirs.modules())
        for eps in counts
    }


def test_4_layer_norm_of_a_large_mean():
    """The variance is taken in two passes: E[x^2] - E[x]^2 loses everything at a mean of 1000."""
    norm = sam_torch.small()[2].image_encoder.blocks[0].norm1
    x = 1000 + draw(7, 48)
    exact = torch.nn.functional.layer_norm(
        torch.from_numpy(x).double(),
        (48,),
        *(torch.from_numpy(np.array(p[...])).double() for p in (norm.scale, norm.bias)),
        1e-6,
    )
    assert relative(norm(x), exact) <= 1e-4


def test_5_window_padding_takes_part_in_softmax():
    """A corner window of 5 x 5 tokens attends to 7 x 7, of which 24 are the qkv bias."""
    _, theirs, sam = sam_torch.small()
    attn, x = sam.image_encoder.blocks[0].attn, draw(1, 12, 12, 48)
    corner = x[:, 7:, 7:]
    padded = np.pad(corner, ((0, 0), (0, 2), (0, 2), (0, 0)))
    with torch.no_grad():
        expected = theirs.vision_encoder.layers[0].attn(torch.from_numpy(padded))[0][:, :5, :5]

    @nnx.jit
    def ours(attn, x, corner):
        qkv = attn.project(corner).reshape(1, 25, 3, 4, 12)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
        tables = attn.rel_pos_h[2:-2], attn.rel_pos_w[2:-2]
        masked = attention_kernels.naive(q, k, v, *tables, grid=(5, 5)).swapaxes(1, 2)
        return attn(x), attn.proj(masked.reshape(1, 5, 5, 48))

    got, masked = ours(attn, x, corner)
    assert relative(got[:, 7:, 7:], expected) <= TIGHT
    assert relative(masked, expected) > 0.1


def test_6_tables_are_resized_then_indexed_for_each_axis():
    """Global tables of 8 x 15 tokens have 15 rows for height and 29 for width; windows keep 13."""
    official, grid = sam_torch.small()[0], (8, 15)
    encoder = dataclasses.replace(SMALL.encoder, grid=grid)
    expected = sam_torch.interpolated(official, SamConfig((64, 120), encoder, SMALL.decoder))
    fitted = fit_base(from_official(official), grid, global_blocks=encoder.global_blocks)
    for block in range(encoder.depth):
        for axis, size in zip("hw", grid, strict=True):
            name = f"image_encoder/blocks/{block}/attn/rel_pos_{axis}"
            assert len(fitted[name]) == (2 * size - 1 if block in encoder.global_blocks else 13)
            assert relative(fitted[name], expected[name.replace("/", ".")]) <= TIGHT
    name = "image_encoder.blocks.1.attn.rel_pos_h"
    cropped = official[name][4:-4]  # the wrong variant: the old table indexed by the new offsets
    assert relative(cropped, expected[name]) > 0.1


def test_6_height_and_width_are_not_exchanged():
    _, theirs, sam = sam_torch.small()
    attn, x = sam.image_encoder.blocks[1].attn, draw(1, 12, 12, 48)
    with torch.no_grad():
        expected = theirs.vision_encoder.layers[1].attn(torch.from_numpy(x))[0]
    assert relative(call(attn, x), expected) <= TIGHT
    exchanged = nnx.clone(attn)
    exchanged.rel_pos_h, exchanged.rel_pos_w = attn.rel_pos_w, attn.rel_pos_h
    assert relative(call(exchanged, x), expected) > 0.1


def test_6_prompts_of_an_oblong_image():
    """x is divided by the width and y by the height, in prompts as in the grid of positions."""
    encoder = nnx.clone(sam_torch.small()[2].prompt_encoder)
    encoder.image_size = (64, 96)
    matrix = np.asarray(encoder.pe_layer.gaussian_matrix[...], np.float64)

    def encoded(x, y):
        angle = 2 * np.pi * (2 * np.array([(x + 0.5) / 96, (y + 0.5) / 64]) - 1) @ matrix
        return np.concatenate([np.sin(angle), np.cos(angle)])

    boxes = np.array([[3.0, 7.0, 90.0, 40.0]], np.float32)
    expected = np.stack([encoded(3, 7), encoded(90, 40)]) + encoder.point_embeddings[2:]
    assert relative(encoder(boxes=boxes)[0][0], expected) <= TIGHT
    centers = [[encoded(16 * j + 7.5, 16 * i + 7.5) for j in range(6)] for i in range(4)]
    assert relative(encoder.pe_layer.grid((4, 6)), centers) <= TIGHT


def test_7_position_matrix_is_a_buffer():
    """Converted and saved like a weight, but no filter for parameters finds it."""
    official, _, sam = sam_torch.small()
    path = ("prompt_encoder", "pe_layer", "gaussian_matrix")
    buffers = dict(nnx.to_flat_state(nnx.state(sam, layers.Buffer)))
    assert list(buffers) == [path]
    assert path not in dict(nnx.to_flat_state(nnx.state(sam, nnx.Param)))
    np.testing.assert_array_equal(
        buffers[path][...],
        official["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"],
    )


def test_9_conversion_is_complete_both_ways():
    """A tensor missing or left over, there or here, is an error that names it; all at once."""
    official, _, sam = sam_torch.small()
    gone, extra = "mask_decoder.iou_token.weight", "image_encoder.cls_token"
    broken = {n: t for n, t in official.items() if n != gone} | {extra: np.zeros((1, 48))}
    with pytest.raises(UserError) as error:
        from_official(broken)
    assert f"missing: {gone}" in str(error.value) and f"unexpected: {extra}" in str(error.value)

    tensors = from_official(official)
    gone, extra = "mask_decoder/iou_token", "image_encoder/cls_token"
    broken = {n: t for n, t in tensors.items() if n != gone} | {extra: np.zeros((1, 48))}
    with pytest.raises(UserError) as error:
        to_official(broken)
    assert gone in str(error.value) and extra in str(error.value)

    shapes = {"/".join(map(str, p)): v.shape for p, v in nnx.to_flat_state(nnx.state(sam))}
    assert select_base(tensors, shapes).keys() == shapes.keys()
    with pytest.raises(UserError) as error:
        select_base(broken, shapes)
    assert gone in str(error.value) and extra in str(error.value)


def test_10_products_are_compared_at_float32_precision():
    """Every product of the model under test asks for float32, also on accelerators."""
    sam = sam_torch.small()[2]
    text = encode.lower(sam, draw(1, 96, 96, 3)).as_text()
    products = [x for x in text.splitlines() if "dot_general" in x or "stablehlo.convolution" in x]
    assert len(products) > 20
    assert all("HIGHEST" in line.upper() for line in products)
