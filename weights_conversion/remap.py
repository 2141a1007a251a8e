"""Renames and transposes tensors by a table, from a checkpoint's layout to ours and back.

Each name template of the table becomes a regex. Every name must match exactly one row, every row
must be filled, every shape must agree; one `UserError` reports all faults. Tensors are only
transposed and stacked, so both directions are exact inverses.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pgpsam_jax.errors import UserError
from weights_conversion.tensor_layouts import Layout, Row

Tensors = Mapping[str, np.ndarray]
OURS, THEIRS = "ours", "theirs"  # sides of a table
_NUMBER = r"0|[1-9]\d?"


class _Slot(NamedTuple):
    """Place of one tensor: a row, its block number and, on their side, its place in the stack."""

    row: Row
    i: int | None
    m: int | None

    def name(self, side: str) -> str:
        word = self.row.stack[self.m] if self.row.stack and self.m is not None else self.m
        return getattr(self.row, side).replace("{i}", str(self.i)).replace("{m}", str(word))


def read(layout: Layout, tensors: Tensors, source: str = "checkpoint") -> dict[str, np.ndarray]:
    """Returns our float32 tensors for tensors of `layout`; `source` names the file in errors."""
    errors: list[str] = []
    tensors = _without_duplicates(tensors, layout, errors)
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(layout.unused, n)}
    found = _look_up(tensors, layout, THEIRS, errors)
    _raise(errors, layout.name, layout.family, source)
    parts = defaultdict(list)
    for slot in sorted(found, key=lambda slot: slot.m or 0):
        parts[slot._replace(m=None)].append(slot.row.transform.forward(tensors[found[slot]]))
    result = {}
    for slot, arrays in parts.items():
        name = slot.name(OURS)
        with np.errstate(over="ignore"):  # reported below
            array = np.stack(arrays) if slot.row.stacked else arrays[0]
            result[name] = np.array(array, np.float32, order="C")
        if not np.isfinite(result[name]).all():
            errors.append(f"not finite in float32: {name}")
    _raise(errors, layout.name, layout.family, source)
    return result


def write(layout: Layout, tensors: Tensors, source: str = "weights") -> dict[str, np.ndarray]:
    """Inverts `read`, bit for bit; duplicates are not written."""
    errors: list[str] = []
    found = _look_up(tensors, layout, OURS, errors)
    _raise(errors, "pgpsam_jax", layout.family, source)
    result = {}
    for slot, name in found.items():
        arrays = tensors[name] if slot.row.stacked else [tensors[name]]
        for m, array in enumerate(arrays):
            array = slot.row.transform.inverse(array)
            result[slot._replace(m=m).name(THEIRS)] = np.array(array, order="C")
    return result


def absent(layout: Layout, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our tensors in the table that `tensors` lacks, from the other sizes."""
    found = _match(tensors, layout, OURS, [])
    counts = _counts(found, tensors, OURS)
    sizes = _vote(found, tensors, counts, OURS)
    return {
        slot.name(OURS): _shape(slot, (), sizes, counts, OURS)
        for slot in _expected(layout, counts, OURS)
        if slot not in found
    }


def _look_up(tensors: Tensors, layout: Layout, side: str, errors: list[str]) -> dict[_Slot, str]:
    """Returns the name found for each slot of one side; appends every fault to `errors`."""
    found = _match(tensors, layout, side, errors)
    counts = _counts(found, tensors, side)
    missing = [s.name(side) for s in _expected(layout, counts, side) if s not in found]
    errors.extend(f"missing: {name}" for name in missing)
    _check(found, tensors, counts, side, errors)
    return found


def _raise(errors: list[str], name: str, family: str, source: str) -> None:
    if errors:
        raise UserError(
            f"{source} does not fit the {name} {family} layout in {len(errors)} places; convert an "
            f"unmodified {family} checkpoint:\n  " + "\n  ".join(errors)
        )


def _without_duplicates(tensors: Tensors, layout: Layout, errors: list[str]) -> Tensors:
    result = {n: t for n, t in tensors.items() if n not in layout.duplicates}
    for copy, original in layout.duplicates.items():
        if copy in tensors and not np.array_equal(
            tensors[copy], result.setdefault(original, tensors[copy])
        ):
            errors.append(f"differs from its copy: {original} and {copy}")
    return result


@functools.cache
def _pattern(template: str, stack: tuple[str, ...] | None) -> re.Pattern:
    words = "|".join(map(re.escape, stack)) if stack else _NUMBER
    pattern = re.escape(template)
    pattern = pattern.replace(r"\{i\}", f"(?P<i>{_NUMBER})").replace(r"\{m\}", f"(?P<m>{words})")
    return re.compile(pattern, re.ASCII)


def _match(names: Iterable[str], layout: Layout, side: str, errors: list[str]) -> dict[_Slot, str]:
    """Returns the name found for each slot; appends names that match no row or two."""
    patterns = [(row, _pattern(getattr(row, side), row.stack)) for row in layout.rows]
    found = {}
    for name in names:
        hits = [(row, hit) for row, pattern in patterns if (hit := pattern.fullmatch(name))]
        if len(hits) != 1:
            errors.append(f"{'matched twice' if hits else 'unexpected'}: {name}")
            continue
        row, words = hits[0][0], hits[0][1].groupdict()
        i, m = words.get("i"), words.get("m")
        place = None if m is None else row.stack.index(m) if row.stack else int(m)
        found[_Slot(row, None if i is None else int(i), place)] = name
    return found


def _counts(found: Mapping[_Slot, str], tensors: Tensors, side: str) -> dict[str, int]:
    """Counts blocks, layers and stacked tensors by the part of the name before the number.

    The highest number found decides; on our side, the first axis of most stacks.
    """
    counts: defaultdict[str, int] = defaultdict(lambda: 1)
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for slot, name in found.items():
        for placeholder, number in (("{i}", slot.i), ("{m}", slot.m)):
            if number is not None:
                stem = _stem(slot.row, placeholder)
                counts[stem] = max(counts[stem], number + 1)
        if side == OURS and slot.row.stacked and tensors[name].ndim:
            votes[_stem(slot.row, "{m}")][tensors[name].shape[0]] += 1
    counts.update({stem: sizes.most_common(1)[0][0] for stem, sizes in votes.items()})
    return counts


def _stem(row: Row, placeholder: str) -> str:
    return row.theirs.split(placeholder)[0]


def _stack_size(row: Row, counts: Mapping[str, int]) -> int:
    return len(row.stack) if row.stack else counts[_stem(row, "{m}")]


def _expected(layout: Layout, counts: Mapping[str, int], side: str) -> list[_Slot]:
    """Returns every slot of the table, for the blocks, layers and stacked tensors found."""
    slots = []
    for row in layout.rows:
        blocks = range(counts[_stem(row, "{i}")]) if "{i}" in row.ours else (None,)
        stacked = row.stacked and side == THEIRS
        places = range(_stack_size(row, counts)) if stacked else (None,)
        slots += [_Slot(row, i, m) for i in blocks for m in places]
    return slots


def _check(
    found: Mapping[_Slot, str], tensors: Tensors, counts, side: str, errors: list[str]
) -> None:
    """Appends wrong shapes and types; most tensors decide the size of a letter."""
    sizes = _vote(found, tensors, counts, side)
    for slot, name in found.items():
        expected = _shape(slot, tensors[name].shape, sizes, counts, side)
        if tensors[name].shape != expected:
            errors.append(f"wrong shape: {name} is {tensors[name].shape}, expected {expected}")
        if tensors[name].dtype.kind != "f" and tensors[name].dtype.name != "bfloat16":
            errors.append(f"wrong type: {name} is {tensors[name].dtype}, expected floats")
    _check_tables(found, tensors, sizes, errors)


def _vote(found: Mapping[_Slot, str], tensors: Tensors, counts, side: str) -> dict[str, int]:
    """Returns the size of each letter, by majority."""
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for slot, name in found.items():
        tokens, own = _sizes(slot, tensors[name].shape, counts, side)
        for token, size in zip(tokens, own, strict=False):
            votes[token][size] += 1
    return {token: count.most_common(1)[0][0] for token, count in votes.items()}


def _sizes(slot: _Slot, shape: tuple, counts, side: str) -> tuple[list[str], tuple]:
    """Returns the tokens of our shape and the tensor's sizes there, none if the rank differs."""
    tokens, transform = slot.row.shape.split(), slot.row.transform
    if side == OURS:
        tokens = [str(_stack_size(slot.row, counts))] * slot.row.stacked + tokens
        return tokens, shape if len(shape) == len(tokens) else ()
    rank = transform.inverse(np.empty((1,) * len(tokens))).ndim
    usable = len(shape) == rank and 0 not in shape
    dummy = np.broadcast_to(np.float32(0), shape)  # takes no memory
    return tokens, transform.forward(dummy).shape if usable else ()


def _shape(slot: _Slot, shape: tuple, sizes, counts, side: str) -> tuple[int, ...]:
    """Returns the expected shape on the tensor's side; unknown sizes are its own."""
    tokens, own = _sizes(slot, shape, counts, side)
    own = own or (1,) * len(tokens)
    expected = []
    for token, size in zip(tokens, own, strict=True):
        [(times, letter, divisor)] = re.findall(r"^(\d*)([A-Z]?)/?(\d*)$", token)
        free = letter == "R" or (letter and letter not in sizes)
        value = int(times or 1) * sizes.get(letter, 1) // int(divisor or 1)
        expected.append(size if free else value)
    if side == OURS:
        return tuple(expected)
    dummy = np.broadcast_to(np.float32(0), expected)
    return slot.row.transform.inverse(dummy).shape


def _check_tables(found, tensors: Tensors, sizes: dict[str, int], errors: list[str]) -> None:
    """Checks the rows of relative-position tables: 2G-1, or one other odd number in windows."""
    tables = {name: slot for slot, name in found.items() if slot.row.shape.startswith("R")}
    rows = {name: tensors[name].shape[0] for name in tables if tensors[name].ndim == 2}
    if "G" not in sizes:  # the position embedding is missing or has a wrong rank, as reported
        return
    whole = 2 * sizes["G"] - 1
    windows = Counter(n for n in rows.values() if n != whole and n % 2).most_common(1)
    allowed = sorted({whole, *(n for n, _ in windows)})
    for name, n in rows.items():
        if n not in allowed:
            errors.append(f"wrong shape: {name} has {n} rows, expected one of {allowed}")
        elif name.endswith("rel_pos_h") and rows.get(f"{name[:-1]}w", n) != n:
            errors.append(f"wrong shape: {name} and {name[:-1]}w differ in their rows")
