"""Name table between our SAM with a TinyViT encoder and checkpoints of LiteMedSAM and MobileSAM.

Sizes in shapes: as in `sam_table`; stages have their published widths.
"""

import itertools

from weights_conversion import sam_table
from weights_conversion.tensor_layouts import (
    CONV,
    DENSE,
    DEPTHWISE,
    POINTWISE,
    SAME,
    Row,
    Transform,
    layer,
    weight,
)

_WIDTHS, _HEADS, _WINDOWS = (64, 128, 160, 320), (0, 4, 5, 10), (0, 7, 14, 7)
_STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_OURS, _THEIRS = "image_encoder", "image_encoder"
# Counters of batch norms, and the classifier that the encoder was pretrained with.
UNUSED = r".*\.num_batches_tracked|image_encoder\.(norm_head|head)\..*"


def _conv(ours: str, theirs: str, transform: Transform, shape: str) -> list[Row]:
    """Returns the kernel of a convolution and the four vectors of its batch norm."""
    out = shape.split()[-1]
    return [
        weight(f"{ours}/kernel", f"{theirs}.c", transform, shape),
        *(
            Row(f"{ours}/{leaf}", f"{theirs}.bn.{name}", SAME, out)
            for leaf, name in _STATISTICS.items()
        ),
    ]


def _bottleneck(ours: str, theirs: str, dim: int, hidden: int, out: int) -> list[Row]:
    return [
        *_conv(f"{ours}/expand", f"{theirs}.conv1", POINTWISE, f"{dim} {hidden}"),
        *_conv(f"{ours}/depthwise", f"{theirs}.conv2", DEPTHWISE, f"3 3 {hidden}"),
        *_conv(f"{ours}/project", f"{theirs}.conv3", POINTWISE, f"{hidden} {out}"),
    ]


def _block(ours: str, theirs: str, dim: int, heads: int, window: int) -> list[Row]:
    biases = Row(
        f"{ours}/attn/biases", f"{theirs}.attn.attention_biases", SAME, f"{heads} {window**2}"
    )
    return [
        biases,
        *layer(f"{ours}/attn/norm", f"{theirs}.attn.norm", SAME, f"{dim}"),
        *layer(f"{ours}/attn/qkv", f"{theirs}.attn.qkv", DENSE, f"{dim} {3 * dim}"),
        *layer(f"{ours}/attn/proj", f"{theirs}.attn.proj", DENSE, f"{dim} {dim}"),
        *_conv(f"{ours}/local", f"{theirs}.local_conv", DEPTHWISE, f"3 3 {dim}"),
        *layer(f"{ours}/norm", f"{theirs}.mlp.norm", SAME, f"{dim}"),
        *layer(f"{ours}/mlp/lin1", f"{theirs}.mlp.fc1", DENSE, f"{dim} {4 * dim}"),
        *layer(f"{ours}/mlp/lin2", f"{theirs}.mlp.fc2", DENSE, f"{4 * dim} {dim}"),
    ]


def _encoder(embed: Transform, size: str) -> list[Row]:
    rows: list[Row] = []
    for i, (dim, out) in enumerate(itertools.pairwise((3, 32, 64))):
        names = f"{_OURS}/patch_embed/{i}", f"{_THEIRS}.patch_embed.seq.{2 * i}"
        rows += _conv(*names, embed, f"{size}{dim} {out}")
    for i, (dim, heads, window) in enumerate(zip(_WIDTHS, _HEADS, _WINDOWS, strict=True)):
        names = f"{_OURS}/stages/{i}/{{i}}", f"{_THEIRS}.layers.{i}.blocks.{{i}}"
        if heads:
            rows += _block(*names, dim, heads, window)
        else:
            rows += _bottleneck(*names, dim, 4 * dim, dim)
    for i, (dim, out) in enumerate(itertools.pairwise(_WIDTHS)):
        rows += _bottleneck(
            f"{_OURS}/merges/{i}", f"{_THEIRS}.layers.{i}.downsample", dim, out, out
        )
    neck = [row for row in sam_table.OFFICIAL if row.ours.startswith(f"{_OURS}/neck/")]
    return rows + neck


_REST = [row for row in sam_table.OFFICIAL if not row.ours.startswith(f"{_OURS}/")]
LITE_MEDSAM = (*_encoder(POINTWISE, ""), *_REST)
MOBILE_SAM = (*_encoder(CONV, "3 3 "), *_REST)
