"""Name table between our SAM parameter paths and the official and Hugging Face checkpoints.

Sizes in shapes: `D` encoder width, `M` encoder MLP, `G` token grid, `P` patch, `C` head width, `R`
length of a relative-position table, `E` decoder width, `A` cross-attention width, `F` decoder MLP,
`I` IoU-head width, `T` mask-prompt channels.
"""

from typing import NamedTuple

from weights_conversion.tensor_layouts import CONV, DECONV, DENSE, ROW, SAME, Row, Transform

STACK = ("0", "1", "2", "3")  # point embeddings; hyper-MLPs, one for each mask token


class _Line(NamedTuple):
    """A row of both tables."""

    ours: str
    official: str
    huggingface: str
    transform: Transform
    shape: str


def _layer(ours, official, huggingface, transform, shape) -> list[_Line]:
    """Returns kernel (norms: scale) and bias of a layer; the bias has the kernel's last size."""
    leaf = "scale" if transform is SAME else "kernel"
    return [
        _Line(f"{ours}/{leaf}", f"{official}.weight", f"{huggingface}.weight", transform, shape),
        _Line(f"{ours}/bias", f"{official}.bias", f"{huggingface}.bias", SAME, shape.split()[-1]),
    ]


def _same_names(prefix, names, transform, shape) -> list[_Line]:
    """Returns layers with the same name in all three layouts."""
    dotted = prefix.replace("/", ".")
    return [
        row
        for n in names
        for row in _layer(f"{prefix}/{n}", *[f"{dotted}.{n}"] * 2, transform, shape)
    ]


def _attention(prefix, width) -> list[_Line]:
    return _same_names(prefix, ("q_proj", "k_proj", "v_proj"), DENSE, f"E {width}") + _same_names(
        prefix, ("out_proj",), DENSE, f"{width} E"
    )


def _encoder() -> list[_Line]:
    ours, official, hf = "image_encoder", "image_encoder", "vision_encoder"
    rows = [
        _Line(f"{ours}/pos_embed", f"{official}.pos_embed", f"{hf}.pos_embed", SAME, "1 G G D"),
        *_layer(
            f"{ours}/patch_embed",
            f"{official}.patch_embed.proj",
            f"{hf}.patch_embed.projection",
            CONV,
            "P P 3 D",
        ),
    ]
    for n, (index, kernel) in enumerate(((0, "1 1 D E"), (2, "3 3 E E")), start=1):
        weights = f"{official}.neck.{index}.weight", f"{hf}.neck.conv{n}.weight"
        rows.append(_Line(f"{ours}/neck/conv{n}/kernel", *weights, CONV, kernel))
        norm = f"{official}.neck.{index + 1}", f"{hf}.neck.layer_norm{n}"
        rows += _layer(f"{ours}/neck/norm{n}", *norm, SAME, "E")
    ours, official, hf = f"{ours}/blocks/{{i}}", f"{official}.blocks.{{i}}", f"{hf}.layers.{{i}}"
    for n in (1, 2):
        rows += _layer(f"{ours}/norm{n}", f"{official}.norm{n}", f"{hf}.layer_norm{n}", SAME, "D")
    for table in ("rel_pos_h", "rel_pos_w"):
        names = f"{official}.attn.{table}", f"{hf}.attn.{table}"
        rows.append(_Line(f"{ours}/attn/{table}", *names, SAME, "R C"))
    for layer, shape in (
        ("attn/qkv", "D 3D"),
        ("attn/proj", "D D"),
        ("mlp/lin1", "D M"),
        ("mlp/lin2", "M D"),
    ):
        name = layer.replace("/", ".")
        rows += _layer(f"{ours}/{layer}", f"{official}.{name}", f"{hf}.{name}", DENSE, shape)
    return rows


def _prompt_encoder() -> list[_Line]:
    ours = "prompt_encoder"
    rows = [
        _Line(
            f"{ours}/pe_layer/gaussian_matrix",
            f"{ours}.pe_layer.positional_encoding_gaussian_matrix",
            "shared_image_embedding.positional_embedding",
            SAME,
            "2 E/2",
        ),
        _Line(
            f"{ours}/point_embeddings",
            f"{ours}.point_embeddings.{{m}}.weight",
            f"{ours}.point_embed.{{m}}.weight",
            ROW,
            "E",
        ),
    ]
    for name in ("not_a_point_embed", "no_mask_embed"):
        rows.append(_Line(f"{ours}/{name}", *[f"{ours}.{name}.weight"] * 2, ROW, "E"))
    for layer, index, hf, transform, shape in (
        ("conv1", 0, "conv1", CONV, "2 2 1 T/4"),
        ("norm1", 1, "layer_norm1", SAME, "T/4"),
        ("conv2", 3, "conv2", CONV, "2 2 T/4 T"),
        ("norm2", 4, "layer_norm2", SAME, "T"),
        ("conv3", 6, "conv3", CONV, "1 1 T E"),
    ):
        names = f"{ours}.mask_downscaling.{index}", f"{ours}.mask_embed.{hf}"
        rows += _layer(f"{ours}/mask_downscaling/{layer}", *names, transform, shape)
    return rows


def _transformer() -> list[_Line]:
    ours, theirs = "mask_decoder/transformer", "mask_decoder.transformer"
    layer = f"{ours}/layers/{{i}}"
    rows = _attention(f"{layer}/self_attn", "E")
    for name in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
        rows += _attention(f"{layer}/{name}", "A")
    rows += _same_names(f"{layer}/mlp", ("lin1",), DENSE, "E F")
    rows += _same_names(f"{layer}/mlp", ("lin2",), DENSE, "F E")
    for n in range(1, 5):
        names = f"{theirs}.layers.{{i}}.norm{n}", f"{theirs}.layers.{{i}}.layer_norm{n}"
        rows += _layer(f"{layer}/norm{n}", *names, SAME, "E")
    rows += _attention(f"{ours}/final_attn_token_to_image", "A")
    names = f"{theirs}.norm_final_attn", f"{theirs}.layer_norm_final_attn"
    return rows + _layer(f"{ours}/norm_final_attn", *names, SAME, "E")


def _mask_decoder() -> list[_Line]:
    ours = "mask_decoder"
    rows = [
        _Line(f"{ours}/{name}", *[f"{ours}.{name}.weight"] * 2, SAME, f"{count} E")
        for name, count in (("iou_token", 1), ("mask_tokens", len(STACK)))
    ]
    for layer, index, hf, transform, shape in (
        ("conv1", 0, "upscale_conv1", DECONV, "E 2 2 E/4"),
        ("norm", 1, "upscale_layer_norm", SAME, "E/4"),
        ("conv2", 3, "upscale_conv2", DECONV, "E/4 2 2 E/8"),
    ):
        names = f"{ours}.output_upscaling.{index}", f"{ours}.{hf}"
        rows += _layer(f"{ours}/upscaling/{layer}", *names, transform, shape)
    for mlp, theirs, hidden, last in (
        ("hyper_mlps", "output_hypernetworks_mlps.{m}", "E", "E/8"),
        ("iou_head", "iou_prediction_head", "I", str(len(STACK))),
    ):
        shapes = f"E {hidden}", f"{hidden} {hidden}", f"{hidden} {last}"
        for j, hf in enumerate(("proj_in", "layers.0", "proj_out")):
            names = f"{ours}.{theirs}.layers.{j}", f"{ours}.{theirs}.{hf}"
            rows += _layer(f"{ours}/{mlp}/layers/{j}", *names, DENSE, shapes[j])
    return rows


_LINES = [*_encoder(), *_prompt_encoder(), *_transformer(), *_mask_decoder()]


def _rows(name: str) -> tuple[Row, ...]:
    return tuple(
        Row(line.ours, theirs, line.transform, line.shape, STACK if "{m}" in theirs else None)
        for line in _LINES
        for theirs in (getattr(line, name),)
    )


OFFICIAL = _rows("official")
HUGGINGFACE = _rows("huggingface")
