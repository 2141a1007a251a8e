"""Bytes that a compiled TPU program moves to and from the chip's memory, read from its HLO text.

The compiler's own count, "bytes accessed", has what operations read and write in the fast memory
on the chip too, several times the traffic that the memory's bandwidth bounds. Here an operation
counts its operands and results that lie in main memory (no `S(n)` in their layout), whole, once; a
slice counts what it takes, a loop's body as often as the loop runs, once where that is unknown.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from pgpsam_jax.hlo import CALLED, HEAD, OPCODE, TRIPS, array_bytes, closing, elements

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"[a-z]+\d*\w*\[[^\]]*\](?:\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_SLICES = ("slice", "dynamic-slice", "gather")
_ENTERED = ("while", "call", "conditional")
# Names of what is there already, and ends of what began elsewhere.
_NOTHING = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip


class _Operation(NamedTuple):
    """Its own bytes, and (computation, times it runs) for those it enters."""

    size: float
    entered: tuple[tuple[str, int], ...]


def memory_traffic(text: str) -> float:
    """Bytes read and written in main memory by a program (`Compiled.as_text()`)."""
    entry, computations = None, {}
    types: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("HloModule"):
            continue
        if line and not line[0].isspace() and (head := HEAD.match(line)):
            found = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif start := _INSTRUCTION.match(line):
            body = line[start.end() :]
            end = closing(body) if body.startswith("(") else body.find(" ")
            types[start[1]] = body[:end]
            if opcode := OPCODE.match(body, end):
                found.append((opcode[1], body[:end], body[opcode.end() :]))

    def total(name: str) -> float:
        return math.fsum(
            one.size + sum(times * total(called) for called, times in one.entered)
            for one in _operations(computations.get(name, ()), types)
        )

    return total(entry)


def _operations(lines, types) -> Iterator[_Operation]:
    for name, result, rest in lines:
        if name in _ENTERED:
            trips = TRIPS.search(rest) if name == "while" else None
            times = int(trips[1]) if trips else 1
            called = [
                (one.strip().lstrip("%"), times)
                for word, several, single in CALLED.findall(rest)
                for one in (several or single).split(",")
                if word != "condition"
            ]
            yield _Operation(0.0, tuple(called))
        elif name not in _NOTHING and not name.endswith(("-done", "-update")):
            yield _Operation(_size(name, result, rest, types), ())


def _size(name: str, result: str, rest: str, types: dict[str, str]) -> float:
    operands = dict.fromkeys(_OPERAND.findall(rest[: closing("(" + rest) - 1]))
    given = [types.get(operand, "") for operand in operands]
    if name == "copy-start":  # (where to, where from, context)
        return sum(_here(part) for part in elements(result)[:2])
    if name.endswith("-start") and result.startswith("("):  # (operands, result, context)
        parts = elements(result)
        result = parts[1] if len(parts) > 1 else result
    if name.removesuffix("-start") in _SLICES:
        taken = array_bytes(result)
        return taken * (not _ELSEWHERE.search(given[0] if given else "")) + _here(result)
    return _here(result) + sum(map(_here, given))


def _here(shapes: str) -> float:
    """Bytes of the arrays of a type that lie in main memory."""
    return sum(array_bytes(one) for one in _ARRAY.findall(shapes) if not _ELSEWHERE.search(one))
