"""Name table between our SAM parameter paths and the official and Hugging Face checkpoints.

Sizes in shapes: `D` encoder width, `M` encoder MLP, `G` token grid, `P` patch, `C` head width, `R`
length of a relative-position table, `E` decoder width, `A` cross-attention width, `F` decoder MLP,
`I` IoU-head width, `T` mask-prompt channels.
"""

import re

from weights_conversion.tensor_layouts import (
    CONV,
    DECONV,
    DENSE,
    ROW,
    SAME,
    Row,
    Transform,
    attention,
    layer,
    weight,
)

STACK = ("0", "1", "2", "3")  # point embeddings; hyper-MLPs, one for each mask token
# Official name -> name of `transformers.SamModel`, applied in order.
_RENAMES = (
    (r".*\.pe_layer\.positional_encoding_gaussian_matrix",
     "shared_image_embedding.positional_embedding"),
    (r"^image_encoder\.blocks\b", "vision_encoder.layers"),
    (r"^image_encoder\b", "vision_encoder"),
    (r"\.patch_embed\.proj\b", ".patch_embed.projection"),
    (r"\bneck\.0", "neck.conv1"), (r"\bneck\.1", "neck.layer_norm1"),
    (r"\bneck\.2", "neck.conv2"), (r"\bneck\.3", "neck.layer_norm2"),
    (r"\.point_embeddings\b", ".point_embed"),
    (r"\bmask_downscaling\.0", "mask_embed.conv1"),
    (r"\bmask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"\bmask_downscaling\.3", "mask_embed.conv2"),
    (r"\bmask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"\bmask_downscaling\.6", "mask_embed.conv3"),
    (r"\boutput_upscaling\.0", "upscale_conv1"),
    (r"\boutput_upscaling\.1", "upscale_layer_norm"),
    (r"\boutput_upscaling\.3", "upscale_conv2"),
    (r"(mlps\.\{m\}|iou_prediction_head)\.layers\.0", r"\1.proj_in"),
    (r"(mlps\.\{m\}|iou_prediction_head)\.layers\.1", r"\1.layers.0"),
    (r"(mlps\.\{m\}|iou_prediction_head)\.layers\.2", r"\1.proj_out"),
    (r"\.norm(\d|_final_attn)", r".layer_norm\1"),
)  # fmt: skip


def _same_name(ours: str, transform: Transform, shape: str) -> list[Row]:
    return layer(ours, ours.replace("/", "."), transform, shape)


def _image_encoder() -> list[Row]:
    ours = "image_encoder"
    rows = [
        Row(f"{ours}/pos_embed", f"{ours}.pos_embed", SAME, "1 G G D"),
        *layer(f"{ours}/patch_embed", f"{ours}.patch_embed.proj", CONV, "P P 3 D"),
        weight(f"{ours}/neck/conv1/kernel", f"{ours}.neck.0", CONV, "1 1 D E"),
        *layer(f"{ours}/neck/norm1", f"{ours}.neck.1", SAME, "E"),
        weight(f"{ours}/neck/conv2/kernel", f"{ours}.neck.2", CONV, "3 3 E E"),
        *layer(f"{ours}/neck/norm2", f"{ours}.neck.3", SAME, "E"),
    ]
    ours = f"{ours}/blocks/{{i}}"
    for name in ("norm1", "norm2"):
        rows += _same_name(f"{ours}/{name}", SAME, "D")
    for name in (f"{ours}/attn/rel_pos_h", f"{ours}/attn/rel_pos_w"):
        rows.append(Row(name, name.replace("/", "."), SAME, "R C"))
    shapes = {"attn/qkv": "D 3D", "attn/proj": "D D", "mlp/lin1": "D M", "mlp/lin2": "M D"}
    for name, shape in shapes.items():
        rows += _same_name(f"{ours}/{name}", DENSE, shape)
    return rows


def _prompt_encoder() -> list[Row]:
    ours = "prompt_encoder"
    matrix = f"{ours}.pe_layer.positional_encoding_gaussian_matrix"
    mask = f"{ours}.mask_downscaling"
    return [
        Row(f"{ours}/pe_layer/gaussian_matrix", matrix, SAME, "2 E/2"),
        weight(f"{ours}/point_embeddings", f"{ours}.point_embeddings.{{m}}", ROW, "E"),
        weight(f"{ours}/not_a_point_embed", f"{ours}.not_a_point_embed", ROW, "E"),
        weight(f"{ours}/no_mask_embed", f"{ours}.no_mask_embed", ROW, "E"),
        *layer(f"{ours}/mask_downscaling/conv1", f"{mask}.0", CONV, "2 2 1 T/4"),
        *layer(f"{ours}/mask_downscaling/norm1", f"{mask}.1", SAME, "T/4"),
        *layer(f"{ours}/mask_downscaling/conv2", f"{mask}.3", CONV, "2 2 T/4 T"),
        *layer(f"{ours}/mask_downscaling/norm2", f"{mask}.4", SAME, "T"),
        *layer(f"{ours}/mask_downscaling/conv3", f"{mask}.6", CONV, "1 1 T E"),
    ]


def _transformer() -> list[Row]:
    ours, theirs = "mask_decoder/transformer", "mask_decoder.transformer"
    rows, block = [], f"{ours}/layers/{{i}}"
    for name, width in (("self_attn", "E"), ("cross_attn_token_to_image", "A"),
                        ("cross_attn_image_to_token", "A")):  # fmt: skip
        rows += attention(f"{block}/{name}", f"{theirs}.layers.{{i}}.{name}", "E", width)
    rows += _same_name(f"{block}/mlp/lin1", DENSE, "E F")
    rows += _same_name(f"{block}/mlp/lin2", DENSE, "F E")
    for n in range(1, 5):
        rows += _same_name(f"{block}/norm{n}", SAME, "E")
    name = "final_attn_token_to_image"
    rows += attention(f"{ours}/{name}", f"{theirs}.{name}", "E", "A")
    return rows + _same_name(f"{ours}/norm_final_attn", SAME, "E")


def _mask_decoder() -> list[Row]:
    ours = "mask_decoder"
    rows = [
        weight(f"{ours}/iou_token", f"{ours}.iou_token", SAME, "1 E"),
        weight(f"{ours}/mask_tokens", f"{ours}.mask_tokens", SAME, f"{len(STACK)} E"),
        *layer(f"{ours}/upscaling/conv1", f"{ours}.output_upscaling.0", DECONV, "E 2 2 E/4"),
        *layer(f"{ours}/upscaling/norm", f"{ours}.output_upscaling.1", SAME, "E/4"),
        *layer(f"{ours}/upscaling/conv2", f"{ours}.output_upscaling.3", DECONV, "E/4 2 2 E/8"),
    ]
    for mlp, theirs, shapes in (
        ("hyper_mlps", "output_hypernetworks_mlps.{m}", ("E E", "E E", "E E/8")),
        ("iou_head", "iou_prediction_head", ("E I", "I I", f"I {len(STACK)}")),
    ):
        for j, shape in enumerate(shapes):
            rows += layer(f"{ours}/{mlp}/layers/{j}", f"{ours}.{theirs}.layers.{j}", DENSE, shape)
    return rows


def _to_huggingface(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


OFFICIAL = tuple(
    row._replace(stack=STACK if row.stacked else None)
    for row in (*_image_encoder(), *_prompt_encoder(), *_transformer(), *_mask_decoder())
)
HUGGINGFACE = tuple(row._replace(theirs=_to_huggingface(row.theirs)) for row in OFFICIAL)
