"""How each parameter is stored over the mesh: a table of path regex -> PartitionSpec per method."""

import math
import re

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH, PARTS = ("data", "fsdp"), ("fsdp", "tensor")

P = PartitionSpec
INPUTS, OUTPUTS = P(PARTS, None), P(None, PARTS)  # of kernels that are gathered

# Rows for SAM's parameters, which all methods share. The first match counts; a path that matches no
# row is replicated. Optimizer moments have the path of their parameter, hence its sharding.
SAM_RULES = (
    # q, k and v are adjacent, so a part of the outputs would not consist of whole heads: the kernel
    # is stored in parts of its inputs, which are exchanged for parts of its outputs.
    (r"attn/qkv/kernel$", P(("tensor", "fsdp"), None)),
    (r"attn/lora/b$", P(None, None, "tensor")),
    (r"blocks/\d+/mlp/lin1/kernel$", P("fsdp", "tensor")),
    (r"blocks/\d+/(attn/proj|mlp/lin2)/kernel$", P("tensor", "fsdp")),
    # TinyViT, whose stages have no common number of heads that `tensor` could split.
    (r"stages/\d+/\d+/(attn/proj|mlp/lin[12])/kernel$", INPUTS),
    (r"(stages/\d+/\d+|merges/\d+)/(expand|project)/kernel$", INPUTS),
    (r"(patch_embed/kernel|pos_embed)$", P(None, None, None, PARTS)),
    (r"neck/conv[12]/kernel$", P(None, None, PARTS, None)),
    (r"transformer/.*/([qkv]_proj|out_proj|lin[12])/kernel$", INPUTS),
    (r"upscaling/conv[12]/kernel$", P(PARTS, None, None, None)),
    (r"hyper_mlps/layers/\d+/kernel$", P(None, PARTS, None)),
)
_PAPER = (
    (r"cfm/\d+/(projection|channel/(reduce|expand))/kernel$", INPUTS),
    (r"ppr/\d+/class_attention/(image|class)_fc/kernel$", INPUTS),
    (r"ppg/\d+/(dense|sparse)/mlp/lin[12]/kernel$", INPUTS),
    # Their inputs, channels and classes, rarely divide.
    (r"(ppr/\d+/fuse|ppg/\d+/(dense|sparse)/join)/kernel$", OUTPUTS),
)
_PLUS = (
    *_PAPER,
    (r"refine/\d+/project_(in|out)/kernel$", INPUTS),
    (r"(refine/\d+|stem)/conv/kernel$", P(None, None, PARTS, None)),
    (r"stem/(embed|shrink)/kernel$", P(None, None, None, PARTS)),
)
_RELEASE = (
    (r"cfm/\d+/(projection|channel/(reduce|expand)|merge|ffn/project_(in|out))/kernel$", INPUTS),
    (r"cfm/\d+/up/conv[12]/kernel$", P(PARTS, None, None, None)),
    (r"ppr/\d+/(attention/)?(inter|intra|q|k|v|out)_proj/kernel$", INPUTS),
    (r"ppr/\d+/(inter|intra)_ffn/mlp/lin[12]/kernel$", INPUTS),
    (r"ppr/\d+/attention/class_attention/(image|class)_fc/kernel$", INPUTS),
    (r"class_maps/attention/[a-z]+_proj/kernel$", INPUTS),
    (r"sparse/conv/kernel$", P(None, None, PARTS, None)),
    (r"offset/kernel$", P(None, None, PARTS, None)),
    (r"adapter/branches/kernel$", P(None, PARTS, None)),
    (r"(adapter/mlp/layers/\d+|(dense|sparse)/mlp/lin[12])/kernel$", INPUTS),
    (r"deform/(project_in|gate|expand|project_out)/kernel$", INPUTS),
    (r"(join|project|intra_mix)/kernel$", OUTPUTS),
)
_HSAM = ((r"mask_attention/(attention[12]/([qkv]|out)_proj|mlp/lin[12])/kernel$", INPUTS),)
_SAMLST = ((r"cnn/groups/\d+/\d+/conv[12]/kernel$", P(None, None, PARTS, None)),)
_SURGICALSAM = (
    (r"prompter/(sparse1|dense[12])/kernel$", INPUTS),
    (r"iou_head/layers/\d+/kernel$", INPUTS),
)
_UNET = (
    (r"(stem|down/\d+|merge/\d+)/(first|second)/conv/kernel$", P(None, None, PARTS, None)),
    (r"up/\d+/kernel$", P(PARTS, None, None, None)),
)
# Key of `methods.registry.METHODS` -> rows of a method, which come before SAM's.
METHOD_RULES: dict[tuple[str, str] | None, tuple[tuple[str, P], ...]] = {
    ("pgpsam", "paper"): _PAPER,
    ("pgpsam", "plus"): _PLUS,
    ("pgpsam", "release"): _RELEASE,
    ("hsam", ""): _HSAM,
    ("samlst", ""): _SAMLST,
    ("surgicalsam", ""): _SURGICALSAM,
    ("unet", ""): _UNET,
}


def spec_of(
    method: tuple[str, str] | None, path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec of a parameter path in the table of a method, a key of `METHOD_RULES` or of none.

    Axes, from the last on, that do not divide their dimension are left out.
    """
    for pattern, spec in (*METHOD_RULES.get(method, ()), *SAM_RULES):
        if re.search(pattern, path) and len(spec) == len(shape):
            return P(*(_fitting(*pair, mesh) for pair in zip(spec, shape, strict=True)))
    return P()


def _fitting(
    axes: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if len(axes) > 1 else axes[0] if axes else None
