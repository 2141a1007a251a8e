"""Resolves the file of an experiment grid to one configuration per cell.

A grid file defines `get_grid(variant) -> Plan`; `--grid FILE:VARIANT` names one. The grid folder
keeps the plan as `grid.json`, which tables and reports read (`pgpsam_jax.results.grid`).
"""

import ast
import dataclasses
import functools
import json
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import identity
from pgpsam_jax.checkpointing.provenance import code_version
from pgpsam_jax.config import serialization
from pgpsam_jax.config.overrides import assign, load_file, load_function
from pgpsam_jax.data import dataset
from pgpsam_jax.errors import UserError
from pgpsam_jax.results.grid import DONE, PENDING, PLAN, Cell, Grid, Row, read_grid
from pgpsam_jax.utils.files import read_record, refuse_foreign, write_json


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment grid: rows times seeds.

    Attributes:
      title: of its tables.
      config: config file, with its variant after a colon.
      rows: one line of the table each.
      overrides: {"model.k": 4, ...} for all cells; each row adds its own.
      exceptions: {name of a row: {field: value}}, after the row's own; for rows that are there.
      seeds: of each row.
      seed_fields: the fields that a seed sets.
      reference: the row that others are compared with; empty for the first.
      published: key of the paper's table, only if data, model and protocol are the paper's.
      axis: label of the rows' values, if they form an axis.
      notes: printed below the tables.
    """

    title: str
    config: str
    rows: tuple[Row, ...]
    overrides: dict = dataclasses.field(default_factory=dict)
    exceptions: dict = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_fields: tuple[str, ...] = ("seed",)
    reference: str = ""
    published: str | None = None
    axis: str | None = None
    notes: tuple[str, ...] = ()


def axis_rows(field: str, values) -> tuple[Row, ...]:
    """Returns one row per value of a configuration field: `k4` for `model.k` = 4."""
    name = field.rpartition(".")[2]
    return tuple(
        Row(f"{name}{value}", f"{name.replace('_', ' ')} {value}", {field: value}, value)
        for value in values
    )


def tap_rows(taps) -> tuple[Row, ...]:
    """Returns one row per choice of encoder blocks, one block per refinement stage."""
    return tuple(
        Row(
            "taps" + "_".join(map(str, blocks)),
            f"{len(blocks)} stage(s), blocks {', '.join(map(str, blocks))}",
            {"model.stage_taps": tuple(blocks)},
        )
        for blocks in taps
    )


def method_rows(only: str = "", equal: bool = False) -> tuple[Row, ...]:
    """Returns one row per registered method, or per preset of the method `only`.

    Each has its own recipe; with `equal`, the methods that adapt a SAM by SGD share one.
    """
    from pgpsam_jax.config import method_recipes
    from pgpsam_jax.methods import registry

    keys = [key for key in registry.METHODS if not only or key[0] == only]
    if equal:
        methods = {key: registry.METHODS[key] for key in keys}
        sgd = registry.Training.SGD
        keys = [key for key, m in methods.items() if m.training is sgd and m.base_tensors]
    recipe = method_recipes.intrinsic_settings if equal else method_recipes.recipe_of
    return tuple(
        Row(
            "_".join(filter(None, key)),
            registry.METHODS[key].label,
            {"model.name": key[0], "model.preset": key[1] or "paper"} | recipe(*key),
        )
        for key in keys
    )


def load_plan(spec: str) -> tuple[str, str, Plan]:
    """Returns (name, variant, plan) of `FILE` or `FILE:VARIANT`."""
    path, get_grid, variant = load_function(spec, "get_grid", "grid")
    try:
        plan = get_grid(variant) if variant else get_grid()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Path(path).stem, variant, plan


def resolve(plan: Plan, row: Row, seed: int, settings: dict) -> ConfigDict:
    """Returns the configuration of a cell: file, plan, row, seed, then the user's settings."""
    config = load_file(plan.config)
    assign(config, plan.overrides, "the grid")
    assign(config, row.overrides | plan.exceptions.get(row.name, {}), f"row {row.name}")
    assign(config, {field: seed for field in plan.seed_fields}, "the seeds")
    assign(config, settings, "--set")
    serialization.validate(config)
    config.name = f"{row.name}-seed{seed}"
    return config


def parse_settings(pairs) -> dict:
    """Parses `--set FIELD=VALUE`; a value that is not a Python literal is a string."""
    settings = {}
    for pair in pairs:
        field, equals, text = pair.partition("=")
        if not (field and equals):
            raise UserError(f"--set {pair!r} is not FIELD=VALUE, such as data.root=datasets/btcv")
        try:
            settings[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[field] = text
    return settings


def make_grid(spec: str, folder, settings: dict) -> Grid:
    """Plans a grid; writes nothing."""
    name, variant, plan = load_plan(spec)
    names = [row.name for row in plan.rows]
    if len(set(names)) < len(names) or not names or not plan.seeds:
        raise UserError(f"{spec} needs seeds, and rows with unique names")
    reference = plan.reference or names[0]
    if reference not in names:
        raise UserError(
            f"{spec}: reference {reference!r} is no row; choose from {', '.join(names)}"
        )
    cells = []
    # Seeds outside: an unfinished grid has all rows, and neighbors compile different steps.
    for seed in plan.seeds:
        for row in plan.rows:
            config = resolve(plan, row, seed, settings)
            key = identity.fingerprint(config)[:8]
            cells.append(
                {
                    "name": config.name,
                    "row": row.name,
                    "seed": seed,
                    "folder": f"{config.name}-{key}",
                    "config": serialization.to_json(config),
                    "contents": identity.content_digests(config.to_dict()),
                }
            )
    rows = [dataclasses.asdict(row) for row in plan.rows]
    fields = {f: getattr(plan, f) for f in ("title", "published", "axis")}
    content = fields | {
        "name": name,
        "variant": variant,
        "reference": reference,
        "notes": list(plan.notes),
        "code": code_version(),
        "rows": rows,
        "cells": cells,
    }
    return Grid.from_json(content, Path(folder))


def write_plan(grid: Grid, mix: bool) -> Grid:
    """Writes the plan to its folder and returns it; unchanged cells keep their folders.

    With `mix`, a different plan replaces the old one: changed cells run in new folders, finished
    ones stay, and tables report that code versions differ.

    Raises:
      UserError: the folder has results of other settings or code, and `mix` is not set.
    """
    refuse_foreign(grid.path, (PLAN,), "grid")
    if (grid.path / PLAN).is_file():
        before = read_grid(grid.path)
        planned = {cell.name: cell for cell in grid.cells}
        olds = [old for old in before.cells if old.name in planned]
        differ = {old.name: _differ(old, planned[old.name]) for old in olds}
        folders = {old.name: _folder(old, planned[old.name], differ[old.name]) for old in olds}
        cells = (dataclasses.replace(c, folder=folders.get(c.name, c.folder)) for c in grid.cells)
        grid = dataclasses.replace(grid, cells=tuple(cells))
        found = _changes(before, grid, differ)
        if found and not mix:
            raise UserError(
                f"{grid.path} has another plan: {'; '.join(found)}; choose another --workdir, or "
                "add --mix to continue with the new plan and keep finished cells"
            )
    write_json(grid.path / PLAN, grid.to_json())
    return grid


def _folder(old: Cell, new: Cell, different: list[str]) -> Path:
    """Returns the folder of a cell planned before: the same one, unless the cell differs."""
    if not different:
        return old.folder
    # Other images do not change the name.
    return new.folder if new.folder != old.folder else Path(f"{old.folder}-other")


def _changes(before: Grid, now: Grid, differ: dict[str, list[str]]) -> list[str]:
    """Describes changes that would mix results of different plans or code; new cells may join.

    differ: differences of the cells in both plans, by name.
    """
    found = []
    for old in before.cells:
        if old.name not in differ:
            found.append(f"{old.name} is no longer planned")
        elif different := differ[old.name]:
            found.append(f"{old.name} has other settings ({', '.join(different)})")
    started = any(cell.state["state"] != PENDING for cell in before.cells)
    if started and before.code["code"] != now.code["code"]:
        revisions = [(code["git"] or "no git")[:12] for code in (before.code, now.code)]
        found.append("the code of pgpsam_jax changed ({} there, {} now)".format(*revisions))
    return found[:5] + ([f"and {len(found) - 5} more"] if len(found) > 5 else [])


def _differ(old: Cell, new: Cell) -> list[str]:
    """Describes the differences of two cells that change results; files differ by content."""
    found = identity.differences(old.config, new.config, identity.NO_IDENTITY)
    for field in sorted(identity.given_files(old.config) ^ identity.given_files(new.config)):
        found.append(f"{field}: set in one of them only")
    held = old.contents, new.contents
    for field in sorted(held[0].keys() & held[1].keys()):
        then, now = (contents[field] for contents in held)
        if then and now and then != now:  # None: it could not be read
            found.append(f"{field}: the content of its file changed")
    return found + _other_images(old, new)


@functools.cache
def _images(data: str) -> str:
    """Returns the digest of the test images of `config.data`, given as JSON."""
    config = serialization.from_json({"data": json.loads(data)})
    return dataset.images_digest(dataset.find_split(config.data).test)


def _other_images(old: Cell, new: Cell) -> list[str]:
    """Describes whether a finished cell was scored on other images than those of `data.root`."""
    then, now = (
        {field: serialization.flatten(cell.config).get(field) for field in identity.DATA}
        for cell in (old, new)
    )
    if then == now or old.state["state"] != DONE or not Path(new.config["data"]["root"]).is_dir():
        return []
    wanted = read_record(old.folder / "provenance.json", missing={}).get("test")
    if wanted in (None, _images(json.dumps(new.config["data"]))):
        return []
    return [f"data.root: {now['data.root']!r} holds other test images than {then['data.root']!r}"]
