"""Folder of a benchmark: finished rows in JSON, and one table in Markdown."""

from pathlib import Path

from pgpsam_jax.utils.files import read_record, write_json, write_text
from pgpsam_jax.utils.markdown import pipe_table

ROWS, TABLE = "benchmark.json", "benchmark.md"
_HEADS = (
    "task", "model", "px", "batch", "type", "by", "images/s", "ms (quartiles)", "GFLOP/image",
    "MFU", "of matmul", "peak GiB", "temporary GiB", "compile s", "torch / jax",
)  # fmt: skip
_NOTE = """
ms: median per step. GFLOP/image: needed FLOPs by the formula of `pgpsam_jax/profiling/flops.py`
(after the +: padding of windows, not counted in the shares). MFU: share of the chip's dense
bfloat16 peak, where the chip is known; of matmul: share of the rate of a large product in the same
type, measured in the same run. peak: of the allocator on an accelerator, of the process on a CPU;
temporary: planned by the compiler. torch / jax: seconds of PyTorch over ours, in alternate turns.
"""


def load(folder) -> dict[str, dict]:
    """Returns the rows of an earlier run by key; {} if there are none."""
    return read_record(
        Path(folder) / ROWS,
        lambda value: {row["key"]: row for row in value["rows"]},
        missing={},
        remedy="give another --output",
    )


def finished(row: dict | None) -> bool:
    """Returns whether a rerun skips it: measured, or out of memory."""
    return row is not None and row.get("error", "out of memory").startswith("out of memory")


def store(folder, rows: dict[str, dict]) -> None:
    """Writes both files."""
    write_json(Path(folder) / ROWS, {"rows": list(rows.values())})
    write_text(Path(folder) / TABLE, markdown(list(rows.values())))


def markdown(rows: list[dict]) -> str:
    """Returns lines for the tasks that are not steps, then the table of the steps."""
    lines, cells = [], []
    for row in rows:
        if "record" in row:
            lines.append(f"- {row['key']}: {_record(row['record'])}")
        elif "error" in row:
            lines.append(f"- {row['key']}: **failed**, {row['error']}")
        else:
            cells += _cells(row, rows)
    table = pipe_table([_HEADS, *cells]) if cells else []
    devices = dict.fromkeys(
        ", ".join([found.get("device", "PyTorch"), *map(" ".join, found["versions"].items())])
        for row in rows
        for found in (row.get("record", row), *row.get("torch", {}).values())
        if "versions" in found
    )
    text = "# Benchmark\n\n" + "".join(f"- {device}\n" for device in devices)
    text += "\n".join(lines) + "\n" * bool(lines)
    text += "\n" + "".join(f"{line}\n" for line in table)
    return text + (_NOTE if cells else "")


def _cells(row: dict, rows: list[dict]) -> list[list[str]]:
    """Returns our line of the table and, in a comparison, PyTorch's lines."""
    point, dtype = row["point"], row["point"]["dtype"]
    model = f"{point['model']} {point['encoder']}"
    place = [point["task"], model, *(str(point[n]) for n in ("image_size", "batch_size"))]
    place.append({"float32": "fp32", "bfloat16": "bf16"}[dtype])
    settings = [f"{n} {point[n]}" for n in ("attention", "remat") if point[n]]
    settings += ["scan"] * point.get("scan", False)  # older rows have none
    flops = row["flops_per_image"]
    ceiling = _ceiling(rows, row["device"], dtype)
    ours = [
        " ".join(["jax", *settings]),
        *_speed(row, point),
        f"{flops['needed'] / 1e9:.4g} + {flops['padding'] / 1e9:.2g}",
        _percent(row["mfu"]),
        _percent(row["flops_per_second"] / ceiling if ceiling else None),
        _gib(row["peak_bytes"]),
        _gib(row["temporary_bytes"]),
        f"{row['compile_seconds']:.1f}",
        "",
    ]
    return [place + ours] + [
        place + _their_cells(variant, found, point, flops["needed"], row, ceiling)
        for variant, found in row.get("torch", {}).items()
    ]


def _their_cells(variant: str, found: dict, point: dict, needed: float, ours: dict, ceiling):
    if "error" in found:
        return [f"torch {variant}: {found['error']}"] + [""] * 9
    rate = needed * point["batch_size"] / found["seconds"]["median"]
    mfu = None if ours["mfu"] is None else ours["mfu"] * rate / ours["flops_per_second"]
    low, high = found["ratio"]["quartiles"]
    return [
        f"torch {variant} {found['attention']}",
        *_speed(found, point),
        "",
        _percent(mfu),
        _percent(rate / ceiling if ceiling else None),
        _gib(found["peak_bytes"]),
        "",
        f"{found['first_seconds']:.1f}",
        f"{found['ratio']['median']:.2f} ({low:.2f}-{high:.2f})",
    ]


def _ceiling(rows: list[dict], device: str, dtype: str) -> float | None:
    """Returns the FLOP/s of the matmul measured on this device in this type."""
    rates = [
        row["record"]["flops_per_second"]
        for row in rows
        if row["point"]["task"] == "matmul" and row["point"]["dtype"] == dtype
        and row.get("record", {}).get("device") == device
    ]  # fmt: skip
    return max(rates, default=None)


def _speed(row: dict, point: dict) -> list[str]:
    seconds = row["seconds"]
    low, median, high = (
        f"{1e3 * value:.0f}" if value >= 1 else f"{1e3 * value:.3g}"
        for value in (seconds["quartiles"][0], seconds["median"], seconds["quartiles"][1])
    )
    return [f"{point['batch_size'] / seconds['median']:.3g}", f"{median} ({low}-{high})"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _record(record: dict) -> str:
    """Formats a record as one line with dotted names, without the device."""
    words = []
    for name, value in _flat(record):
        if name.split(".")[0] in ("device", "platform", "known_chip", "versions"):
            continue
        if name == "flops_per_second":
            name, value = "TFLOP/s", value / 1e12
        words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


def _flat(record: dict, prefix: str = ""):
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
