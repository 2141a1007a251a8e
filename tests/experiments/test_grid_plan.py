"""Grids: the plans that are shipped, their folders, and what is not mixed in one."""

import functools
import itertools
import json
import shutil

import pytest

from experiments.grid.plan import _images, load_plan, make_grid, parse_settings, write_plan
from experiments.run_cell import write_state
from pgpsam_jax.checkpointing import identity
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.errors import UserError
from pgpsam_jax.results.grid import DONE, PENDING, read_grid
from pgpsam_jax.utils.files import write_json
from tests.support import tiny_method, two_rows
from tests.support.places import REPOSITORY
from tests.support.small_run import write_data

GRIDS = sorted(
    path.stem
    for path in (REPOSITORY / "experiments" / "grids").glob("*.py")
    if not path.stem.startswith("_") and path.stem != "one_field"
)
GRIDS += [f"one_field:{field}" for field in ("alpha", "image_size", "k", "lora_rank")]
METHODS = (
    "class_tokens",
    "table1",
    "table3",
    "taps",
    "stages",
)  # of those that have also these settings:
REAL = ("hippocampus", "phantom_lite_medsam")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Known here, and by `launcher.KNOWING` to drivers and their cells."""
    with tiny_method.known():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def grid_file(data, tmp_path):
    """Writer of a grid file with two rows."""
    return functools.partial(two_rows.write, tmp_path, data)


@pytest.mark.parametrize(
    ("name", "variant"),
    [*itertools.product(GRIDS, ("", "phantom")), *itertools.product(METHODS, REAL)],
)
def test_shipped_grids_resolve(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    stem, *chosen = name.split(":")
    spec = ":".join([f"experiments/grids/{stem}.py", *chosen, *filter(None, [variant])])
    grid = make_grid(spec, tmp_path, {})
    seeds = {cell.seed for cell in grid.cells}
    assert len(grid.cells) == len(seeds) * len(grid.rows) and len(seeds) >= 3
    prints = {identity.fingerprint(serialization.from_json(c.config)) for c in grid.cells}
    assert len(prints) == len(grid.cells)  # no two cells compute the same
    assert (grid.published is not None) == (name.startswith("table") and not variant)
    assert grid.reference in [row.name for row in grid.rows]
    for cell in grid.cells:
        assert cell.config["seed"] == cell.config["fewshot"]["seed"] == cell.seed
        assert (cell.config["data"]["layout"] == "phantom") == variant.startswith("phantom")
    assert grid.title.splitlines() == [grid.title]


def test_table3_is_the_papers_four_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    grid = make_grid("experiments/grids/table3.py", tmp_path, {})
    switches = [tuple(c.config["model"][m] for m in ("cfm", "ppg", "ppr")) for c in grid.cells[:4]]
    assert switches == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


def test_identity_is_what_decides_a_result(data, grid_file, tmp_path):
    plain = make_grid(grid_file(), tmp_path / "g", {})
    moved = make_grid(grid_file(), tmp_path / "g", {"data.cache_dir": "x", "log.every_steps": 7})
    other = make_grid(grid_file(), tmp_path / "g", {"optim.learning_rate": 1e-4})
    folders = [[cell.folder.name for cell in grid.cells] for grid in (plain, moved, other)]
    assert folders[0] == folders[1]
    assert not set(folders[0]) & set(folders[2])
    assert all(name.startswith(("whole-seed0-", "odd-seed0-")) for name in folders[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.speed=3"], "no such configuration field: optim.speed"),
        (["nowhere.at.all=3"], "no such configuration field"),
        (["train.steps=fast"], "train.steps cannot be 'fast'"),
        (["steps"], "is not FIELD=VALUE"),
    ],
)
def test_wrong_settings(settings, message, grid_file, tmp_path):
    with pytest.raises(UserError, match=message):
        make_grid(grid_file(), tmp_path, parse_settings(settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found"),
        ("def get_plan(): pass", "defines no get_grid"),
        ("import nothing_of_this_name", "cannot be run"),
        ("def get_grid(): (", "cannot be run"),
        ("def get_grid(v=''):\n    raise ValueError('unknown variant')", "unknown variant"),
    ],
)
def test_wrong_grid_files(text, message, tmp_path):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plan(str(path))


def test_a_changed_plan_is_not_mixed_in(grid_file, tmp_path):
    folder = tmp_path / "g"
    first = make_grid(grid_file(), folder, {})
    write_plan(first, mix=False)
    write_state(first.cells[0].folder, DONE, seconds=1.0)
    write_plan(make_grid(grid_file(seeds=(0, 1)), folder, {}), mix=False)  # more cells may join
    assert len(read_grid(folder).cells) == 4
    with pytest.raises(UserError, match="whole-seed1 is no longer planned"):
        write_plan(first, mix=False)
    changed = make_grid(grid_file(steps=5, seeds=(0, 1)), folder, {})
    with pytest.raises(UserError, match=r"other settings \(train.steps: 4 there, 5 now\)"):
        write_plan(changed, mix=False)
    assert read_grid(folder).cells[0].state["state"] == DONE
    write_plan(changed, mix=True)
    assert read_grid(folder).cells[0].state["state"] == PENDING  # in a folder of its own


def test_a_file_of_the_same_content_is_the_same_plan(data, grid_file, tmp_path):
    folder, copy = tmp_path / "g", tmp_path / "copy"
    shutil.copytree(data, copy)
    table = copy / "table.json"

    def plan():
        places = {"data.root": str(copy), "data.label_table": str(table)}
        return make_grid(grid_file(), folder, places)

    first = write_plan(make_grid(grid_file(), folder, {}), mix=False)
    assert write_plan(plan(), mix=False).cells[0].folder == first.cells[0].folder
    text = table.read_text()
    table.unlink()  # what cannot be read is no other content
    assert write_plan(plan(), mix=False).cells[0].folder == first.cells[0].folder
    table.write_text(text)
    write_plan(plan(), mix=False)
    table.write_text(text.replace("liver", "lever"))
    with pytest.raises(UserError, match=r"data.label_table: the content of its file changed"):
        write_plan(plan(), mix=False)
    assert write_plan(plan(), mix=True).cells[0].folder != first.cells[0].folder


def test_a_done_cell_is_held_to_its_data(data, grid_file, tmp_path):
    folder, copy = tmp_path / "g", tmp_path / "copy"
    shutil.copytree(data, copy)
    first = write_plan(make_grid(grid_file(), folder, {}), mix=False)
    done = first.cells[0]
    write_state(done.folder, DONE, seconds=1.0)
    test = dataset.find_split(serialization.from_json(done.config).data).test
    write_json(done.folder / "provenance.json", {"test": dataset.images_digest(test)})
    elsewhere = make_grid(grid_file(), folder, {"data.root": str(copy)})
    assert write_plan(elsewhere, mix=False).cells[0].folder == done.folder
    write_plan(first, mix=False)
    name = test[0].image.name
    (copy / "images" / name).write_bytes((copy / "images" / name).read_bytes() + b"x")
    _images.cache_clear()
    with pytest.raises(UserError, match=r"copy' holds other test images than"):
        write_plan(elsewhere, mix=False)
    assert write_plan(elsewhere, mix=True).cells[0].state["state"] == PENDING


def test_changed_code_is_not_mixed_in(grid_file, tmp_path):
    grid = make_grid(grid_file(), tmp_path / "g", {})
    write_plan(grid, mix=False)
    plan = grid.path / "grid.json"
    content = json.loads(plan.read_text())
    content["code"] = {"git": "0123456789abcdef", "code": "another"}
    plan.write_text(json.dumps(content))
    write_plan(grid, mix=False)  # nothing was run yet
    plan.write_text(json.dumps(content))
    write_state(grid.cells[0].folder, DONE, seconds=1.0)
    with pytest.raises(UserError, match="code of pgpsam_jax changed \\(0123456789ab there"):
        write_plan(grid, mix=False)
    write_plan(grid, mix=True)
