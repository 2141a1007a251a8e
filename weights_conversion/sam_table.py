"""The table between our SAM parameter paths and the official and Hugging Face checkpoint names.

A row is (our path, official name, Hugging Face name, transform, shape). `{i}` is a block or layer
number, the same on all sides; `{m}` numbers the four tensors that we stack on a new first axis.

Sizes in shapes: `D` encoder width, `M` encoder MLP, `G` grid, `P` patch, `C` head width, `R` length
of a relative-position table, `E` decoder width, `A` cross-attention width, `F` decoder MLP, `I`
IoU-head width, `T` mask-prompt channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STACKED = 4  # point embeddings; hyper-MLPs, one for each mask token

# Ignored names: copies of another tensor of the same layout, which they must equal.
DUPLICATES = {
    "official": {},
    "huggingface": {
        "prompt_encoder.shared_embedding.positional_embedding": (
            "shared_image_embedding.positional_embedding"
        )
    },
}


class Transform(NamedTuple):
    """From a torch tensor to ours and back, without arithmetic."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(*axes: int) -> Transform:
    return Transform(lambda a: a.transpose(axes), lambda a: a.transpose(np.argsort(axes)))


TRANSFORMS = {
    "same": Transform(lambda a: a, lambda a: a),
    "row": Transform(lambda a: a[0], lambda a: a[None]),  # (1, E) <-> (E,)
    "dense": _permute(1, 0),  # (out, in) <-> (in, out)
    "conv": _permute(2, 3, 1, 0),  # (out, in, h, w) <-> (h, w, in, out)
    "deconv": _permute(0, 2, 3, 1),  # (in, out, h, w) <-> (in, h, w, out)
}


class Row(NamedTuple):
    ours: str
    official: str
    huggingface: str
    transform: str
    shape: str  # of ours; of one slice where `{m}` stacks

    @property
    def stacked(self) -> bool:
        return "{m}" in self.official


def _layer(ours, official, huggingface, transform, shape) -> list[Row]:
    """Kernel (norms: scale) and bias of one layer; the bias has the last size of the kernel."""
    leaf = "scale" if transform == "same" else "kernel"
    return [
        Row(f"{ours}/{leaf}", f"{official}.weight", f"{huggingface}.weight", transform, shape),
        Row(f"{ours}/bias", f"{official}.bias", f"{huggingface}.bias", "same", shape.split()[-1]),
    ]


def _same_names(prefix, names, transform, shape) -> list[Row]:
    """Layers that are called alike in all three layouts."""
    dotted = prefix.replace("/", ".")
    return [
        row
        for n in names
        for row in _layer(f"{prefix}/{n}", *[f"{dotted}.{n}"] * 2, transform, shape)
    ]


def _attention(prefix, width) -> list[Row]:
    return _same_names(prefix, ("q_proj", "k_proj", "v_proj"), "dense", f"E {width}") + _same_names(
        prefix, ("out_proj",), "dense", f"{width} E"
    )


def _encoder() -> list[Row]:
    ours, official, hf = "image_encoder", "image_encoder", "vision_encoder"
    rows = [
        Row(f"{ours}/pos_embed", f"{official}.pos_embed", f"{hf}.pos_embed", "same", "1 G G D"),
        *_layer(
            f"{ours}/patch_embed",
            f"{official}.patch_embed.proj",
            f"{hf}.patch_embed.projection",
            "conv",
            "P P 3 D",
        ),
    ]
    for n, (index, kernel) in enumerate(((0, "1 1 D E"), (2, "3 3 E E")), start=1):
        weights = f"{official}.neck.{index}.weight", f"{hf}.neck.conv{n}.weight"
        rows.append(Row(f"{ours}/neck/conv{n}/kernel", *weights, "conv", kernel))
        norm = f"{official}.neck.{index + 1}", f"{hf}.neck.layer_norm{n}"
        rows += _layer(f"{ours}/neck/norm{n}", *norm, "same", "E")
    ours, official, hf = f"{ours}/blocks/{{i}}", f"{official}.blocks.{{i}}", f"{hf}.layers.{{i}}"
    for n in (1, 2):
        rows += _layer(f"{ours}/norm{n}", f"{official}.norm{n}", f"{hf}.layer_norm{n}", "same", "D")
    for table in ("rel_pos_h", "rel_pos_w"):
        names = f"{official}.attn.{table}", f"{hf}.attn.{table}"
        rows.append(Row(f"{ours}/attn/{table}", *names, "same", "R C"))
    for layer, shape in (
        ("attn/qkv", "D 3D"),
        ("attn/proj", "D D"),
        ("mlp/lin1", "D M"),
        ("mlp/lin2", "M D"),
    ):
        name = layer.replace("/", ".")
        rows += _layer(f"{ours}/{layer}", f"{official}.{name}", f"{hf}.{name}", "dense", shape)
    return rows


def _prompt_encoder() -> list[Row]:
    ours = "prompt_encoder"
    rows = [
        Row(
            f"{ours}/pe_layer/gaussian_matrix",
            f"{ours}.pe_layer.positional_encoding_gaussian_matrix",
            "shared_image_embedding.positional_embedding",
            "same",
            "2 E/2",
        ),
        Row(
            f"{ours}/point_embeddings",
            f"{ours}.point_embeddings.{{m}}.weight",
            f"{ours}.point_embed.{{m}}.weight",
            "row",
            "E",
        ),
    ]
    for name in ("not_a_point_embed", "no_mask_embed"):
        rows.append(Row(f"{ours}/{name}", *[f"{ours}.{name}.weight"] * 2, "row", "E"))
    for layer, index, hf, transform, shape in (
        ("conv1", 0, "conv1", "conv", "2 2 1 T/4"),
        ("norm1", 1, "layer_norm1", "same", "T/4"),
        ("conv2", 3, "conv2", "conv", "2 2 T/4 T"),
        ("norm2", 4, "layer_norm2", "same", "T"),
        ("conv3", 6, "conv3", "conv", "1 1 T E"),
    ):
        names = f"{ours}.mask_downscaling.{index}", f"{ours}.mask_embed.{hf}"
        rows += _layer(f"{ours}/mask_downscaling/{layer}", *names, transform, shape)
    return rows


def _transformer() -> list[Row]:
    ours, theirs = "mask_decoder/transformer", "mask_decoder.transformer"
    layer = f"{ours}/layers/{{i}}"
    rows = _attention(f"{layer}/self_attn", "E")
    for name in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
        rows += _attention(f"{layer}/{name}", "A")
    rows += _same_names(f"{layer}/mlp", ("lin1",), "dense", "E F")
    rows += _same_names(f"{layer}/mlp", ("lin2",), "dense", "F E")
    for n in range(1, 5):
        names = f"{theirs}.layers.{{i}}.norm{n}", f"{theirs}.layers.{{i}}.layer_norm{n}"
        rows += _layer(f"{layer}/norm{n}", *names, "same", "E")
    rows += _attention(f"{ours}/final_attn_token_to_image", "A")
    names = f"{theirs}.norm_final_attn", f"{theirs}.layer_norm_final_attn"
    return rows + _layer(f"{ours}/norm_final_attn", *names, "same", "E")


def _mask_decoder() -> list[Row]:
    ours = "mask_decoder"
    rows = [
        Row(f"{ours}/{name}", *[f"{ours}.{name}.weight"] * 2, "same", f"{count} E")
        for name, count in (("iou_token", 1), ("mask_tokens", STACKED))
    ]
    for layer, index, hf, transform, shape in (
        ("conv1", 0, "upscale_conv1", "deconv", "E 2 2 E/4"),
        ("norm", 1, "upscale_layer_norm", "same", "E/4"),
        ("conv2", 3, "upscale_conv2", "deconv", "E/4 2 2 E/8"),
    ):
        names = f"{ours}.output_upscaling.{index}", f"{ours}.{hf}"
        rows += _layer(f"{ours}/upscaling/{layer}", *names, transform, shape)
    for mlp, theirs, hidden, last in (
        ("hyper_mlps", "output_hypernetworks_mlps.{m}", "E", "E/8"),
        ("iou_head", "iou_prediction_head", "I", str(STACKED)),
    ):
        shapes = f"E {hidden}", f"{hidden} {hidden}", f"{hidden} {last}"
        for j, hf in enumerate(("proj_in", "layers.0", "proj_out")):
            names = f"{ours}.{theirs}.layers.{j}", f"{ours}.{theirs}.{hf}"
            rows += _layer(f"{ours}/{mlp}/layers/{j}", *names, "dense", shapes[j])
    return rows


TABLE = [*_encoder(), *_prompt_encoder(), *_transformer(), *_mask_decoder()]
