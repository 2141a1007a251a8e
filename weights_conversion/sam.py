"""Converts SAM tensors between the official, the Hugging Face and our layout, and writes ours."""

import functools
import re
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import FORMAT, FORMAT_VERSION, MASK_TOKENS, base_files
from pgpsam_jax.utils.files import write_json
from pgpsam_jax.utils.untrusted_text import read_user_json
from weights_conversion import sam_table, tiny_vit_table
from weights_conversion.checkpoint_files import write_weights, writing
from weights_conversion.remap import Tensors, read, write
from weights_conversion.tensor_layouts import Layout

OFFICIAL = Layout("official", "SAM", sam_table.OFFICIAL)
_POSITIONS = "shared_image_embedding.positional_embedding"
HUGGINGFACE = Layout(
    "huggingface",
    "SAM",
    sam_table.HUGGINGFACE,
    duplicates={"prompt_encoder.shared_embedding.positional_embedding": _POSITIONS},
)
VARIANTS = {  # (width, depth)
    (768, 12): "vit_b",
    (1024, 24): "vit_l",
    (1280, 32): "vit_h",
    (96, 4): "vit_t",
}


# Functions (tensors, source): our float32 tensors for those of a layout, and back, bit for bit, but
# without duplicates; `source` names the file in errors.
from_official, to_official = functools.partial(read, OFFICIAL), functools.partial(write, OFFICIAL)
from_huggingface = functools.partial(read, HUGGINGFACE)
to_huggingface = functools.partial(write, HUGGINGFACE)
LITE_MEDSAM = Layout("lite_medsam", "SAM", tiny_vit_table.LITE_MEDSAM, unused=tiny_vit_table.UNUSED)
MOBILE_SAM = Layout("mobile_sam", "SAM", tiny_vit_table.MOBILE_SAM, unused=tiny_vit_table.UNUSED)
LAYOUTS = {layout.name: layout for layout in (OFFICIAL, HUGGINGFACE, LITE_MEDSAM, MOBILE_SAM)}

OF_SAM = {"colors": "normalized", "mask_tokens": [*MASK_TOKENS]}  # what Meta's weights are for


def detect_layout(tensors: Tensors, source: str) -> str:
    """Returns a key of `LAYOUTS`, by the image encoder; raises `UserError` for none."""
    if (embed := tensors.get("image_encoder.patch_embed.seq.0.c.weight")) is not None:
        return "lite_medsam" if embed.shape[2:] == (1, 1) else "mobile_sam"
    heads = {re.match(r"[^./]*[./]?", name)[0] for name in tensors}
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
    """Returns what weights are for: encoder, image and patch size, colors, trained mask tokens.

    variant: name of the encoder; `custom` for unofficial sizes. colors and mask_tokens, see
    `TrainedFor`, are those of LiteMedSAM or of SAM: what was trained further may have others.
    """
    if "image_encoder/pos_embed" not in tensors:
        lite = tensors["image_encoder/patch_embed/0/kernel"].ndim == 2
        sizes = {"variant": "tiny_vit", "image_size": 256 if lite else 1024}
        if lite:
            return sizes | {"patch_size": 4, "colors": "unit", "mask_tokens": [0]}
        return sizes | {"patch_size": 16} | OF_SAM
    _, grid, _, width = tensors["image_encoder/pos_embed"].shape
    patch = tensors["image_encoder/patch_embed/kernel"].shape[0]
    depth = sum(name.endswith("/attn/qkv/kernel") for name in tensors)
    variant = VARIANTS.get((width, depth), "custom")
    sizes = {"variant": variant, "image_size": grid * patch, "patch_size": patch}
    return sizes | OF_SAM


def store(
    output, tensors: Tensors, origin: dict, *, trained: dict | None = None, overwrite: bool = False
) -> dict:
    """Writes our tensors to `<output>.safetensors` and `<output>.json`, for `config.model.base`.

    Args:
      output: stem of the two files.
      tensors: by our paths.
      origin: fields of `<output>.json` about their source.
      trained: `colors` and `mask_tokens` where they are not what `describe` returns.
      overwrite: replace files of other content.

    Returns:
      The content of `<output>.json`.

    Raises:
      UserError: other files are there and `overwrite` is not given.
    """
    weights, sidecar = base_files(output)
    if sidecar.exists() and not overwrite and not _is_sidecar(sidecar):
        raise UserError(
            f"{sidecar} exists and does not describe converted weights; choose another --output, "
            "or replace it with --overwrite"
        )
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **describe(tensors),
        **(trained or {}),
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
        value = read_user_json(path, "description")
    except UserError:
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT
