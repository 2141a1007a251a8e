"""The frozen SAM backbone on disk: read converted weights, fit them to another input size.

`weights_conversion.convert` writes `<stem>.safetensors` (flat paths, float32) and `<stem>.json`.
"""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for checkpoints stored in it
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.bases import BASES, locate
from pgpsam_jax.utils.files import file_digest
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

FORMAT = "pgpsam_jax SAM weights"
FORMAT_VERSION = 1
# What an encoder was trained on. Unit: images in [0, 1]. Normalized: to mean 0 and SD 1 over the
# pictures that SAM was trained on.
COLORS = ("unit", "normalized")
MASK_TOKENS = (0, 1, 2, 3)  # of SAM: the single mask, then three of an ambiguous prompt
_RESIZED = ("image_encoder/blocks/{}/attn/rel_pos_h", "image_encoder/blocks/{}/attn/rel_pos_w")


# Checkpoints that the SAM authors publish, by encoder.
OFFICIAL = {size: BASES[f"sam_{size}"].sources[0] for size in ("vit_b", "vit_l", "vit_h")}


@dataclass(frozen=True)
class Base:
    """Backbone weights: float32 tensors by path, the sidecar, SHA-256 of the safetensors file."""

    tensors: dict[str, np.ndarray]
    meta: dict
    digest: str


def base_files(path) -> tuple[Path, Path]:
    """The safetensors file and its sidecar, from their common stem or the name of either.

    The stem may be a name in `bases.BASES`.
    """
    path = locate(path)
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.json")


def how_to_get(path, source=None) -> str:
    """What to type to have the converted weights `path`: download address and convert command.

    The variant is the one named in `source` (a `.pth` to download to) or `path`; else vit_b.
    """
    stem = base_files(path)[0].with_suffix("")
    if stem == locate(stem.name) and source is None:
        return f"run: pgpsam fetch {stem.name}"
    source = Path(source) if source and Path(source).suffix == ".pth" else None
    names = f"{source.name if source else ''} {stem.name}"
    file = OFFICIAL[next((v for v in OFFICIAL if v in names), "vit_b")]
    source = str(source or file.file)
    command = ["pgpsam", "convert"]
    command += ["--source", source, "--output", str(stem)]
    return f"download {file.address} to {source}, then run: {shlex.join(command)}"


def read_safetensors(path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; `UserError` if it is damaged or of an unusual type."""
    try:
        tensors = load_file(path)
        if strange := [name for name, array in tensors.items() if array.dtype.kind == "c"]:
            raise TypeError(f"{strange[0]} is complex")
        return tensors
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the path") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; use a larger machine") from None
    # AttributeError, TypeError: fp8 and fp4; ValueError: shapes that numpy does not have.
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file of ordinary numbers "
            f"({sanitize(str(error), 200)}); download or convert it again"
        ) from None


def load_base(path) -> Base:
    """Converted SAM weights from their stem or `.safetensors`, checked against the sidecar.

    `UserError` if a file is missing (with the commands that make it), or if the two do not belong
    together.
    """
    weights, sidecar = base_files(path)
    for file in (weights, sidecar):
        if not file.is_file():
            raise UserError(f"{file} does not exist; {how_to_get(weights)}")
    meta = read_user_json(sidecar, "description of weights")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{sidecar} does not describe SAM weights; convert the weights again")
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{sidecar} has format version {meta.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}; convert the weights again"
        )
    digest = file_digest(weights)
    if digest != meta.get("sha256"):
        raise UserError(
            f"{weights} is not the file that {sidecar.name} describes (its SHA-256 is {digest}); "
            "convert or copy both again"
        )
    return Base(read_safetensors(weights), meta, digest)


def recorded_digest(path) -> str | None:
    """SHA-256 of converted weights by their sidecar; None where either file is missing."""
    if not all(file.is_file() for file in base_files(path)):
        return None
    meta = read_user_json(base_files(path)[1], "description of weights")
    return meta.get("sha256") if isinstance(meta, dict) else None


class TrainedFor(NamedTuple):
    """What converted weights were trained for, as their sidecar says.

    encoder: name in `SamConfig.preset`, or None; patch_size: pixels, or None. colors: one of
    `COLORS`. mask_tokens: those whose masks were trained; the others give noise. Sidecars without
    the last two are of SAM.
    """

    encoder: str | None = None
    patch_size: int | None = None
    colors: str = "normalized"
    mask_tokens: tuple[int, ...] = MASK_TOKENS

    @classmethod
    def of(cls, path) -> "TrainedFor":
        """Reads the sidecar of converted weights; the defaults where there is none."""
        sidecar = base_files(path)[1]
        meta = read_user_json(sidecar, "description of weights") if sidecar.is_file() else {}
        meta = meta if isinstance(meta, dict) else {}
        encoder, colors = meta.get("variant", "custom"), meta.get("colors", "normalized")
        tokens = meta.get("mask_tokens", MASK_TOKENS)
        listed = isinstance(tokens, list | tuple) and len(tokens) > 0
        if colors not in COLORS or not listed or any(t not in MASK_TOKENS for t in tokens):
            raise UserError(
                f"{sidecar} has colors {sanitize(str(colors), 40)} and mask tokens "
                f"{sanitize(str(tokens), 40)}, where {' or '.join(COLORS)} and numbers from 0 to 3 "
                "belong; convert the weights again"
            )
        encoder = None if encoder == "custom" else encoder
        return cls(encoder, meta.get("patch_size"), colors, tuple(sorted(tokens)))


def check_encoder(path, encoder: str, patch_size: int) -> None:
    """Raises `UserError` if converted weights are of another encoder or patch size."""
    own = TrainedFor.of(path)
    given = {"encoder": (own.encoder, encoder), "patch_size": (own.patch_size, patch_size)}
    wrong = {field: pair for field, pair in given.items() if pair[0] not in (None, pair[1])}
    if wrong:
        settings = " and ".join(f"model.{field} is {is_}" for field, (_, is_) in wrong.items())
        flags = " ".join(f"--config.model.{field}={must}" for field, (must, _) in wrong.items())
        raise UserError(f"{settings}, which model.base ({path}) is not for; set {flags}")


def fit_base(
    tensors: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    *,
    global_blocks: Collection[int] | None = None,
) -> dict[str, np.ndarray]:
    """Weights for an input of `grid` = (height, width) patches; other tensors are shared.

    The position embedding is resized bilinearly and the tables of global blocks linearly, to
    2h-1 and 2w-1 rows, as SAM does it: half-pixel centers, no antialiasing. Window tables stay. A
    block is global if its tables have 2G-1 rows for the checkpoint's own grid G. Where that holds
    for every block the grid may equal the window: then `global_blocks` (block numbers) must tell.
    """
    if "image_encoder/pos_embed" not in tensors:  # TinyViT has no absolute positions
        return dict(tensors)
    position = tensors["image_encoder/pos_embed"]
    own = position.shape[1:3]
    result = dict(tensors)
    if tuple(grid) == own:
        return result
    if min(grid) < 1:
        raise UserError(f"a grid of {grid} patches is impossible; choose a larger image size")
    result["image_encoder/pos_embed"] = _resize(_resize(position, 1, grid[0]), 2, grid[1])
    if global_blocks is None:
        global_blocks = _global_blocks(tensors, own)
    for block in global_blocks:
        for template, size in zip(_RESIZED, grid, strict=True):
            name = template.format(block)
            if name in tensors:  # a model deeper than the weights is `select_base`'s to report
                result[name] = _resize(tensors[name], 0, 2 * size - 1)
    return result


def _global_blocks(tensors: Mapping[str, np.ndarray], own: tuple[int, int]) -> list[int]:
    lengths, block = [], 0
    while _RESIZED[0].format(block) in tensors:
        lengths.append(tuple(len(tensors[name.format(block)]) for name in _RESIZED))
        block += 1
    whole = tuple(2 * n - 1 for n in own)
    blocks = [i for i, length in enumerate(lengths) if length == whole]
    if blocks and len(blocks) == len(lengths):
        raise UserError(
            f"the weights are for a grid of {own}, in which global and windowed blocks look alike; "
            "name the global blocks (global_blocks)"
        )
    return blocks


def _resize(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear resize of one axis as `torch.nn.functional.interpolate(align_corners=False)`.

    Positions are rounded once to float32, as torch's fused multiply-add does it: exact ones would
    differ by up to 4e-5 in a table of 127 rows. In numpy because `jax.image.resize` multiplies at
    the accelerator's default precision.
    """
    old = array.shape[axis]
    if old == size:
        return array
    step = np.float64(np.float32(old) / np.float32(size))
    centers = (step * (np.arange(size) + 0.5) - 0.5).astype(np.float32).clip(0, old - 1)
    low = np.floor(centers).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (centers - np.floor(centers)).reshape(
        [-1 if a == axis else 1 for a in range(array.ndim)]
    )
    return array.take(low, axis) * (1 - weight) + array.take(high, axis) * weight


def select_base(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    rename: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Tensor for every model path in `shapes`, by model path; complete in both directions.

    `rename` maps a prefix of model paths to the prefix of the weights (longest match wins). Weights
    that no path asks for are an error too, unless a prefix in `ignore` covers them. All errors come
    in one `UserError`. Prefixes are whole path components.
    """
    rename = rename or {}
    errors, chosen = [], {}
    for path, shape in shapes.items():
        prefix = max((p for p in rename if _under(path, p)), key=len, default=None)
        name = path if prefix is None else (rename[prefix] + path[len(prefix) :]).lstrip("/")
        chosen[path] = name
        if name not in tensors:
            errors.append(f"missing: {name} (for {path})")
        elif tensors[name].shape != tuple(shape):
            errors.append(f"wrong shape: {name} is {tensors[name].shape}, {path} needs {shape}")
    left = set(tensors) - set(chosen.values())
    unused = sorted(n for n in left if not any(_under(n, p) for p in ignore))
    errors.extend(f"not used: {name}" for name in unused)
    if errors:
        raise UserError(
            f"the SAM weights do not fit the model in {len(errors)} places; choose the encoder "
            "variant and image size that they are for:\n  " + "\n  ".join(errors)
        )
    return {path: tensors[name] for path, name in chosen.items()}


def _under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/") or not prefix
