"""What the devices of a compiled program exchange, read from its HLO text.

Counted is what is in the program: an asynchronous collective once, at its start, one that the TPU's
compiler has spread over several fusions (all with its channel) once, and what a loop's body holds
as often as the loop runs, where the text tells that. Both branches of a condition count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OTHER_NAMES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_COLLECTIVE = re.compile(rf"({'|'.join((*_OTHER_NAMES, *KINDS))})(-start)?$")


class Collective(NamedTuple):
    """One collective operation.

    size: bytes that one device receives each time, by a ring algorithm: of a result of R bytes in
    a group of n, R (n - 1) / n in an all-gather and an all-to-all, twice that in an all-reduce,
    R (n - 1) in a reduce-scatter (R is its share), R in a permutation.
    group: the first group's devices, by their place in the mesh; a permutation's first pair.
    times: how often it runs; a loop of unknown length counts once, and `bounded` is False.
    """

    kind: str
    size: float
    group: tuple[int, ...]
    times: int
    bounded: bool


def collectives(text: str) -> list[Collective]:
    """Every collective of a program (`Compiled.as_text()`), in no order of time.

    ValueError for text of another form.
    """
    entry, computations, devices = _read(text, loop_lengths(text))
    holding, channels = {}, set()

    def holds(name: str) -> bool:
        """Whether a collective is somewhere inside: most computations have none."""
        if name not in holding:
            found = computations.get(name, ())
            holding[name] = any(line.kind or any(holds(c) for c, _ in line.calls) for line in found)
        return holding[name]

    def walk(name: str, times: int, bounded: bool) -> Iterator[Collective]:
        for line in computations[name]:
            if line.kind and _is_new(line, channels):
                yield _collective(line, devices, times, bounded)
            for called, trips in line.calls:
                if holds(called):
                    yield from walk(called, times * (trips or 1), bounded and trips is not None)

    return list(walk(entry, 1, True))


class _Line(NamedTuple):
    """An instruction that matters: its kind ("" for none), started or whole, type and the rest.

    calls: (computation, times it runs or None where that is unknown).
    """

    kind: str
    started: bool
    type: str
    rest: str
    calls: list


HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
OPCODE = re.compile(r" ?([\w\-]+)\(")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"\s+%?([\w.\-]+) = \w+\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"\s+ROOT .* compare\(\S+, %?([\w.\-]+)\), direction=LT")
_COUNTS = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


def loop_lengths(text: str) -> dict[str, int]:
    """How often a loop with this condition runs: JAX's count from zero by one, below a constant."""
    lengths, name, constants = {}, "", {}
    for line in text.splitlines():
        if line and not line[0].isspace() and (head := HEAD.match(line)):
            name, constants = head[2], {}
        elif constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif (below := _BELOW.match(line)) and below[1] in constants:
            lengths[name] = constants[below[1]]
    return lengths


def trips_of(rest: str, lengths: dict[str, int]) -> int | None:
    """How often the `while` with these attributes runs; None where that is unknown."""
    if told := _TRIPS.search(rest):
        return int(told[1])
    condition = _CONDITION.search(rest)
    return lengths.get(condition[1]) if condition else None


def _read(text: str, lengths: dict[str, int]):
    """(entry, {computation: its lines that matter}, number of devices)."""
    entry, computations, lines, devices = None, {}, None, 1
    for line in text.splitlines():
        if line.startswith("HloModule"):
            devices = math.prod(int(count) for count in _COUNTS.findall(line))
        elif line and not line[0].isspace() and (head := HEAD.match(line)):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None and (start := _INSTRUCTION.match(line)):
            if found := _instruction(line[start.end() :], lengths):
                lines.append(found)
    if entry is None:
        raise ValueError("no HLO program: it has no ENTRY computation")
    return entry, computations, devices


def _instruction(text: str, lengths: dict[str, int]) -> _Line | None:
    """`type opcode(operands), attributes`, or None where nothing can be exchanged."""
    end = closing(text) if text.startswith("(") else text.find(" ")
    opcode = OPCODE.match(text, end)
    if not opcode:
        return None
    name, rest = opcode[1], text[opcode.end() :]
    if match := _COLLECTIVE.match(name):
        kind = _OTHER_NAMES.get(match[1], match[1])
        return _Line(kind, match[2] is not None, text[:end], rest, [])
    if name.endswith(("-done", "-update")):  # of what its start called already
        return None
    loop = trips_of(rest, lengths) if name == "while" else 1
    calls = [
        (called.strip().lstrip("%"), loop)
        for _, several, one in CALLED.findall(rest)
        for called in (one or several).split(",")
    ]
    return _Line("", False, "", "", calls) if calls else None


def closing(text: str) -> int:
    """The place after the bracket that closes the one `text` starts with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"no HLO: a bracket stays open in {text[:80]!r}")


def _is_new(line: _Line, channels: set[str]) -> bool:
    """Whether no line of the same channel was seen before; those without one are all new."""
    channel = re.search(r"channel_id=(\d+)", line.rest)
    if channel is None:
        return True
    new = channel[1] not in channels
    channels.add(channel[1])
    return new


def _collective(line: _Line, devices: int, times: int, bounded: bool) -> Collective:
    result = _result(line)
    if line.kind == "collective-permute":
        pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line.rest)
        group = tuple(map(int, pair.groups())) if pair else (0,)
    else:
        group = _group(line.rest, devices)
    received = _received(line.kind, array_bytes(result), len(group))
    return Collective(line.kind, received, group, times, bounded)


def _result(line: _Line) -> str:
    """The type of what comes out; that of a start holds operands (and contexts) besides."""
    if not (line.started and line.type.startswith("(")):
        return line.type
    parts = elements(line.type)
    if line.kind == "all-reduce" and not parts[0].startswith("("):
        return line.type  # one that joins several arrays has no operands in its type
    return parts[1]


def elements(tuple_type: str) -> list[str]:
    """The types in a tuple's type."""
    text = re.sub(r"/\*.*?\*/", "", tuple_type[1:-1])
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


_ARRAY = re.compile(r"\b([a-z]+)(\d*)(\w*)\[((?:<?=?\d+,?)*)\]")


def array_bytes(shapes: str) -> float:
    """Of all arrays in a type; the padding of their layout is left out."""
    total = 0.0
    for letters, bits, _, sizes in _ARRAY.findall(shapes):
        width = 1 if letters == "pred" else int(bits) / 8 if bits else 0  # a token has none
        total += width * math.prod(int(n.lstrip("<=")) for n in sizes.split(",") if n)
    return total


def _received(kind: str, size: float, members: int) -> float:
    others = members - 1
    if kind == "collective-permute":
        return size * min(others, 1)
    factor = {"all-reduce": 2 / members, "reduce-scatter": 1.0}.get(kind, 1 / members)
    return size * others * factor


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group: listed, a transposed count of all (iota), axes of a mesh."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = tuple(map(int, iota[3].split(",")))
        order = tuple(map(int, iota[4].split(","))) if iota[4] else range(len(shape))
        places = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return tuple(places.ravel()[: int(iota[2])].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if meshed := _MESH.search(text):
        return _along(*meshed.groups())
    if unknown := re.search(r"replica_groups=(?!\{\}).{0,200}", text):
        raise ValueError(f"replica groups in an unknown form: {unknown[0]!r}")
    return tuple(range(devices))


_MESH = re.compile(
    r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^}]*)\}"
)


def _along(mesh: str, counted: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    """The first group of `mesh['a'=2,'b'=8] {'b'}`; a part of an axis is `'b':(outer)part`.

    counted, order: how the mesh's devices are numbered where not in a row, as in `[4,4]T(1,0)`.
    """
    sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    places = np.arange(math.prod(sides.values()))
    if counted:
        places = places.reshape(tuple(map(int, counted.split(","))))
        places = places.transpose(tuple(map(int, order.split(",")))) if order else places
    places = places.reshape(tuple(sides.values()))
    chosen = [0] * len(sides)
    for name, outer, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        step = sides[name] // (int(outer) * int(part)) if part else 1
        chosen[list(sides).index(name)] = slice(0, int(part) * step if part else None, step)
    return tuple(np.atleast_1d(places[tuple(chosen)]).ravel().tolist())
