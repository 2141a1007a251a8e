"""The rows of a benchmark, and one table of them in Markdown."""

from collections.abc import Iterable

from experiments.benchmark.points import Point
from experiments.measurement import timing
from experiments.measurement.csv_table import OK, Kind
from pgpsam_jax.utils.markdown import pipe_table

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


BENCHMARK = Kind(
    "benchmark",
    Point,
    {"device": str, "platform": str, "versions": str}
    | timing.COLUMNS
    | {"flops_per_image": float, "padding_flops_per_image": float, "trace_seconds": float}
    | {"compile_seconds": float, "temporary_bytes": int, "argument_bytes": int}
    | {"aliased_bytes": int, "prepare_peak_bytes": int, "torch": dict, "record": dict},
)


def markdown(rows: Iterable[dict]) -> str:
    """Returns lines for the tasks that are not steps, then the table of the steps."""
    rows, lines, cells, devices = list(rows), [], [], {}
    for row in rows:
        if row["status"] != OK:
            lines.append(f"- {BENCHMARK.point_of(row).key}: **failed**, {row['reason']}")
        elif row.get("record"):
            lines.append(f"- {BENCHMARK.point_of(row).key}: {_record(row['record'])}")
        else:
            cells += _cells(row, rows)
        for found in (row.get("record") or row, *(row.get("torch") or {}).values()):
            if found.get("versions"):
                devices[f"- {found.get('device', 'PyTorch')}, {found['versions']}"] = None
    table = pipe_table([_HEADS, *cells]) if cells else []
    text = "\n".join(["# Benchmark", "", *devices, *lines, "", *table, ""])
    return text + (_NOTE if cells else "")


def _cells(row: dict, rows: list[dict]) -> list[list[str]]:
    """Returns our line of the table and, in a comparison, PyTorch's lines."""
    model = f"{row['model']} {row['encoder']}"
    place = [row["task"], model, str(row["image_size"]), str(row["batch"])]
    place.append({"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]])
    changes = BENCHMARK.point_of(row).changes
    settings = ["scan" if name == "scan" else f"{name} {changes[name]}" for name in changes]
    ceiling = _ceiling(rows, row["device"], row["dtype"])

    def share(images_per_second: float) -> list[str]:
        """MFU and share of the matmul rate."""
        mfu, rate = row["mfu"], images_per_second * row["flops_per_image"]
        mfu = None if mfu is None else mfu * images_per_second / row["images_per_second"]
        return [_percent(mfu), _percent(rate / ceiling if ceiling else None)]

    def theirs(variant: str, found: dict) -> list[str]:
        if "error" in found:
            return [f"torch {variant}: {found['error']}"] + [""] * 9
        low, median, high = found["ratio"]
        return [
            f"torch {variant} {found['attention']}",
            *_speed(found, row["batch"]),
            "",
            *share(row["batch"] / found["median_seconds"]),
            _gib(found["peak_bytes"]),
            "",
            f"{found['first_seconds']:.1f}",
            f"{median:.2f} ({low:.2f}-{high:.2f})",
        ]

    ours = [
        " ".join(["jax", *settings]),
        *_speed(row, row["batch"]),
        f"{row['flops_per_image'] / 1e9:.4g} + {row['padding_flops_per_image'] / 1e9:.2g}",
        *share(row["images_per_second"]),
        _gib(row["peak_bytes"]),
        _gib(row["temporary_bytes"]),
        f"{row['compile_seconds']:.1f}",
        "",
    ]
    return [place + ours, *(place + theirs(*one) for one in (row.get("torch") or {}).items())]


def _ceiling(rows: list[dict], device: str, dtype: str) -> float | None:
    """Returns the FLOP/s of the matmul measured on this device in this type."""
    rates = [
        row["record"]["flops_per_second"]
        for row in rows
        if row["task"] == "matmul" and row["dtype"] == dtype
        and (row.get("record") or {}).get("device") == device
    ]  # fmt: skip
    return max(rates, default=None)


def _speed(row: dict, images: int) -> list[str]:
    low, median, high = (
        f"{1e3 * value:.0f}" if value >= 1 else f"{1e3 * value:.3g}"
        for value in (row[f"{n}_seconds"] for n in ("first_quartile", "median", "third_quartile"))
    )
    return [f"{images / row['median_seconds']:.3g}", f"{median} ({low}-{high})"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _record(record: dict) -> str:
    """Formats a record as one line with dotted names, without the device."""
    words = []
    for name, value in _flat(record):
        if name.split(".")[0] in ("device", "platform", "versions"):
            continue
        if name == "flops_per_second":
            name, value = "TFLOP/s", value / 1e12
        if isinstance(value, list) and isinstance(value[0], float):
            low, median, high = value
            value = f"{median:.3g} ({low:.3g}-{high:.3g})"
        words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


def _flat(record: dict, prefix: str = ""):
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
