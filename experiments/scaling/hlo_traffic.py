"""Bytes that a compiled TPU program moves to and from the chip's memory, read from its HLO text.

The compiler's own count, "bytes accessed", has what operations read and write in the fast memory
on the chip too, several times the traffic that the memory's bandwidth bounds. Here an operation
counts its operands and results that lie in main memory (no `S(n)` in their layout), whole, once; a
slice, by itself or within a fusion, counts what it takes, an update in place what it writes; a
loop's body counts as often as the loop runs, once where that is unknown.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.scaling.hlo_collectives import (
    CALLED,
    HEAD,
    OPCODE,
    array_bytes,
    closing,
    elements,
    loop_lengths,
    trips_of,
)

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"[a-z]+\d*\w*\[[^\]]*\](?:\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATE = "dynamic-update-slice"
_ENTERED = ("while", "call", "conditional")
# Names of what is there already, and ends of what began elsewhere.
_NOTHING = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip


class _Line(NamedTuple):
    """One instruction, `name = type opcode(rest`; types are those of results."""

    name: str
    opcode: str
    type: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names, in order."""
        return _OPERAND.findall(self.rest[: closing("(" + self.rest) - 1])


class _Program(NamedTuple):
    """Computations by name, the type of every instruction, lengths of loops by condition."""

    computations: dict[str, list[_Line]]
    types: dict[str, str]
    lengths: dict[str, int]


class _Operation(NamedTuple):
    """Its own bytes, and (computation, times it runs) for those it enters."""

    size: float
    entered: tuple[tuple[str, int], ...]


def memory_traffic(text: str) -> float:
    """Bytes read and written in main memory by a program (`Compiled.as_text()`)."""
    entry, program = None, _Program({}, {}, loop_lengths(text))
    for line in text.splitlines():
        if line.startswith("HloModule"):
            continue
        if line and not line[0].isspace() and (head := HEAD.match(line)):
            found = program.computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif start := _INSTRUCTION.match(line):
            body = line[start.end() :]
            end = closing(body) if body.startswith("(") else body.find(" ")
            program.types[start[1]] = body[:end]
            if opcode := OPCODE.match(body, end):
                found.append(_Line(start[1], opcode[1], body[:end], body[opcode.end() :]))

    def total(name: str) -> float:
        return math.fsum(
            one.size + sum(times * total(called) for called, times in one.entered)
            for one in _operations(program, name)
        )

    return total(entry)


def _operations(program: _Program, computation: str) -> Iterator[_Operation]:
    for line in program.computations.get(computation, ()):
        if line.opcode in _ENTERED:
            trips = trips_of(line.rest, program.lengths) if line.opcode == "while" else None
            called = [
                (one.strip().lstrip("%"), trips or 1)
                for word, several, single in CALLED.findall(line.rest)
                for one in (several or single).split(",")
                if word != "condition"
            ]
            yield _Operation(0.0, tuple(called))
        elif line.opcode not in _NOTHING and not line.opcode.endswith(("-done", "-update")):
            yield _Operation(_size(line, program), ())


def _size(line: _Line, program: _Program) -> float:
    result, types, name = line.type, program.types, line.opcode
    given = [types.get(operand, "") for operand in line.operands]
    if name == "copy-start":  # (where to, where from, context)
        return sum(_here(part) for part in elements(result)[:2])
    if name.endswith("-start") and result.startswith("("):  # (operands, result, context)
        parts = elements(result)
        result = parts[1] if len(parts) > 1 else result
    if name.removesuffix("-start") in _SLICES:
        taken = array_bytes(result)
        return taken * (not _ELSEWHERE.search(given[0] if given else "")) + _here(result)
    if name == _UPDATE:
        return _here(given[1]) + array_bytes(given[1]) * bool(_here(result))
    if name == "fusion" and (called := re.search(r"\bcalls=%?([\w.\-]+)", line.rest)):
        return _fused(line, program.computations.get(called[1], []), types)
    return _here(result) + sum(_here(types.get(one, "")) for one in set(line.operands))


def _fused(line: _Line, inside: list[_Line], types: dict[str, str]) -> float:
    """Bytes of a fusion that computes the lines `inside`."""
    parameters, same = {}, {}  # number -> name; what a bitcast is another name of
    for one in inside:
        if one.opcode == "parameter":
            parameters[int(one.rest[: one.rest.index(")")])] = one.name
        elif one.opcode == "bitcast" and one.operands:
            same[one.name] = same.get(one.operands[0], one.operands[0])
    used = [(one, [same.get(o, o) for o in one.operands]) for one in inside if one.name not in same]

    total, whole, updated = 0.0, set(), []
    for number, operand in enumerate(line.operands):
        outer, name = types.get(operand, ""), parameters.get(number)
        uses = [(one, of) for one, of in used if name in of]
        kinds = {one.opcode if of[0] == name not in of[1:] else "" for one, of in uses}
        if kinds and kinds <= {*_SLICES}:
            total += sum(array_bytes(one.type) for one, _ in uses) * bool(_here(outer))
        elif kinds == {_UPDATE}:  # in place: what it holds besides is not touched
            updated.append((outer, sum(array_bytes(types.get(of[1], "")) for _, of in uses)))
        else:
            whole.add(operand)
    total += sum(_here(types.get(operand, "")) for operand in whole)
    for part in elements(line.type) if line.type.startswith("(") else [line.type]:
        written = next((size for outer, size in updated if _alike(outer, part)), array_bytes(part))
        total += written * bool(_here(part))
    return total


def _alike(a: str, b: str) -> bool:
    return a.split("{")[0] == b.split("{")[0]


def _here(shapes: str) -> float:
    """Bytes of the arrays of a type that lie in main memory."""
    return sum(array_bytes(one) for one in _ARRAY.findall(shapes) if not _ELSEWHERE.search(one))
