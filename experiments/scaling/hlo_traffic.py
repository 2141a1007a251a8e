"""HBM traffic of a compiled TPU program, from its HLO text.

The compiler's count, "bytes accessed", includes the fast memory on the chip, several times the
traffic that the bandwidth of the main memory bounds. Here an operation counts its operands and
results in main memory (no `S(n)` in their layout) once; a slice, alone or in a fusion, counts the
part it takes, and an in-place update the part it writes; the body of a loop counts as often as the
loop runs, once if that is unknown.
"""

import math
import re

from experiments.scaling.hlo import Instruction, Program, array_bytes, elements, parse

_ARRAY = re.compile(r"[a-z]+\d*\w*\[[^\]]*\](?:\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATE = "dynamic-update-slice"
_ENTERED = ("while", "call", "conditional")
# Names for existing values, and ends of asynchronous operations.
_NOTHING = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip


def memory_traffic(text: str) -> float:
    """Returns the bytes that a program (`Compiled.as_text()`) reads and writes in main memory."""
    program = parse(text)

    def total(name: str) -> float:
        return math.fsum(map(moved, program.computations.get(name, ())))

    def moved(line: Instruction) -> float:
        if line.opcode in _ENTERED:
            bodies = (call for call in line.calls if call.attribute != "condition")
            return sum((call.trips or 1) * total(call.computation) for call in bodies)
        return 0.0 if line.opcode in _NOTHING or line.ends else _size(line, program)

    return total(program.entry)


def _size(line: Instruction, program: Program) -> float:
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
    if name == "fusion" and line.calls:
        return _fused(line, program.computations.get(line.calls[0].computation, []), types)
    return _here(result) + sum(_here(types.get(one, "")) for one in set(line.operands))


def _fused(line: Instruction, inside: list[Instruction], types: dict[str, str]) -> float:
    """Returns the bytes of a fusion that computes the lines `inside`."""
    parameters: dict[int, str] = {}
    same: dict[str, str] = {}  # bitcast -> its source
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
        elif kinds == {_UPDATE}:  # in place: the rest is not touched
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
    """Returns the bytes of the arrays of a type in main memory."""
    return sum(array_bytes(one) for one in _ARRAY.findall(shapes) if not _ELSEWHERE.search(one))
