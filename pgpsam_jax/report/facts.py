"""Settings, provenance, cell states and files of a run or an experiment grid, as HTML."""

from pathlib import Path

from pgpsam_jax.config import defaults
from pgpsam_jax.config.serialization import flatten, to_json
from pgpsam_jax.report.html.markup import escape, link, paragraph, text_table
from pgpsam_jax.results.grid import DONE, FAILED, PENDING, RUNNING, Grid
from pgpsam_jax.results.runs import Run
from pgpsam_jax.utils.files import read_record

_SIGNS = {DONE: "✓ done", FAILED: "✗ failed", RUNNING: "… running", PENDING: "pending"}


def merge_values(dictionaries) -> dict:
    """Merges dictionaries; a key whose values differ gets a text that lists them all."""
    found: dict[str, list] = {}
    for dictionary in dictionaries:
        for key, value in dictionary.items():
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    return {
        key: values[0] if len(values) == 1 else "differs: " + "; ".join(map(format_value, values))
        for key, values in found.items()
    }


def format_value(value) -> str:
    """Formats a JSON value for readers: no quotes, no brackets around a list."""
    if value is None or value == "" or value == [] or value == {}:
        return "(none)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return str(value)


def configuration_tables(configs: list[dict]) -> str:
    """Tables of all fields by group; fields that differ from `default_config()` are highlighted.

    configs: stored configurations; for an experiment grid those of all cells.
    """
    ours = merge_values(flatten(config) for config in configs)
    default = flatten(to_json(defaults.default_config()))
    groups: dict[str, list[str]] = {}
    for key in ours:
        groups.setdefault(key.rpartition(".")[0], []).append(key)
    count = sum(ours[key] != default.get(key) for key in ours)
    parts = [
        f"<p>{count} of {len(ours)} fields differ from the defaults (the paper's Synapse run); "
        "they are highlighted.</p>"
    ]
    for group, keys in sorted(groups.items()):
        marked = [place for place, key in enumerate(keys) if ours[key] != default.get(key)]
        rows = [[key.rpartition(".")[2], format_value(ours[key]), ""] for key in keys]
        for place in marked:
            rows[place][2] = format_value(default.get(keys[place]))
        title = group or "run"
        table = text_table(["field", "value", "default"], rows, title, marked)
        name = f"{escape(title)} ({len(marked)} of {len(keys)} changed)"
        parts.append(f"<details{' open' if marked else ''}><summary>{name}</summary>{table}")
        parts.append("</details>")
    return "\n".join([parts[0], '<div class="groups">', *parts[1:], "</div>"])


def provenance_table(runs: list[Run], extra: dict) -> str:
    """Table of versions, git revision, devices and hashes; values that differ are all listed."""
    records = []
    for run in runs:
        base = read_record(run.workdir / "base.json", missing={}, damaged={})
        record = flatten(run.provenance) | {f"base weights: {key}": base[key] for key in base}
        records.append(record | {"few-shot list hash": run.list_hash})
    rows = [(key, format_value(value)) for key, value in (extra | merge_values(records)).items()]
    if not rows:
        return paragraph("Nothing has run yet.", "missing")
    return text_table(["", "value"], rows, "provenance")


def cell_tables(grid: Grid) -> str:
    """Table of cell states by row and seed, and the reasons of failures."""
    found = {(cell.row, cell.seed): cell for cell in grid.cells}
    seeds = sorted({cell.seed for cell in grid.cells})
    rows = []
    for row in grid.rows:
        cells = (found.get((row.name, seed)) for seed in seeds)
        states = ["" if cell is None else cell.state["state"] for cell in cells]
        rows.append([row.label, *(_SIGNS.get(state, state) for state in states)])
    parts = [text_table(["row", *(f"seed {seed}" for seed in seeds)], rows, "cells")]
    failed = [cell for cell in grid.cells if cell.state["state"] == FAILED]
    if failed:
        reasons = [(cell.name, cell.state.get("reason", "no reason recorded")) for cell in failed]
        parts.append(text_table(["failed cell", "reason"], reasons, "failed cells"))
    return "\n".join(parts)


def override_table(grid: Grid) -> str:
    """Table of the fields that each row overrides."""
    rows = []
    for row in grid.rows:
        overrides = (f"{key} = {format_value(value)}" for key, value in row.overrides.items())
        rows.append((row.label, row.name, "; ".join(overrides)))
    return text_table(["row", "name", "overrides"], rows, "overrides by row")


def file_list(folder: Path) -> str:
    """Links from `report/report.html` to the files of the folder and its evaluation."""
    lines = []
    for path in [*sorted(folder.iterdir()), *sorted(folder.glob("evaluation/*"))]:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.startswith("."):
            lines.append(f"<li>{link(f'../{name}', name)} ({_size(path.stat().st_size)})</li>")
        elif path.is_dir() and name not in ("report", "evaluation"):
            count = sum(item.is_file() for item in path.rglob("*"))
            lines.append(f"<li>{link(f'../{name}/', f'{name}/')} ({count} files)</li>")
    lines.append("<li>report/figures/: every figure on this page as PNG, PDF and CSV</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
