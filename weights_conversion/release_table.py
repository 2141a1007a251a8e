"""Name table between preset `release` and the state dict of the authors' code.

Rows under `unused/` are weights that the authors' code registers but never uses: they get no
gradient and affect no output, so they are kept beside our model.

Sizes in shapes: `D` encoder width, `M` encoder MLP, `G` token grid, `L` = G*G, `P` patch, `C` head
width, `R` length of a relative-position table, `E` decoder width, `A` cross-attention width, `F`
decoder MLP, `N` classes, `Q` inter prototypes, `T` prototype tokens, `S` stages, `W` LoRA rank, `K`
strip length; of joined sizes `H` is E + N, `I` is E + Q, `J` is Q + N.
"""

from weights_conversion import sam_table
from weights_conversion.tensor_layouts import (
    CONV,
    DECONV,
    DENSE,
    DEPTHWISE,
    POINTWISE,
    SAME,
    STRIP_COLUMN,
    STRIP_ROW,
    Row,
    attention,
    layer,
    weight,
)


def _lora() -> list[Row]:
    ours, theirs = "image_encoder/blocks/{i}/attn/lora", "image_encoder.blocks.{i}.attn.lora_linear"
    stack = ("q", "v")
    return [
        Row(f"{ours}/a", f"{theirs}_a_{{m}}.weight", DENSE, "D W", stack),
        Row(f"{ours}/b", f"{theirs}_b_{{m}}.weight", DENSE, "W D", stack),
    ]


def _decoder() -> list[Row]:
    ours = theirs = "mask_decoder"
    rows = [
        weight(f"{ours}/position", f"{theirs}.pos_token", SAME, "1 E"),
        weight(f"{ours}/mask_tokens", f"{theirs}.mask_tokens", SAME, "N E"),
        *layer(f"{ours}/class_maps/norm", f"{theirs}.norm", SAME, "N"),
        *attention(f"{ours}/class_maps/attention", f"{theirs}.attn", "L", "L/2"),
    ]
    for n, shape in (("1", "E 2 2 E/4"), ("2", "E/4 2 2 E/8")):
        name = f"{theirs}.output_upscaling.{int(n) - 1}.up_sample"
        rows += layer(f"{ours}/upscaling/conv{n}", name, DECONV, shape)
    for n, shape in (("1", "E/4 E/8"), ("2", "E/8 E/8")):
        name = f"{theirs}.skip_connect.{int(n) - 1}"
        rows += layer(f"{ours}/skip/conv{n}", f"{name}.conv", POINTWISE, shape)
        rows += layer(f"{ours}/skip/norm{n}", f"{name}.norm", SAME, "E/8")
    for j, shape in enumerate(("E E", "E E", "E E/8")):
        name = f"{theirs}.output_hypernetworks_mlps.{{m}}.layers.{j}"
        rows += layer(f"{ours}/hyper_mlps/layers/{j}", name, DENSE, shape)
    return rows


def _cfm() -> list[Row]:
    ours, theirs = "cfm/{i}", "prototype_prompt_encoder.feature_refinement.{i}"
    merge = f"{theirs}.scm"
    rows = [
        weight(f"{ours}/projection/kernel", f"{theirs}.proj.conv", POINTWISE, "D E"),
        *layer(f"{ours}/norm", f"{theirs}.proj.norm", SAME, "E"),
        Row(f"{ours}/alpha", f"{merge}.alpha", SAME, "E"),
        Row(f"{ours}/beta", f"{merge}.beta", SAME, "E"),
        weight(f"{ours}/spatial/row/kernel", f"{merge}.sem_conv.0.conv", STRIP_ROW, "K E"),
        *layer(f"{ours}/spatial/norm", f"{merge}.sem_conv.0.norm", SAME, "E"),
        weight(f"{ours}/spatial/column/kernel", f"{merge}.sem_conv.1.conv", STRIP_COLUMN, "K E"),
        *_channel_gate(f"{ours}/channel", f"{merge}.cem_conv"),
        weight(f"{ours}/pairs", f"{merge}.conv.0.conv", POINTWISE, "2 E"),
        *layer(f"{ours}/merge_norm", f"{merge}.conv.0.norm", SAME, "E"),
        *layer(f"{ours}/merge", f"{merge}.conv.1.conv", POINTWISE, "E E"),
        *layer(f"{ours}/ffn/norm", f"{theirs}.final.norm", SAME, "E"),
        *layer(f"{ours}/ffn/project_in", f"{theirs}.final.project_in.conv", POINTWISE, "E 2E"),
        weight(f"{ours}/ffn/depthwise/kernel", f"{theirs}.final.dwconv.conv", DEPTHWISE, "3 3 2E"),
        *layer(f"{ours}/ffn/project_out", f"{theirs}.final.project_out.conv", POINTWISE, "E E"),
    ]
    for n, shape in (("1", "E 2 2 E/4"), ("2", "E/4 2 2 E/8")):
        name = f"{theirs}.up_sample.{int(n) - 1}.up_sample"
        rows += layer(f"{ours}/up/conv{n}", name, DECONV, shape)
    return rows


def _channel_gate(ours, theirs) -> list[Row]:
    return [
        weight(f"{ours}/reduce/kernel", f"{theirs}.0.conv", POINTWISE, "E E/2"),
        *layer(f"{ours}/norm", f"{theirs}.0.norm", SAME, "E/2"),
        weight(f"{ours}/expand/kernel", f"{theirs}.1.conv", POINTWISE, "E/2 E"),
    ]


def _ppr() -> list[Row]:
    ours, theirs = "ppr/{i}", "prototype_prompt_encoder.prototype_refinement.{i}"
    rows = [
        Row(f"{ours}/inter_gain", f"{theirs}.inter", SAME, "E"),
        Row(f"{ours}/intra_gain", f"{theirs}.intra", SAME, "E"),
        *layer(f"{ours}/inter_proj", f"{theirs}.in_proj1", DENSE, "E E"),
        *layer(f"{ours}/intra_proj", f"{theirs}.in_proj2", DENSE, "E E"),
        *layer(f"{ours}/inter_mix", f"{theirs}.linear1", DENSE, "J Q"),
        *layer(f"{ours}/intra_mix", f"{theirs}.linear2", DENSE, "H E"),
    ]
    for name, number in (("inter_ffn", 1), ("intra_ffn", 2)):
        source = f"{theirs}.out_proj{number}"
        rows += layer(f"{ours}/{name}/norm", f"{source}.norm", SAME, "E")
        rows += layer(f"{ours}/{name}/mlp/lin1", f"{source}.ffl.0", DENSE, "E 4E")
        rows += layer(f"{ours}/{name}/mlp/lin2", f"{source}.ffl.2", DENSE, "4E E")
    ours, theirs = f"{ours}/attention", f"{theirs}.class_attn"
    rows += [
        Row(f"{ours}/alpha", f"{theirs}.alpha", SAME, "L"),
        Row(f"{ours}/beta", f"{theirs}.beta", SAME, "L"),
        *layer(f"{ours}/q_norm", f"{theirs}.q_norm", SAME, "E"),
        *attention(ours, theirs, "E", "E"),
        *layer(f"{ours}/fuse/join", f"{theirs}.x_proj.0.conv", POINTWISE, "H E"),
        *layer(f"{ours}/fuse/project", f"{theirs}.x_proj.1.conv", POINTWISE, "E E"),
        *layer(f"{ours}/fuse/norm", f"{theirs}.x_proj.1.norm", SAME, "E"),
        *layer(f"{ours}/fuse/depthwise", f"{theirs}.x_conv.conv", DEPTHWISE, "3 3 E"),
    ]
    ours = f"{ours}/class_attention"
    for name, other, size in (("image", "image", "E"), ("class", "mask", "N")):
        rows += layer(f"{ours}/{name}_conv", f"{theirs}.{other}_conv.conv", POINTWISE, f"{size} 1")
        rows += layer(f"{ours}/{name}_fc", f"{theirs}.{other}_proj", DENSE, "L G")
    return rows + layer(f"{ours}/expand", f"{theirs}.conv.conv", POINTWISE, "1 T")


def _ppg(ours, theirs) -> list[Row]:
    name, source = f"{ours}/dense", f"{theirs}.dense_prompt_generator"
    rows = [
        Row(f"{name}/gain", f"{source}.alpha", SAME, "E"),
        *_tokens(f"{name}/tokens", source, "proj", "H"),
        *layer(f"{name}/mlp/lin1", f"{source}.out.0.conv", POINTWISE, "E E/2"),
        *layer(f"{name}/mlp/lin2", f"{source}.out.2.conv", POINTWISE, "E/2 E"),
    ]
    deform, block = f"{name}/deform", f"{source}.dcn"
    for name, other in (("project_in", "in_proj"), ("gate", "conv"), ("expand", "out_proj.0"),
                        ("project_out", "out_proj.2")):  # fmt: skip
        rows += layer(f"{deform}/{name}", f"{block}.{other}.conv", POINTWISE, "E E")
    rows += layer(f"{deform}/norm", f"{block}.norm", SAME, "E")
    rows += layer(f"{deform}/depthwise", f"{block}.out_proj.1.conv", DEPTHWISE, "3 3 E")
    for conv, number in (("near", 0), ("far", 1)):
        other = f"{block}.deform_conv{number}"
        rows += layer(f"{deform}/{conv}/offset", f"{other}.dcn_offset", CONV, "3 3 E 27")
        rows += layer(f"{deform}/{conv}", f"{other}.deform_conv", DEPTHWISE, "3 3 E")
    name, source = f"{ours}/sparse", f"{theirs}.sparse_prompt_generator"
    adapter, other = f"{name}/adapter", f"{source}.prototype_adapter"
    rows += [
        Row(f"{name}/gain", f"{source}.alpha", SAME, "E"),
        *layer(f"{name}/conv", f"{source}.dconv.conv", CONV, "3 3 E E"),
        *_tokens(f"{adapter}/tokens", other, "in_proj", "I"),
        *layer(f"{adapter}/branches", f"{other}.adapter_layer.{{m}}.0", DENSE, "E E/4"),
        *layer(f"{name}/mlp/lin1", f"{source}.out.0", DENSE, "E E/2"),
        *layer(f"{name}/mlp/lin2", f"{source}.out.2", DENSE, "E/2 E"),
    ]
    for j, shape in enumerate(("2E E", "E E", "E E")):
        rows += layer(f"{adapter}/mlp/layers/{j}", f"{other}.out_proj.layers.{j}", DENSE, shape)
    return rows


def _tokens(ours, theirs, join, joined) -> list[Row]:
    return [
        *layer(f"{ours}/join", f"{theirs}.{join}", DENSE, f"{joined} E"),
        *layer(f"{ours}/project", f"{theirs}.linear", DENSE, "E E"),
        *layer(f"{ours}/norm", f"{theirs}.norm", SAME, "E"),
    ]


def _rest() -> list[Row]:
    """Returns prototypes, levels and the pre-prompt pass."""
    encoder, tables = "prototype_prompt_encoder", "global_prototypes"
    rows = [
        weight("image_level", f"{encoder}.level_image", SAME, "S E"),
        weight("class_level", f"{encoder}.level_mask", SAME, "S N"),
        weight("pre_prompt/mask_embed", "pre_prompt.mask_embed", SAME, "1 E"),
        *_channel_gate("pre_prompt/csm/channel", "pre_prompt.csm.mlp"),
    ]
    for name, size in (("inter", "Q"), ("intra", "N")):
        rows.append(weight(name, f"{tables}.{name}_prototypes", SAME, f"{size} E"))
        rows.append(weight(f"{name}_embed", f"{tables}.{name}_embed", SAME, f"{size} E"))
    return rows


def _unused() -> list[Row]:
    ours = "unused/mask_decoder/transformer/layers/{i}/cross_attn_token_to_image"
    theirs = "mask_decoder.transformer.layers.{i}.cross_attn_token_to_image"
    return [
        Row(f"{ours}/alpha", f"{theirs}.alpha", SAME, "A"),
        Row(f"{ours}/beta", f"{theirs}.beta", SAME, "A"),
        *layer(f"{ours}/linear", f"{theirs}.linear", DENSE, "A A"),
        *layer("unused/mask_decoder/mask_norm", "mask_decoder.mask_norm", SAME, "L"),
        *layer("unused/mask_decoder/mask_proj1", "mask_decoder.mask_proj1", DENSE, "N 1"),
        *layer("unused/mask_decoder/mask_proj2", "mask_decoder.mask_proj2.conv", POINTWISE, "1 1"),
    ]


TABLE = [
    *(row for row in sam_table.OFFICIAL if row.ours.startswith("image_encoder/")),
    *_lora(),
    *(row for row in sam_table.OFFICIAL if row.ours.startswith("mask_decoder/transformer/")),
    *_decoder(),
    *_cfm(),
    *_ppr(),
    *_ppg("ppg/{i}", "prototype_prompt_encoder.prompt_generator.{i}"),
    *_ppg("pre_prompt/ppg", "pre_prompt.prompt_generator"),
    *_rest(),
    *_unused(),
]
