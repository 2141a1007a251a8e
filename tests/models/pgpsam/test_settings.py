"""PGP-SAM's settings: what is refused, what each switch adds, parameters at the paper's size."""

import math

import pytest
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import count, flat_paths, trainable
from pgpsam_jax.models.pgpsam.model import PgpSam, PgpSamConfig
from pgpsam_jax.models.sam.sam import SamConfig
from tests.support.small_pgpsam import TABLE_3, small


@pytest.mark.parametrize("name, taps", [("vit_b", (11, 2)), ("vit_l", (23, 5)), ("vit_h", (31, 7))])
def test_stage_taps_default_to_the_last_and_first_global_block(name, taps):
    assert PgpSamConfig(SamConfig.preset(name, 512), 9).stage_taps == taps


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(ppg=False), "ppr"),
        (dict(stage_taps=(1, 2)), "stage_taps"),
        (dict(stage_taps=(-1,)), "stage_taps"),
        (dict(k=0), "k=0"),
        (dict(k=7, alpha=2), "k=7"),
        (dict(strip_kernel=4), "strip_kernel is 4; it must be odd"),
        (dict(classes=1), "num_classes is 1"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        small(**wrong)


def names(**switches):
    """Dotted parameter names of a small model, without compiling anything."""
    shapes = nnx.eval_shape(lambda: PgpSam(small(**switches), rngs=ShapeOnlyRngs()))
    return set(flat_paths(nnx.state(shapes, nnx.Param)))


def test_switches_add_and_remove_exactly_their_own_parameters():
    rows = {name: names(**switches) for name, switches in TABLE_3.items()}
    gates = {n for n in rows["cfm"] if "/spatial/" in n or "/channel/" in n}
    assert len(gates) == 2 * 12 and rows["cfm"] - rows["baseline"] == gates
    assert not rows["baseline"] - rows["cfm"]
    ppg = {n for n in rows["cfm+ppg"] if n.startswith("ppg/")} | {"intra", "inter"}
    assert rows["cfm+ppg"] - rows["cfm"] == ppg and len(ppg) == 2 + 2 * 16
    assert rows["cfm"] - rows["cfm+ppg"] == {"default_dense"}
    ppr = {n for n in rows["cfm+ppg+ppr"] if n.startswith(("ppr/", "ppg/2/"))}
    assert rows["cfm+ppg+ppr"] - rows["cfm+ppg"] == ppr and len(ppr) == 2 * 17 + 16
    assert not rows["cfm+ppg"] - rows["cfm+ppg+ppr"]
    projections = {f"cfm/{s}/{n}" for s in (0, 1) for n in ("projection/kernel", "norm/scale")}
    assert all(projections <= row for row in rows.values())
    assert not any("iou" in n or "prompt_encoder" in n for row in rows.values() for n in row)


@pytest.mark.parametrize("stages", [1, 3])
def test_each_stage_has_its_own_modules_and_all_share_one_decoder(stages):
    taps = (1, 0, 1)[:stages]
    found, two = names(stage_taps=taps), names()
    per_stage = {n.split("/")[1] for n in found if n.startswith("cfm/")}
    assert per_stage == {str(s) for s in range(stages)}
    assert {n.split("/")[1] for n in found if n.startswith("ppr/")} == per_stage
    assert {n.split("/")[1] for n in found if n.startswith("ppg/")} == per_stage | {str(stages)}
    decoder = {n for n in found if n.startswith("mask_decoder/")}
    assert decoder == {n for n in two if n.startswith("mask_decoder/")} and decoder


def part(state, prefix):
    """Scalars of a state below one path."""
    leaves = flat_paths(state).items()
    return sum(math.prod(leaf.shape) for name, leaf in leaves if name.startswith(prefix))


def test_parameter_counts_at_the_paper_size():
    """ViT-b, 512 px, 9 classes, against counts worked out by hand from the layer sizes."""
    config = PgpSamConfig(SamConfig.preset("vit_b", 512), 9)
    model = nnx.eval_shape(lambda: PgpSam(config, rngs=ShapeOnlyRngs()))
    trained, rest = nnx.state(model, trainable("lora"), ...)
    c, d, n, k, q, side = 256, 768, 9, 4, 72, 32

    def linear(a, b):
        return a * b + b

    cfm = d * c + 2 * c + 2 * (5 * c + c) + 2 * c  # projection, strips, norms
    cfm += linear(c, c // 2) + 2 * (c // 2) + linear(c // 2, c)
    ppr = linear(c, 1) + linear(n, 1) + 2 * linear(side * side, side) + n * (k + 1)
    ppr += linear(c + n, c) + 2 + 2 * 2 * c  # F^, alpha and beta, two LayerNorms
    mlp = linear(c, c // 2) + linear(c // 2, c)
    ppg = linear(c + n, c) + linear(c + q, c) + 2 * 2 * c + 2 * mlp  # with a LayerNorm each
    upscaling = (c * 64 * 4 + 64) + 2 * 64 + (64 * 32 * 4 + 32)
    hyper = n * (2 * linear(c, c) + linear(c, 32))
    expected = {
        "image_encoder/": 147_456,  # LoRA: 12 blocks x (q, v) x 2 x 768 x 4
        "cfm/": 2 * cfm,
        "ppr/": 2 * ppr,
        "ppg/": 3 * ppg,
        "intra": n * c,
        "inter": q * c,
        "mask_decoder/transformer/": 3_291_264,
        "mask_decoder/upscaling/": upscaling,
        "mask_decoder/hyper_mlps/": hyper,
        "mask_decoder/mask_tokens": n * c,
    }
    assert (cfm, ppr, ppg, hyper) == (266_880, 135_034, 285_184, 1_258_272)
    assert {name: part(trained, name) for name in expected} == expected
    assert count(trained) == sum(expected.values()) == 6_453_364
    assert part(rest, "image_encoder/") == 87_278_848  # SAM's encoder at 512 px
    assert part(rest, "pe_layer/") == count(rest) - 87_278_848 == 2 * 128
    assert all("lora" in name for name in flat_paths(trained) if name.startswith("image_encoder/"))
