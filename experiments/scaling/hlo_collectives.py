"""Collectives of a compiled program, from its HLO text.

An asynchronous collective counts once, at its start; one that the TPU compiler has spread over
several fusions (with the same channel) counts once; the body of a loop counts as often as the loop
runs, if the text says so. Both branches of a condition count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.scaling.hlo import Instruction, array_bytes, elements, parse

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
    """Returns every collective of a program (`Compiled.as_text()`), in no order of time.

    Raises:
      ValueError: the text is no HLO program, or names groups in an unknown form.
    """
    program = parse(text)
    holding: dict[str, bool] = {}
    channels: set[str] = set()

    def holds(name: str) -> bool:
        """Whether a collective is somewhere inside: most computations have none."""
        if name not in holding:
            holding[name] = any(
                _COLLECTIVE.match(line.opcode) or any(holds(c.computation) for c in line.calls)
                for line in program.computations.get(name, ())
                if not line.ends
            )
        return holding[name]

    def walk(name: str, times: int, bounded: bool) -> Iterator[Collective]:
        for line in program.computations[name]:
            if line.ends:  # its start counts
                continue
            if match := _COLLECTIVE.match(line.opcode):
                if _is_new(line, channels):
                    yield _collective(line, match, program.devices, times, bounded)
                continue
            for call in line.calls:
                if holds(call.computation):
                    known = bounded and call.trips is not None
                    yield from walk(call.computation, times * (call.trips or 1), known)

    return list(walk(program.entry, 1, True))


def _is_new(line: Instruction, channels: set[str]) -> bool:
    """Whether no line of the same channel was seen before; those without one are all new."""
    channel = re.search(r"channel_id=(\d+)", line.rest)
    if channel is None:
        return True
    new = channel[1] not in channels
    channels.add(channel[1])
    return new


def _collective(line, match, devices: int, times: int, bounded: bool) -> Collective:
    kind = _OTHER_NAMES.get(match[1], match[1])
    result = _result(line, kind, started=match[2] is not None)
    if kind == "collective-permute":
        pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line.rest)
        group = tuple(map(int, pair.groups())) if pair else (0,)
    else:
        group = _group(line.rest, devices)
    received = _received(kind, array_bytes(result), len(group))
    return Collective(kind, received, group, times, bounded)


def _result(line: Instruction, kind: str, started: bool) -> str:
    """The type of the result; that of a start also holds operands and contexts."""
    if not (started and line.type.startswith("(")):
        return line.type
    parts = elements(line.type)
    if kind == "all-reduce" and not parts[0].startswith("("):
        return line.type  # one that joins several arrays has no operands in its type
    return parts[1]


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
    chosen: list[int | slice] = [0] * len(sides)
    for name, outer, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        step = sides[name] // (int(outer) * int(part)) if part else 1
        chosen[list(sides).index(name)] = slice(0, int(part) * step if part else None, step)
    return tuple(np.atleast_1d(places[tuple(chosen)]).ravel().tolist())
