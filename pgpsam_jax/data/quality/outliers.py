"""Outliers among the cases of a data set.

An outlier differs from the median by more than five robust standard deviations (1.48 times the
median absolute deviation) and by more than a floor, the usual variation within a data set. At least
three cases are needed.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pgpsam_jax.data.findings import ERROR, WARNING, Finding
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.quality.appearance import QUANTILES, slice_width

_SPREADS = 5 * 1.4826
_MEDIAN, _UPPER = QUANTILES.index(0.5), QUANTILES.index(0.75)
_SHIFT = 0.25  # of the usual span of intensities
_FEW = 0.15  # of the cases; more are not outliers
_SPAN, _PIXEL, _SLICES, _WIDTH, _ORGAN = 3.0, 2.0, 3.0, 1.7, 4.0  # factors


def compare(
    files: Sequence[dict], table: LabelTable | None, *, has_grid: bool, relative: bool = False
) -> Iterable[Finding]:
    """Reports cases that differ from the others.

    Args:
        files: records with `case` and `part`.
        table: of the data set.
        has_grid: False for plain arrays without voxel size and orientation.
        relative: volumes are normalized by their own intensities, whose unit does not matter then.
    """
    images = [f for f in files if f["kind"] == "image" and f.get("appearance")]
    labels = {f["case"]: f for f in files if f["kind"] == "label" and "voxels" in f}
    if not relative:
        yield from _intensities(images)
    if has_grid:
        yield from _grids(images)
        yield from _axes(images)
        if table is not None:
            yield from _organs(images, labels, table)
    else:
        yield from _rows_and_columns(images)


def outliers(values: Mapping[str, float], floor: float) -> dict[str, tuple[float, float, float]]:
    """Returns name -> (value, minimum and maximum of the inliers) of each outlier."""
    if len(values) < 3:
        return {}
    numbers = np.array(list(values.values()))
    away = np.abs(numbers - np.median(numbers))
    odd = away > max(_SPREADS * float(np.median(away)), floor)
    rest = numbers[~odd]
    return {
        name: (float(value), float(rest.min()), float(rest.max()))
        for name, value, is_odd in zip(values, numbers, odd, strict=True)
        if is_odd
    }


def _report_outliers(
    code: str, odd: Mapping[str, tuple], total: int, text: str
) -> Iterable[Finding]:
    """Yields a finding per outlier, or a single one if there are too many to be outliers.

    text: message with placeholders for the value and for the range of the inliers.
    """
    if len(odd) <= max(_FEW * total, 1):
        for file, numbers in odd.items():
            message = text.format(*(f"{number:.4g}" for number in numbers))
            yield Finding(WARNING, code, file, message)
        return
    values = [number for numbers in odd.values() for number in numbers]
    what = text.split("{}")[0].removeprefix("has ").strip()
    message = (
        f"the cases vary widely: {len(odd)} of {total} differ from the others ({what} "
        f"{min(values):.4g} to {max(values):.4g} overall), for example {next(iter(odd))}; check "
        "that they belong together"
    )
    yield Finding(WARNING, code, "", message)


def _intensities(images) -> Iterable[Finding]:
    spans = {i["file"]: _span(i["appearance"]["whole"]) for i in images}
    if not spans:
        return
    usual = float(np.median(list(spans.values())))
    labeled = all(image["appearance"]["foreground"] for image in images)
    part, place = ("foreground", _MEDIAN) if labeled else ("whole", _UPPER)
    places = {i["file"]: i["appearance"][part][place] for i in images}
    far = outliers(places, _SHIFT * usual)
    what = "labeled voxels with a median of" if labeled else "an upper quartile of"
    text = f"has {what} {{}}, other cases {{}} to {{}}; check its unit, scale and intercept"
    yield from _report_outliers("unlike", far, len(places), text)
    wide = {f: v for f, v in _by_factor(spans, _SPAN).items() if f not in far}
    text = "has an intensity range of {}, other cases {} to {}; check its unit and scale"
    yield from _report_outliers("unlike", wide, len(places), text)


def _span(whole: Sequence[float]) -> float:
    return max(whole[-1] - whole[0], 1e-6)


def _by_factor(values: Mapping[str, float], factor: float) -> dict:
    """`outliers` of positive values, compared by ratio."""
    found = outliers({name: math.log(value) for name, value in values.items()}, math.log(factor))
    return {name: tuple(map(math.exp, numbers)) for name, numbers in found.items()}


def _grids(images) -> Iterable[Finding]:
    stacks = [image for image in images if image["shape"][0] > 1]
    widths = {i["file"]: slice_width(i["shape"], i["spacing"]) for i in images}
    for what, factor, values in (
        ("a pixel size of {} mm", _PIXEL, {i["file"]: min(i["spacing"][1:]) for i in images}),
        ("a slice distance of {} mm", _SLICES, {i["file"]: i["spacing"][0] for i in stacks}),
        ("a slice width of {} mm", _WIDTH, widths),
    ):
        text = f"has {what}, other cases {{}} to {{}}; check its voxel size"
        yield from _report_outliers("spacing", _by_factor(values, factor), len(values), text)


def _axes(images) -> Iterable[Finding]:
    """Reports cases whose slices were acquired along another axis than most."""
    known = {i["file"]: axis for i in images if (axis := i.get("thick_axis"))}
    if len(set(known.values())) < 2:
        return
    usual = Counter(known.values()).most_common(1)[0][0]
    for file, axis in known.items():
        if axis != usual:
            message = (
                f"has {axis} slices, but most cases {usual} ones, and all are sliced along one "
                "axis (data.axis): remove or resample it"
            )
            yield Finding(WARNING, "axis", file, message)


def _organs(images, labels, table: LabelTable) -> Iterable[Finding]:
    liters = {i["case"]: np.prod(i["spacing"]) / 1e6 for i in images}
    volumes: dict[str, dict[str, float]] = {name: {} for name in table.names[1:]}
    for case, label in labels.items():
        for source, count in label["voxels"].items():
            organ = table.source_to_class.get(int(source), 0)
            if organ and case in liters:
                found = volumes[table.names[organ]]
                milliliters = 1000 * liters[case] * count
                found[label["file"]] = found.get(label["file"], 0.0) + milliliters
    messages: dict[str, list[str]] = {}
    for name, values in volumes.items():
        if len(values) < 4:
            continue
        for file, (value, least, most) in _by_factor(values, _ORGAN).items():
            text = f"{name} of {value:.3g} ml (other cases {least:.3g} to {most:.3g})"
            messages.setdefault(file, []).append(text)
    for file, texts in messages.items():
        message = f"has a {', a '.join(texts)}; inspect an overlay of its label"
        yield Finding(WARNING, "volume", file, message)


def _rows_and_columns(images) -> Iterable[Finding]:
    """Reports plain arrays whose slice shape or axis order differs from the training slices."""
    sizes = Counter(tuple(i["shape"][1:]) for i in images if i["part"] == "train")
    if not sizes:
        return
    usual = sizes.most_common(1)[0][0]
    for image in images:
        shape = tuple(image["shape"])
        if shape[1:] == usual:
            continue
        if usual in (shape[:2], shape[:2][::-1], shape[::2], shape[::2][::-1]):
            message = (
                f"has shape {shape}, but training slices have {usual}: its slice axis is not the "
                "first; store it as (slices, rows, columns)"
            )
            yield Finding(ERROR, "shape", image["file"], message)
        else:
            message = (
                f"has slices of {shape[1:]} pixels, but most training slices have {usual}; "
                "check that it was exported like them"
            )
            yield Finding(WARNING, "size", image["file"], message)
