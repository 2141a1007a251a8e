"""SAM tensors from the official or the Hugging Face layout to ours and back, and to files."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import FORMAT, FORMAT_VERSION, base_files
from pgpsam_jax.utils.files import write_json
from pgpsam_jax.utils.untrusted_text import read_json
from weights_conversion import sam_table
from weights_conversion.checkpoint_files import write_weights, writing
from weights_conversion.remap import Tensors, read, write
from weights_conversion.tensor_layouts import Layout

OFFICIAL = Layout("official", "SAM", sam_table.OFFICIAL)
HUGGINGFACE = Layout(
    "huggingface",
    "SAM",
    sam_table.HUGGINGFACE,
    duplicates={
        "prompt_encoder.shared_embedding.positional_embedding": (
            "shared_image_embedding.positional_embedding"
        )
    },
)
VARIANTS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}  # (width, depth)


def from_official(tensors: Tensors, source: str = "checkpoint") -> dict[str, np.ndarray]:
    """Our float32 tensors from the names of the official release; `source` names it in errors."""
    return read(tensors, OFFICIAL, source)


def from_huggingface(tensors: Tensors, source: str = "checkpoint") -> dict[str, np.ndarray]:
    """Our float32 tensors from `transformers.SamModel` names; `source` names it in errors."""
    return read(tensors, HUGGINGFACE, source)


def to_official(tensors: Tensors, source: str = "weights") -> dict[str, np.ndarray]:
    """Inverse of `from_official`, bit for bit."""
    return write(tensors, OFFICIAL, source)


def to_huggingface(tensors: Tensors, source: str = "weights") -> dict[str, np.ndarray]:
    """Inverse of `from_huggingface`, bit for bit; the layout's duplicates are not written."""
    return write(tensors, HUGGINGFACE, source)


def detect_layout(names: Iterable[str], source: str) -> str:
    """`official` or `huggingface`, from the name of the image encoder; `UserError` for neither."""
    heads = {re.match(r"[^./]*[./]?", name)[0] for name in names}
    for head, layout in (("image_encoder.", "official"), ("vision_encoder.", "huggingface")):
        if head in heads:
            return layout
    if "image_encoder/" in heads:
        raise UserError(f"{source} is already in this project's layout; use it as it is")
    raise UserError(
        f"{source} holds no SAM image encoder under image_encoder. or vision_encoder. "
        f"(but {', '.join(sorted(heads)[:5])}); give an official or Hugging Face SAM checkpoint"
    )


def describe(tensors: Tensors) -> dict:
    """Variant (`custom` if of no official size), image size and patch size of our tensors."""
    _, grid, _, width = tensors["image_encoder/pos_embed"].shape
    patch = tensors["image_encoder/patch_embed/kernel"].shape[0]
    depth = sum(name.endswith("/attn/qkv/kernel") for name in tensors)
    variant = VARIANTS.get((width, depth), "custom")
    return {"variant": variant, "image_size": grid * patch, "patch_size": patch}


def store(output, tensors: Tensors, origin: dict, *, overwrite: bool = False) -> dict:
    """Write our tensors as `config.model.base` takes them; return the sidecar.

    `<output>.safetensors` and `<output>.json`, which says `origin` of where they come from. Files
    of other content are kept, which is a `UserError`, unless `overwrite`.
    """
    weights, sidecar = base_files(output)
    if sidecar.exists() and not overwrite and not _is_sidecar(sidecar):
        raise UserError(
            f"{sidecar} is there and does not describe converted weights; choose another --output, "
            "or replace it with --overwrite"
        )
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **describe(tensors),
        "colors": "normalized",  # every SAM here; see `models.sam.COLORS`
        **origin,
        "sha256": write_weights(weights, tensors, overwrite=overwrite),
        "tensor_count": len(tensors),
        "parameter_count": sum(array.size for array in tensors.values()),
    }
    with writing(sidecar):
        write_json(sidecar, meta)
    return meta


def _is_sidecar(path: Path) -> bool:
    try:
        value = read_json(path, "description")
    except UserError:
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT
