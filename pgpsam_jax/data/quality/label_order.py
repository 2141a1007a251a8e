"""Detection of permuted label ids: do organ positions match the label table or another known order?

Several orders of the same eight organs circulate under the same file names, and training does not
notice a wrong one. The misfits of `organ_priors` do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgpsam_jax.data.quality.organ_priors import (
    CERTAIN,
    NAMES,
    PRIOR,
    misfits,
    organ_of,
)

_LOST = 10.0  # gain of an order that finds an organ missing under the table
_FOUND = 2.0  # maximum distance of such an organ
_FAR = 4.0  # mean distance per organ above which no order fits; good data has 0.5

_BTCV = "spleen right_kidney left_kidney gallbladder esophagus liver stomach aorta vena_cava"
# Organs of source ids 1, 2, ... of data sets and code bases; None: a structure without a prior.
ORDERS = {
    name: tuple(None if organ == "-" else organ for organ in organs.split())
    for name, organs in {
        "TransUNet/SAMed/H-SAM (1 spleen, ..., 5 liver, 8 pancreas)": (
            "spleen right_kidney left_kidney gallbladder liver stomach aorta pancreas"
        ),
        "alphabetical (1 aorta, ..., 5 liver, 8 stomach)": (
            "aorta gallbladder left_kidney right_kidney liver pancreas spleen stomach"
        ),
        "CASCADE (1 spleen, ..., 5 pancreas, 6 liver, 7 stomach, 8 aorta)": (
            "spleen right_kidney left_kidney gallbladder pancreas liver stomach aorta"
        ),
        "BTCV source ids (1 spleen, ..., 6 liver, 8 aorta, 11 pancreas)": (
            f"{_BTCV} portal_splenic_vein pancreas right_adrenal left_adrenal"
        ),
        "AMOS (1 spleen, ..., 6 liver, 8 aorta, 10 pancreas)": (
            f"{_BTCV} pancreas right_adrenal left_adrenal - - -"
        ),
        "FLARE22 (1 liver, 2 right kidney, 3 spleen, 4 pancreas, ...)": (
            "liver right_kidney spleen pancreas aorta vena_cava right_adrenal left_adrenal "
            "gallbladder esophagus stomach - left_kidney"
        ),
    }.items()
}


def _misfit(cases: list[dict], order: Mapping[int, str], ids) -> float:
    """Misfit of ids under an order in the best orientation: sum over ids, mean over cases."""
    totals = []
    for case in cases:
        parts = [case[i][:, NAMES.index(order[i])] for i in ids if i in case]
        if parts:
            totals.append(float(np.sum(parts, axis=0).min()))
    return float(np.mean(totals)) if totals else np.inf


def _distance(cases: list[dict], order: Mapping[int, str]) -> float:
    """Mean misfit per organ above its minimum: 0.5 on good data, at most 20."""
    ids = [i for i in order if any(i in case for case in cases)]
    if not ids:
        return np.inf
    least = [np.log(PRIOR[NAMES.index(order[i]), :, 1]).sum() for i in ids]
    return (_misfit(cases, order, ids) - float(np.sum(least))) / len(ids)


def _best_assignment(cases: list[dict], order: Mapping[int, str]) -> dict[int, str]:
    """Permutes the organs of an order over its ids for the best fit."""
    from scipy.optimize import linear_sum_assignment

    ids = [i for i in order if any(i in case for case in cases)]
    columns = [NAMES.index(order[i]) for i in ids]
    total = np.zeros((len(ids), len(ids)))
    for case in cases:
        absent = np.zeros_like(next(iter(case.values())))
        by_orientation = np.stack([case.get(i, absent)[:, columns] for i in ids], axis=1)
        total += min(by_orientation, key=lambda cost: cost[linear_sum_assignment(cost)].sum())
    _, chosen = linear_sum_assignment(total)
    return {i: order[ids[column]] for i, column in zip(ids, chosen, strict=True)}


def known_orders() -> dict[str, dict[int, str]]:
    """Returns `ORDERS` as name -> {id: organ}, without structures that have no prior."""
    return {name: {i: o for i, o in enumerate(organs, 1) if o} for name, organs in ORDERS.items()}


def check_label_order(
    described: Sequence[Mapping[int, list[float]]],
    names: Mapping[int, str] | None,
    *,
    has_grid: bool = True,
) -> dict:
    """Compares the positions and sizes of the labels with those of the organs they name.

    Args:
        described: features per case, {id: (F,)}, from `organ_priors.describe`.
        names: class name per id; None without a label table.
        has_grid: False for plain arrays, whose orientation is unknown.

    Returns:
        A JSON-compatible dict. `verdict`: `consistent`; `mixed_up` (`likely` maps ids to the organs
        they look like, `order` names the known order if one fits); `unclear` (fewer than three
        known organs, or nothing fits); `guess` (no label table). `gain`: how much better `likely`
        fits, in log-likelihood; significant above `CERTAIN` (swapped kidneys give 16, spleen and
        left kidney 6). `distance`: mean misfit per organ.
    """
    cases = [misfits(features, all_orientations=not has_grid) for features in described if features]
    present = {i for case in cases for i in case}
    organs = {i: organ for i, name in (names or {}).items() if (organ := organ_of(name))}
    table = {i: organ for i, organ in organs.items() if i in present}
    answer: dict[str, Any] = {"cases": len(cases), "order": None, "likely": {}}
    answer |= {"gain": None, "distance": None}
    possible = {
        name: {i: o for i, o in order.items() if i in present}
        for name, order in known_orders().items()
        if max(present, default=0) <= len(ORDERS[name])
    }
    if names is None:
        return {"verdict": "unclear", **answer, **_guess(cases, possible)}
    if len(table) < 3 or len(set(table.values())) < len(table):
        return {"verdict": "unclear", **answer}
    lost = set(organs.values()) - set(table.values())
    likely, order, gain = _better(cases, table, possible, lost)
    distance = _distance(cases, likely)
    certain = gain > CERTAIN
    answer |= {"gain": round(gain, 1), "distance": round(distance, 2)}
    if distance > _FAR:
        return {"verdict": "unclear", **answer}
    if not certain:
        return {"verdict": "consistent", **answer}
    return {"verdict": "mixed_up", **answer, "order": order, "likely": likely}


def _better(cases, table, possible, lost: set):
    """Returns the best-fitting order of the table's ids, its name (or None) and its gain.

    An order also gains by each of the `lost` organs (in the table but in no case) that it finds in
    a plausible place under another id.
    """
    own = _misfit(cases, table, table)
    likely, name = _best_assignment(cases, table), None
    gain = own - _misfit(cases, likely, likely)
    for known, order in possible.items():
        both = [i for i in table if i in order]
        if len(both) < 3:
            continue
        better = _misfit(cases, table, both) - _misfit(cases, order, both)
        for i in order:
            if order[i] in lost and _distance(cases, {i: order[i]}) < _FOUND:
                better += _LOST
        if better > max(CERTAIN, gain if name else gain - CERTAIN):
            likely, name, gain = order, known, better
    return likely, name, gain


def _guess(cases, possible) -> dict:
    """Returns the best-fitting known order when there is no label table."""
    fits = {name: _distance(cases, order) for name, order in possible.items() if len(order) >= 3}
    name = min(fits, key=fits.__getitem__, default=None)
    if name is None or fits[name] > _FAR:
        return {}
    distance = round(fits[name], 2)
    return {"verdict": "guess", "order": name, "likely": possible[name], "distance": distance}
