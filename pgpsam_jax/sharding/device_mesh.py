"""Mesh and shardings: a (data, fsdp, tensor) mesh and a table of regex -> PartitionSpec per method.

The batch is split over `data` and `fsdp`. Weights, optimiser moments and the frozen base are
stored in parts over `fsdp` and `tensor`, whatever is large of them, and gathered over `fsdp` when
a layer uses them (`models/placement.py`). `tensor` splits heads and hidden channels of the image
encoder; the decoder, small beside it, is computed alike by the devices of `tensor`.
Model code knows nothing of this: specs are found by parameter path.
"""

import functools
import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgpsam_jax.errors import UserError
from pgpsam_jax.sharding.context import Placement, traced_for

AXES = ("data", "fsdp", "tensor")
BATCH, PARTS = ("data", "fsdp"), ("fsdp", "tensor")
SMALL = 2**16  # numbers in an array that may lie whole on every device

P = PartitionSpec
INPUTS, OUTPUTS = P(PARTS, None), P(None, PARTS)  # of a kernel that is gathered whole

# The rows all methods share, those of SAM; first match wins, and a path that no row matches is
# replicated. Optimiser moments carry their parameter's path and so its sharding.
SAM = (
    # q, k and v lie side by side, so a part of the outputs would not be one of whole heads: parts
    # of the inputs are exchanged for them.
    (r"attn/qkv/kernel$", P(("tensor", "fsdp"), None)),
    (r"attn/lora/b$", P(None, None, "tensor")),
    (r"blocks/\d+/mlp/lin1/kernel$", P("fsdp", "tensor")),
    (r"blocks/\d+/(attn/proj|mlp/lin2)/kernel$", P("tensor", "fsdp")),
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
# Key of `methods.METHODS` -> the rows that a method has besides SAM's.
OWN = {
    ("pgpsam", "paper"): _PAPER,
    ("pgpsam", "release"): _RELEASE,
    ("hsam", ""): _HSAM,
    ("samlst", ""): _SAMLST,
    ("surgicalsam", ""): _SURGICALSAM,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh over all devices; one size may be -1, "the rest". Sizes that do not fit are refused."""
    devices = jax.devices() if devices is None else devices
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices)
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = known >= 1 and count % known == 0 and (len(unknown) == 1 or known == count)
    if len(unknown) > 1 or min(sizes.values()) < -1 or not fits:
        raise UserError(
            f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit {count} "
            f"devices; the product must be {count}: choose each from {_listed(_divisors(count))}, "
            "or -1 for at most one of them, the rest"
        )
    for name in unknown:
        sizes[name] = count // known
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check(mesh: Mesh, encoder: str, heads: int, width: int, batch: int) -> None:
    """Checks that a model divides over a mesh.

    Args:
      encoder: its name, for messages.
      heads, width: of its attention; over `tensor` and over `fsdp` x `tensor`.
      batch: rows of the global batch; over `data` x `fsdp`.

    Raises:
      UserError: names the sizes that do.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in AXES)
    tensors = [n for n in _divisors(mesh.size) if heads % n == 0]
    if tensor not in tensors:
        raise UserError(
            f"config.mesh.tensor is {tensor}, but the {heads} heads of {encoder} "
            f"and {mesh.size} devices divide over {_listed(tensors)} only; choose one of these"
        )
    if width % (fsdp * tensor):
        choices = [n for n in _divisors(mesh.size // tensor) if width % (n * tensor) == 0]
        raise UserError(
            f"config.mesh.fsdp is {fsdp}, but the width {width} of {encoder} does "
            f"not divide over fsdp x tensor = {fsdp * tensor}; choose fsdp from {_listed(choices)}"
        )
    lanes = data * fsdp
    if batch % lanes:
        choices = [n for n in tensors if batch % (mesh.size // n) == 0]
        other = f", or config.mesh.tensor {_listed(choices)}" if choices else ""
        raise UserError(
            f"train.batch_size {batch} does not divide over the {lanes} devices of data x fsdp; "
            f"choose a multiple of {lanes}{other}"
        )


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def spec_of(method, path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The spec of a parameter path in the table of a method, a key of `OWN` or of none.

    Axes, from the last on, that do not divide their dimension are left out.
    """
    for pattern, spec in (*OWN.get(method, ()), *SAM):
        if re.search(pattern, path) and len(spec) == len(shape):
            return P(*(_fitting(*pair, mesh) for pair in zip(spec, shape, strict=True)))
    return P()


def _fitting(axes, size: int, mesh):
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if len(axes) > 1 else axes[0] if axes else None


def state_shardings(tree, mesh: Mesh, method=None):
    """NamedSharding for every leaf of a tree of states (arrays or shapes), by its path.

    method: see `spec_of`; None for a part of SAM by itself.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, spec_of(method, name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of the global batch to global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def over_mesh(function, mesh: Mesh):
    """A step as it is to be jitted for the mesh: its attention suits the devices and is split."""
    placement = Placement.of(
        mesh.devices.flat[0],
        mesh=mesh,
        batch_axes=BATCH,
        head_axes=("tensor",),
        weight_axes=PARTS,
    )

    @functools.wraps(function)
    def step(*args):
        with traced_for(placement):
            return function(*args)

    return step
