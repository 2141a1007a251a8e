"""SAM tensors from the official or the Hugging Face layout to ours and back, all or nothing.

Each name template of `sam_table.TABLE` becomes a regex. Every name must match exactly one row,
every row must be filled, every shape must agree; all that is wrong is reported in one `UserError`.
Nothing is computed: tensors are transposed and stacked, so both directions are exact inverses.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pgpsam_jax.errors import UserError
from weights_conversion.sam_table import DUPLICATES, STACKED, TABLE, TRANSFORMS, Row

VARIANTS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}  # (width, depth)
Tensors = Mapping[str, np.ndarray]


class _Slot(NamedTuple):
    """Place of one tensor: a row, its block number and, outside our layout, its stack number."""

    row: Row
    i: int | None
    m: int | None

    def name(self, layout: str) -> str:
        return getattr(self.row, layout).replace("{i}", str(self.i)).replace("{m}", str(self.m))


def from_official(tensors: Tensors, source: str = "checkpoint") -> dict[str, np.ndarray]:
    """Our float32 tensors from the names of the official release; `source` names it in errors."""
    return _read(tensors, "official", source)


def from_huggingface(tensors: Tensors, source: str = "checkpoint") -> dict[str, np.ndarray]:
    """Our float32 tensors from `transformers.SamModel` names; `source` names it in errors."""
    return _read(tensors, "huggingface", source)


def to_official(tensors: Tensors, source: str = "weights") -> dict[str, np.ndarray]:
    """Inverse of `from_official`, bit for bit."""
    return _write(tensors, "official", source)


def to_huggingface(tensors: Tensors, source: str = "weights") -> dict[str, np.ndarray]:
    """Inverse of `from_huggingface`, bit for bit; names in `DUPLICATES` are not written."""
    return _write(tensors, "huggingface", source)


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


def _read(tensors: Tensors, layout: str, source: str) -> dict[str, np.ndarray]:
    errors = []
    tensors = _without_duplicates(tensors, layout, errors)
    found = _match(tensors, layout, errors)
    _check(found, tensors, layout, errors)
    _raise(errors, layout, source)
    parts = defaultdict(list)
    for slot in sorted(found, key=lambda slot: slot.m or 0):
        array = TRANSFORMS[slot.row.transform].forward(tensors[found[slot]])
        parts[slot.name("ours")].append(array)
    result, stacked = {}, {slot.name("ours") for slot in found if slot.row.stacked}
    for name, arrays in parts.items():
        with np.errstate(over="ignore"):  # reported below
            array = np.stack(arrays) if name in stacked else arrays[0]
            result[name] = np.array(array, np.float32, order="C")
        if not np.isfinite(result[name]).all():
            errors.append(f"not finite in float32: {name}")
    _raise(errors, layout, source)
    return result


def _write(tensors: Tensors, layout: str, source: str) -> dict[str, np.ndarray]:
    errors = []
    found = _match(tensors, "ours", errors)
    _check(found, tensors, "ours", errors)
    _raise(errors, "pgpsam_jax", source)
    result = {}
    for slot, name in found.items():
        arrays = tensors[name] if slot.row.stacked else [tensors[name]]
        for m, array in enumerate(arrays):
            array = TRANSFORMS[slot.row.transform].inverse(array)
            result[slot._replace(m=m).name(layout)] = np.array(array, order="C")
    return result


def _raise(errors: list[str], layout: str, source: str) -> None:
    if errors:
        raise UserError(
            f"{source} does not fit the {layout} SAM layout in {len(errors)} places; convert an "
            "unmodified SAM checkpoint:\n  " + "\n  ".join(errors)
        )


def _without_duplicates(tensors: Tensors, layout: str, errors: list[str]) -> Tensors:
    result = {n: t for n, t in tensors.items() if n not in DUPLICATES[layout]}
    for copy, original in DUPLICATES[layout].items():
        if copy in tensors and not np.array_equal(
            tensors[copy], result.setdefault(original, tensors[copy])
        ):
            errors.append(f"differs from its copy: {original} and {copy}")
    return result


@functools.cache
def _pattern(template: str) -> re.Pattern:
    numbers = {r"\{i\}": r"(?P<i>0|[1-9]\d?)", r"\{m\}": f"(?P<m>[0-{STACKED - 1}])"}
    pattern = re.escape(template)
    for placeholder, number in numbers.items():
        pattern = pattern.replace(placeholder, number)
    return re.compile(pattern, re.ASCII)


def _match(names: Iterable[str], layout: str, errors: list[str]) -> dict[_Slot, str]:
    """Name found for each slot; appends what is unexpected, matched twice, or missing."""
    patterns = [(row, _pattern(getattr(row, layout))) for row in TABLE]
    found = {}
    for name in names:
        hits = [(row, hit) for row, pattern in patterns if (hit := pattern.fullmatch(name))]
        if len(hits) != 1:
            errors.append(f"{'matched twice' if hits else 'unexpected'}: {name}")
            continue
        row, number = hits[0][0], hits[0][1].groupdict()
        found[_Slot(row, *(int(number[k]) if k in number else None for k in "im"))] = name
    missing = [slot.name(layout) for slot in _expected(found, layout) if slot not in found]
    errors.extend(f"missing: {name}" for name in missing)
    return found


def _expected(found: Iterable[_Slot], layout: str) -> list[_Slot]:
    """Every slot of the table, with as many blocks and layers as the highest number found."""
    depths = defaultdict(lambda: 1)
    for slot in found:
        if slot.i is not None:
            stem = slot.row.ours.split("{i}")[0]
            depths[stem] = max(depths[stem], slot.i + 1)
    slots = []
    for row in TABLE:
        stem, *numbered = row.ours.split("{i}")
        stacked = row.stacked and layout != "ours"
        for i in range(depths[stem]) if numbered else (None,):
            slots += [_Slot(row, i, m) for m in (range(STACKED) if stacked else (None,))]
    return slots


def _check(found: dict[_Slot, str], tensors: Tensors, layout: str, errors: list[str]) -> None:
    """Append wrong shapes and types. A size is what most tensors that have it say it is."""
    votes = defaultdict(Counter)
    for slot, name in found.items():
        for token, size in zip(*_sizes(slot, tensors[name].shape, layout), strict=False):
            votes[token][size] += 1
    sizes = {token: count.most_common(1)[0][0] for token, count in votes.items()}
    for slot, name in found.items():
        expected = _shape(slot, tensors[name].shape, sizes, layout)
        if tensors[name].shape != expected:
            errors.append(f"wrong shape: {name} is {tensors[name].shape}, expected {expected}")
        if tensors[name].dtype.kind != "f" and tensors[name].dtype.name != "bfloat16":
            errors.append(f"wrong type: {name} is {tensors[name].dtype}, expected floats")
    _check_tables(found, tensors, sizes, errors)


def _sizes(slot: _Slot, shape: tuple, layout: str) -> tuple[list[str], tuple]:
    """Tokens of our shape and the sizes that the tensor has there; no sizes if the rank differs."""
    tokens, transform = slot.row.shape.split(), TRANSFORMS[slot.row.transform]
    if layout == "ours":
        tokens = [str(STACKED)] * slot.row.stacked + tokens
        return tokens, shape if len(shape) == len(tokens) else ()
    rank = transform.inverse(np.empty((1,) * len(tokens))).ndim
    usable = len(shape) == rank and 0 not in shape
    dummy = np.broadcast_to(np.float32(0), shape)  # takes no memory
    return tokens, transform.forward(dummy).shape if usable else ()


def _shape(slot: _Slot, shape: tuple, sizes: dict[str, int], layout: str) -> tuple[int, ...]:
    """Shape that the tensor should have in its own layout; sizes that nothing tells are its own."""
    tokens, own = _sizes(slot, shape, layout)
    own = own or (1,) * len(tokens)
    expected = []
    for token, size in zip(tokens, own, strict=True):
        times, letter, divisor = re.fullmatch(r"(\d*)([A-Z]?)/?(\d*)", token).groups()
        free = letter == "R" or (letter and letter not in sizes)
        value = int(times or 1) * sizes.get(letter, 1) // int(divisor or 1)
        expected.append(size if free else value)
    if layout == "ours":
        return tuple(expected)
    return TRANSFORMS[slot.row.transform].inverse(np.broadcast_to(np.float32(0), expected)).shape


def _check_tables(found, tensors: Tensors, sizes: dict[str, int], errors: list[str]) -> None:
    """Relative-position tables have 2G-1 rows in global blocks, one other odd number in windows."""
    tables = {name: slot for slot, name in found.items() if slot.row.shape.startswith("R")}
    rows = {name: tensors[name].shape[0] for name in tables if tensors[name].ndim == 2}
    if "G" not in sizes:  # then the position embedding is missing or of a wrong rank, as reported
        return
    whole = 2 * sizes["G"] - 1
    windows = Counter(n for n in rows.values() if n != whole and n % 2).most_common(1)
    allowed = sorted({whole, *(n for n, _ in windows)})
    for name, n in rows.items():
        if n not in allowed:
            errors.append(f"wrong shape: {name} has {n} rows, expected one of {allowed}")
        elif name.endswith("rel_pos_h") and rows.get(f"{name[:-1]}w", n) != n:
            errors.append(f"wrong shape: {name} and {name[:-1]}w differ in their rows")
