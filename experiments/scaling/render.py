"""Renders the CSV files of a folder as Markdown tables and charts."""

import math
from pathlib import Path

import matplotlib

from experiments.measurement.csv_table import FAILED, OK, Kind, load
from experiments.scaling.charts import CHARTS
from experiments.scaling.compiled import RESERVE
from experiments.scaling.hlo_collectives import KINDS
from experiments.scaling.kinds import COMPILED, MEASURED
from pgpsam_jax.errors import UserError
from pgpsam_jax.profiling import aot
from pgpsam_jax.results.tables.text import NONE, Table, number, percent, to_markdown
from pgpsam_jax.utils.files import atomic_path, write_text
from pgpsam_jax.visualization.theme import LIGHT

_ENCODERS = "vit_t vit_b vit_l vit_h"  # in order of size
_SHORT = {
    "all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS", "all-to-all": "A2A",
    "collective-permute": "CP",
}  # fmt: skip
_ESTIMATE = (
    "Estimates, not measurements: the largest of three lower bounds of a chip's time, with full "
    "rates, full overlap and no latency (`experiments/scaling/roofline.py`, "
    "`pgpsam_jax/profiling/accelerators.py`). Compute: the larger of XLA's count and the "
    "formula's over the dense "
    "bfloat16 peak. HBM: bytes that the program reads and writes in the chip's memory "
    "(`experiments/scaling/hlo_traffic.py`) over its bandwidth. ICI: bytes "
    "a chip receives by ring algorithms, one collective after the other, over the links of the "
    "group's chips. MFU: the formula's FLOPs over the peak in the estimated time."
)
_COLLECTIVES = (
    "Collectives: number and MB that a chip receives in a step; "
    + ", ".join(f"{short} {kind}" for kind, short in _SHORT.items())
    + ". A loop of unknown length counts once (marked +)."
)
_MEMORY = (
    "GiB per chip, planned by the compiler: arguments, temporaries, total (with outputs that do "
    "not reuse arguments), and the limit: `pgpsam_jax/profiling/accelerators.py`'s memory less "
    f"{RESERVE / 2**30:g} GiB for the runtime, a resident few-shot set and the next batch. If the "
    "compiler rejects a program, the total is from its message. Images: per chip; (most): the "
    "largest number that fits."
)
_MEASURED = (
    "ms: median of the timed steps and quartiles, without compilation; + marks points that the "
    "time budget of a CPU cut short. Images: in the global batch. Efficiency: images per "
    "second and device over those of the smallest number of devices. MFU: the formula's FLOPs over "
    "the dense bfloat16 peak, where the chip is known. Peak: of the allocator on the "
    "fullest device; on a CPU, each device's share of the process; plan: by the compiler."
)


def render(folder, kind: Kind) -> str:
    """Writes tables and charts of a kind from its CSV file; returns the text of the tables."""
    folder = Path(folder)
    found = _in_order(kind, load(folder, kind).values())
    finished = [row for row in found if row["status"] != FAILED]
    pictures = []
    for stem, (make, title) in CHARTS[kind.name].items():
        drawn = _wanted(stem, finished)
        if drawn:
            _draw(make, drawn, folder / f"{stem}.png")
            pictures.append(f"![{title}]({stem}.png)\n")
    tables = [_measured(found)] if kind is MEASURED else [_estimates(found), _memory(found)]
    failures = [
        f"- {_name(row)}: {row['reason']}\n"
        for row in found
        if row["status"] == FAILED or (row["status"] == OK and row["reason"])
    ]
    text = "\n".join(to_markdown(one) for one in tables if one.rows)
    if failures:
        text += "\n## Failed or without an estimate\n\n" + "".join(failures)
    title = "Scaling, " + ("measured" if kind is MEASURED else "compiled for TPUs")
    text = f"# {title}\n\n{text}\n" + "\n".join(pictures)
    write_text(folder / f"{kind.name}.md", text)
    return text


def _draw(make, rows: list[dict], path: Path) -> None:
    """Saves a chart as PNG in the light colors of the report."""
    with matplotlib.rc_context(LIGHT.settings), atomic_path(path) as temporary:
        make(rows, LIGHT).savefig(temporary, format="png", dpi=150)


def render_all(folder) -> list[str]:
    """Renders the kinds that the folder has."""
    kinds = [kind for kind in (MEASURED, COMPILED) if (Path(folder) / f"{kind.name}.csv").is_file()]
    if not kinds:
        raise UserError(f"{folder} has no measured.csv or compiled.csv; run a study first")
    return [render(folder, kind) for kind in kinds]


def _in_order(kind: Kind, rows) -> list[dict]:
    """Sorts by model, then by devices: parallel points are stored as they finish."""
    rows = list(rows)

    def place(row):
        model = _ENCODERS.find(row["encoder"]), row["image_size"]
        if kind is MEASURED:
            return *model, row["mesh"], row["remat"], row["scaling"] != "weak", row["devices"]
        chip, shape = aot.parse_topology(row["topology"])
        return *model, chip, math.prod(shape), row["mesh"], row["remat"], row["batch"]

    return sorted(rows, key=place)


def _wanted(stem: str, rows: list[dict]) -> list[dict]:
    """Returns the rows that a chart can show."""
    if stem == "compiled_memory":
        return rows
    known = [row for row in rows if row["status"] == OK]
    return known if stem == "measured" else [row for row in known if row["estimate_seconds"]]


def _name(row: dict) -> str:
    place = row.get("topology") or f"{row['devices']} devices, {row['scaling']}"
    return f"{place}, {row['encoder']}, {row['image_size']} px, batch {row['batch']}, {row['mesh']}"


def _place(row: dict) -> list[str]:
    setting = [row["mesh"]] + [f"remat {row['remat']}"] * (row["remat"] != "none")
    setting += [row["attention"]] * (row["attention"] != "auto") + ["scan"] * row["scan"]
    mark = " (most)" if row["largest_that_fits"] else ""
    slice_ = f"{row['slice'] or ''} ({row['topology'].split(':')[1]})"
    model = f"{row['encoder']} {row['image_size']}"
    return [slice_, model, f"{row['batch']}{mark}", ", ".join(setting)]


def _estimates(rows: list[dict]) -> Table:
    head = ["slice", "model, px", "images", "mesh", "TFLOP, XLA / formula", "collectives",
            "compute ms", "HBM ms", "ICI ms", "binds", "images/s", "efficiency %",
            "MFU %"]  # fmt: skip
    cells = []
    for row in rows:
        if row["status"] != OK or row["estimate_seconds"] is None:
            continue
        terms = [
            number(1e3 * row[f"estimate_{term}_seconds"]) for term in ("compute", "hbm", "ici")
        ]
        found = [
            f"{row[f'{kind}_count']:g} {_SHORT[kind]} {row[f'{kind}_bytes'] / 1e6:.3g}"
            for kind in KINDS
            if row[f"{kind}_count"]
        ]
        cells.append(
            [
                *_place(row),
                f"{_tera(row['xla_flops'])} / {_tera(row['formula_flops'])}",
                ", ".join(found) + "+" * bool(row["loops_unknown"]) or NONE,
                *terms,
                {"hbm": "HBM", "ici": "ICI"}.get(row["estimate_binds"], row["estimate_binds"]),
                f"{row['estimate_images_per_second']:.0f}",
                percent(row["estimate_efficiency"]),
                percent(row["estimate_mfu"]),
            ]
        )
    return Table("Roofline estimates", head, cells, [_ESTIMATE, _COLLECTIVES])


def _memory(rows: list[dict]) -> Table:
    head = ["slice", "model, px", "images", "mesh", "arguments", "temporaries", "total", "limit",
            "fits", "compile s"]  # fmt: skip
    cells = [
        [
            *_place(row),
            *(
                _gib(row[f"{part}_bytes"])
                for part in ("arguments", "temporaries", "total", "limit")
            ),
            "yes" if row["status"] == OK else "no",
            number(row["compile_seconds"], 0),
        ]
        for row in rows
        if row["status"] != FAILED
    ]
    return Table("Memory of a chip", head, cells, [_MEMORY])


def _measured(rows: list[dict]) -> Table:
    head = ["scaling", "devices", "model, px", "images", "mesh", "type", "steps", "ms (quartiles)",
            "images/s", "efficiency %", "MFU %", "peak GiB", "plan GiB", "compile s"]  # fmt: skip
    cells = []
    for row in rows:
        if row["status"] == FAILED:
            continue
        low, middle, high = (
            f"{1e3 * row[f'{name}_seconds']:.4g}"
            for name in ("first_quartile", "median", "third_quartile")
        )
        setting = row["mesh"] + (f", remat {row['remat']}" if row["remat"] != "none" else "")
        cells.append(
            [
                row["scaling"],
                str(row["devices"]),
                f"{row['encoder']} {row['image_size']}",
                str(row["global_batch"]),
                setting,
                row["dtype"],
                f"{row['steps']}{'+' * row['stopped_by_budget']}",
                f"{middle} ({low}-{high})",
                f"{row['images_per_second']:.3g}",
                percent(row["efficiency"]),
                NONE if row["mfu"] is None else percent(row["mfu"]),
                _gib(row["peak_bytes"]),
                _gib(row["planned_bytes"]),
                number(row["compile_seconds"], 1),
            ]
        )
    devices = dict.fromkeys(row["device"] for row in rows if row.get("device"))
    simulated = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    title = "Training step" + (", simulated" if simulated else "")
    return Table(title, head, cells, [*simulated, f"Device: {', '.join(devices)}.", _MEASURED])


def _tera(flops: float | None) -> str:
    return NONE if flops is None else f"{flops / 1e12:.3g}"


def _gib(count: float | None) -> str:
    return NONE if count is None else number(count / 2**30)
