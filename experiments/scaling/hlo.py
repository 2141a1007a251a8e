"""Parses the HLO text of a compiled program: its computations, instructions and loop lengths."""

import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"\s+%?([\w.\-]+) = \w+\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"\s+ROOT .* compare\(\S+, %?([\w.\-]+)\), direction=LT")
_COUNTS = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(\w*)\[((?:<?=?\d+,?)*)\]")


class Call(NamedTuple):
    """A computation that an instruction runs, the attribute that names it, and how often.

    trips: None for a loop of unknown length.
    """

    attribute: str
    computation: str
    trips: int | None


class Instruction(NamedTuple):
    """One instruction, `name = type opcode(rest`; the type is that of its result."""

    name: str
    opcode: str
    type: str
    rest: str
    calls: tuple[Call, ...]

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _OPERAND.findall(self.rest[: _closing("(" + self.rest) - 1])

    @property
    def ends(self) -> bool:
        """Whether it only completes an asynchronous operation that another one started."""
        return self.opcode.endswith(("-done", "-update"))


class Program(NamedTuple):
    """A compiled program: instructions by computation, and the type of every instruction."""

    entry: str
    computations: dict[str, list[Instruction]]
    types: dict[str, str]
    devices: int


def parse(text: str) -> Program:
    """Parses `Compiled.as_text()`; raises ValueError for any other text."""
    entry, lines, devices = None, [], 1
    computations: dict[str, list[Instruction]] = {}
    types: dict[str, str] = {}
    lengths = _loop_lengths(text)
    for line in text.splitlines():
        if line.startswith("HloModule"):
            devices = math.prod(int(count) for count in _COUNTS.findall(line))
        elif line and not line[0].isspace() and (head := _HEAD.match(line)):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif start := _INSTRUCTION.match(line):
            body = line[start.end() :]
            end = _closing(body) if body.startswith("(") else body.find(" ")
            types[start[1]] = body[:end]
            if opcode := _OPCODE.match(body, end):
                rest = body[opcode.end() :]
                calls = _calls(opcode[1], rest, lengths)
                lines.append(Instruction(start[1], opcode[1], body[:end], rest, calls))
    if entry is None:
        raise ValueError("no HLO program: it has no ENTRY computation")
    return Program(entry, computations, types, devices)


def _loop_lengths(text: str) -> dict[str, int]:
    """Trips by condition of loops that count as JAX does: from zero by one, below a constant."""
    lengths: dict[str, int] = {}
    constants: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and (head := _HEAD.match(line)):
            name, constants = head[2], {}
        elif constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif (below := _BELOW.match(line)) and below[1] in constants:
            lengths[name] = constants[below[1]]
    return lengths


def _calls(opcode: str, rest: str, lengths: dict[str, int]) -> tuple[Call, ...]:
    called = [
        (attribute, one.strip().lstrip("%"))
        for attribute, several, single in _CALLED.findall(rest)
        for one in (several or single).split(",")
    ]
    trips: int | None = 1
    if opcode == "while":
        known = _TRIPS.search(rest)
        trips = int(known[1]) if known else lengths.get(dict(called).get("condition", ""))
    return tuple(Call(attribute, name, trips) for attribute, name in called)


def _closing(text: str) -> int:
    """The index after the bracket that closes the one `text` starts with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"no HLO: a bracket stays open in {text[:80]!r}")


def elements(tuple_type: str) -> list[str]:
    """Returns the types in a tuple's type."""
    text = re.sub(r"/\*.*?\*/", "", tuple_type[1:-1])
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def array_bytes(shapes: str) -> float:
    """Returns the bytes of all arrays in a type, without the padding of their layout."""
    total = 0.0
    for letters, bits, _, sizes in _ARRAY.findall(shapes):
        width = 1 if letters == "pred" else int(bits) / 8 if bits else 0  # a token has none
        total += width * math.prod(int(n.lstrip("<=")) for n in sizes.split(",") if n)
    return total
