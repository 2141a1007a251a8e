"""The state dict of the authors' release written down by hand, at any size, in its order."""

import itertools
import math

import numpy as np

# D encoder width, depth, G grid, P patch, C head width, S window, E decoder width, N classes; the
# other sizes follow, and `stages` and `layers` of the decoder are two. VIT_B is what the release
# trains, SMALL the encoder vit_t at 32 px.
VIT_B = dict(D=768, depth=12, whole=(2, 5, 8, 11), G=32, P=16, C=64, S=14, E=256, N=9)
SMALL = dict(D=96, depth=4, whole=(1, 3), G=4, P=8, C=32, S=8, E=64, N=3)
RANK, ALPHA, K, STRIP = 5, 8, 4, 5


def release_shapes(z: dict) -> dict[str, tuple]:
    """Names and shapes, from the modules of the release and not from our table."""
    shapes = {}
    d, e, n, grid = (z[letter] for letter in "DENG")
    q, area = ALPHA * n, grid * grid

    def own(prefix, **sizes):
        shapes.update({f"{prefix}.{name}": shape for name, shape in sizes.items()})

    def linear(name, inputs, outputs, bias=True):
        own(name, weight=(outputs, inputs))
        if bias:
            own(name, bias=(outputs,))

    def norm(name, width):
        own(name, weight=(width,), bias=(width,))

    def conv(name, inputs, outputs, height=1, width=None, bias=True):
        own(name, weight=(outputs, inputs, height, width or height))
        if bias:
            own(name, bias=(outputs,))

    def upscale(name):
        for j, (inputs, outputs) in enumerate(((e, e // 4), (e // 4, e // 8))):
            own(f"{name}.{j}.up_sample", weight=(inputs, outputs, 2, 2), bias=(outputs,))

    def attention(name, outer, inner):
        for part in "qkv":
            linear(f"{name}.{part}_proj", outer, inner)
        linear(f"{name}.out_proj", inner, outer)

    def mlp(name, *widths, step=1):
        for j, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            linear(f"{name}.{step * j}", inputs, outputs)

    own("image_encoder", pos_embed=(1, grid, grid, d))
    conv("image_encoder.patch_embed.proj", 3, d, z["P"])
    for i in range(z["depth"]):
        block = f"image_encoder.blocks.{i}"
        rows = 2 * (grid if i in z["whole"] else z["S"]) - 1
        norm(f"{block}.norm1", d)
        own(f"{block}.attn", rel_pos_h=(rows, z["C"]), rel_pos_w=(rows, z["C"]))
        linear(f"{block}.attn.qkv", d, 3 * d)
        linear(f"{block}.attn.proj", d, d)
        for part in "qv":
            linear(f"{block}.attn.lora_linear_a_{part}", d, RANK, bias=False)
            linear(f"{block}.attn.lora_linear_b_{part}", RANK, d, bias=False)
        norm(f"{block}.norm2", d)
        linear(f"{block}.mlp.lin1", d, 4 * d)
        linear(f"{block}.mlp.lin2", 4 * d, d)
    conv("image_encoder.neck.0", d, e, bias=False)
    norm("image_encoder.neck.1", e)
    conv("image_encoder.neck.2", e, e, 3, bias=False)
    norm("image_encoder.neck.3", e)

    decoder = "mask_decoder"
    for i in range(z.get("layers", 2)):
        layer = f"{decoder}.transformer.layers.{i}"
        cross = f"{layer}.cross_attn_token_to_image"
        own(cross, alpha=(e // 2,), beta=(e // 2,))
        for part in "qkv":
            linear(f"{cross}.{part}_proj", e, e // 2)
        linear(f"{cross}.linear", e // 2, e // 2)
        linear(f"{cross}.out_proj", e // 2, e)
        norm(f"{layer}.norm1", e)
        attention(f"{layer}.self_attn", e, e)
        norm(f"{layer}.norm2", e)
        linear(f"{layer}.mlp.lin1", e, 8 * e)
        linear(f"{layer}.mlp.lin2", 8 * e, e)
        norm(f"{layer}.norm3", e)
        attention(f"{layer}.cross_attn_image_to_token", e, e // 2)
        norm(f"{layer}.norm4", e)
    attention(f"{decoder}.transformer.final_attn_token_to_image", e, e // 2)
    norm(f"{decoder}.transformer.norm_final_attn", e)
    own(f"{decoder}.pos_token", weight=(1, e))
    own(f"{decoder}.mask_tokens", weight=(n, e))
    norm(f"{decoder}.norm", n)
    attention(f"{decoder}.attn", area, area // 2)
    norm(f"{decoder}.mask_norm", area)
    linear(f"{decoder}.mask_proj1", n, 1)
    conv(f"{decoder}.mask_proj2.conv", 1, 1)
    upscale(f"{decoder}.output_upscaling")
    for j, inputs in enumerate((e // 4, e // 8)):
        conv(f"{decoder}.skip_connect.{j}.conv", inputs, e // 8)
        norm(f"{decoder}.skip_connect.{j}.norm", e // 8)
    for m in range(n):
        mlp(f"{decoder}.output_hypernetworks_mlps.{m}.layers", e, e, e, e // 8)

    def squeeze(name):
        conv(f"{name}.0.conv", e, e // 2, bias=False)
        norm(f"{name}.0.norm", e // 2)
        conv(f"{name}.1.conv", e // 2, e, bias=False)

    def generator(name):
        dense, sparse = f"{name}.dense_prompt_generator", f"{name}.sparse_prompt_generator"
        own(dense, alpha=(e,))
        linear(f"{dense}.proj", e + n, e)
        linear(f"{dense}.linear", e, e)
        norm(f"{dense}.norm", e)
        conv(f"{dense}.dcn.in_proj.conv", e, e)
        for j in range(2):
            conv(f"{dense}.dcn.deform_conv{j}.dcn_offset", e, 27, 3)
            conv(f"{dense}.dcn.deform_conv{j}.deform_conv", 1, e, 3)
        conv(f"{dense}.dcn.conv.conv", e, e)
        norm(f"{dense}.dcn.norm", e)
        conv(f"{dense}.dcn.out_proj.0.conv", e, e)
        conv(f"{dense}.dcn.out_proj.1.conv", 1, e, 3)
        conv(f"{dense}.dcn.out_proj.2.conv", e, e)
        conv(f"{dense}.out.0.conv", e, e // 2)
        conv(f"{dense}.out.2.conv", e // 2, e)
        adapter = f"{sparse}.prototype_adapter"
        own(sparse, alpha=(e,))
        conv(f"{sparse}.dconv.conv", e, e, 3)
        linear(f"{adapter}.in_proj", e + q, e)
        linear(f"{adapter}.linear", e, e)
        norm(f"{adapter}.norm", e)
        for m in range(8):
            linear(f"{adapter}.adapter_layer.{m}.0", e, e // 4)
        mlp(f"{adapter}.out_proj.layers", 2 * e, e, e, e)
        mlp(f"{sparse}.out", e, e // 2, e, step=2)

    encoder, stages = "prototype_prompt_encoder", z.get("stages", 2)
    for i in range(stages):
        refine = f"{encoder}.feature_refinement.{i}"
        conv(f"{refine}.proj.conv", d, e, bias=False)
        norm(f"{refine}.proj.norm", e)
        own(f"{refine}.scm", alpha=(e,), beta=(e,))
        conv(f"{refine}.scm.sem_conv.0.conv", 1, e, 1, STRIP, bias=False)
        norm(f"{refine}.scm.sem_conv.0.norm", e)
        conv(f"{refine}.scm.sem_conv.1.conv", 1, e, STRIP, 1, bias=False)
        squeeze(f"{refine}.scm.cem_conv")
        conv(f"{refine}.scm.conv.0.conv", 2, e, bias=False)
        norm(f"{refine}.scm.conv.0.norm", e)
        conv(f"{refine}.scm.conv.1.conv", e, e)
        norm(f"{refine}.final.norm", e)
        conv(f"{refine}.final.project_in.conv", e, 2 * e)
        conv(f"{refine}.final.dwconv.conv", 1, 2 * e, 3, bias=False)
        conv(f"{refine}.final.project_out.conv", e, e)
        upscale(f"{refine}.up_sample")
    for i in range(stages):
        refine = f"{encoder}.prototype_refinement.{i}"
        own(refine, inter=(e,), intra=(e,))
        linear(f"{refine}.in_proj1", e, e)
        linear(f"{refine}.in_proj2", e, e)
        attn = f"{refine}.class_attn"
        own(attn, alpha=(area,), beta=(area,))
        norm(f"{attn}.q_norm", e)
        linear(f"{attn}.q_proj", e, e)
        conv(f"{attn}.x_proj.0.conv", e + n, e)
        conv(f"{attn}.x_proj.1.conv", e, e)
        norm(f"{attn}.x_proj.1.norm", e)
        conv(f"{attn}.x_conv.conv", 1, e, 3)
        linear(f"{attn}.k_proj", e, e)
        linear(f"{attn}.v_proj", e, e)
        conv(f"{attn}.image_conv.conv", e, 1)
        conv(f"{attn}.mask_conv.conv", n, 1)
        linear(f"{attn}.image_proj", area, grid)
        linear(f"{attn}.mask_proj", area, grid)
        conv(f"{attn}.conv.conv", 1, n * (K + 1))
        linear(f"{attn}.out_proj", e, e)
        linear(f"{refine}.linear1", q + n, q)
        linear(f"{refine}.linear2", e + n, e)
        for j in (1, 2):
            norm(f"{refine}.out_proj{j}.norm", e)
            mlp(f"{refine}.out_proj{j}.ffl", e, 4 * e, e, step=2)
    for i in range(stages):
        generator(f"{encoder}.prompt_generator.{i}")
    own(f"{encoder}.level_image", weight=(stages, e))
    own(f"{encoder}.level_mask", weight=(stages, n))
    own("pre_prompt.mask_embed", weight=(1, e))
    squeeze("pre_prompt.csm.mlp")
    generator("pre_prompt.prompt_generator")
    for name, rows in (("prototypes", (q, n)), ("embed", (q, n))):
        for kind, count in zip(("inter", "intra"), rows, strict=True):
            own(f"global_prototypes.{kind}_{name}", weight=(count, e))
    return shapes


def release_state(sizes: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of the size that trained ones have, so that activations stay finite."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in release_shapes(sizes).items():
        values = rng.random(shape, np.float32) - np.float32(0.5)
        if len(shape) > 1:
            values *= np.float32(3.5 * math.prod(shape[1:]) ** -0.5)  # variance 1 / fan-in
        state[name] = values + np.float32(len(shape) == 1 and name.endswith(".weight"))
    return state
