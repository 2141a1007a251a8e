"""The floors of the house: imports lead from a higher floor to a lower one, and never up."""

import ast
import itertools

from tests.support.places import REPOSITORY

# Rooms by floor, from the ground up. Rooms of one floor do not know each other.
FLOORS = """
errors version
utils
runtime sharding
config distributed
models
methods data
metrics checkpointing
results visualization
inference
evaluation report weights_conversion
training predict verify
profiling
main __init__
cli
experiments
""".strip().splitlines()
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
LOOSE = 8  # files outside of rooms, at most
FILES = sorted(
    path
    for folder in ("pgpsam_jax", "experiments", "weights_conversion")
    for path in (REPOSITORY / folder).rglob("*.py")
)


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None outside of the project."""
    top, *parts = module.split(".")
    if top in ("experiments", "weights_conversion"):
        return top
    if top != "pgpsam_jax" or not parts:  # the package itself, which every import runs
        return None
    return parts[0] if parts[0] in FLOOR else "__init__"


def imports(tree: ast.AST):
    """(line, dotted name) of everything that is imported, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_imports_lead_down():
    wrong = []
    for path in FILES:
        name = path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        room = room_of(name) or "__init__"
        for line, module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            other = room_of(module)
            if other not in (None, room) and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_on_a_floor():
    package = REPOSITORY / "pgpsam_jax"
    parts = {path.relative_to(package).parts[0] for path in package.rglob("*.py")}
    rooms = {part.removesuffix(".py") for part in parts}
    assert rooms | {"experiments", "weights_conversion"} == FLOOR.keys()
    assert len(list(package.glob("*.py"))) <= LOOSE


def test_no_circle_within_a_room():
    """Modules of a room that import each other would have to be read together."""
    graph = {}
    for path in FILES:
        name = path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {
            part
            for _, module in imports(tree)
            for part in itertools.accumulate(module.split("."), "{}.{}".format)
        }
    graph = {name: names & graph.keys() - {name} for name, names in graph.items()}
    while leaves := [name for name, names in graph.items() if not names]:
        for name in leaves:
            del graph[name]
        graph = {name: names - set(leaves) for name, names in graph.items()}
    assert not graph, sorted(graph)


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {path.relative_to(REPOSITORY).as_posix(): n for path, n in lines.items() if n > 300}
    assert not long, long


def test_jax_internals_are_used_in_one_file():
    """It is what a new version of JAX may break, so that one place is to be looked at."""
    users = [path.name for path in FILES if "jax._src" in path.read_text(encoding="utf-8")]
    assert users == ["jax_internals.py"]
