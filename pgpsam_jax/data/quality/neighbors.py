"""Whether neighboring cases look like volumes of one person.

Volumes of a person have like intensities and, in most data sets, consecutive ids. Measured: the
ranks of neighbors among each other's most similar cases, against the same cases shuffled within
blocks of eight. Cases that were numbered by scanner or site are alike over longer stretches, which
such a shuffle keeps. Letters: N cases, Q quantiles.
"""

import re
from collections.abc import Sequence

import numpy as np

from pgpsam_jax.data.findings import WARNING, Finding

# Chosen on 200 hippocampus MRs of 132 persons: 9.0 SDs, at most 3.8 in 1000 subsets of 10 to 132
# volumes with one of each person. Of 100 subsets of persons with two volumes each, all are told
# of with 30 persons, 88 with 20, 66 with 15, 4 with 10.
_SDS = 4.5
_FEWEST, _MOST = 10, 2000  # cases compared
_BLOCK, _SHUFFLES = 8, 500


def check(files: Sequence[dict]) -> Finding | None:
    """Returns a warning if neighbors, by id, are closer than chance and their groups are not known.

    Args:
        files: records with `case` and `group`.
    """
    images = [f for f in files if f["kind"] == "image" and f.get("appearance")]
    if any(image.get("group") for image in images) or len(images) < _FEWEST:
        return None
    images = sorted(images, key=lambda image: _natural(image["case"]))[:_MOST]
    ranks = _log_ranks(np.array([image["appearance"]["whole"] for image in images]))
    if (sds := _sds_closer(ranks)) < _SDS:
        return None
    nearest = np.argsort(np.diagonal(ranks, 1), kind="stable")[:3]
    pairs = ", ".join(f"{images[i]['case']} and {images[i + 1]['case']}" for i in nearest)
    message = (
        f"neighboring cases look like volumes of one person, as {pairs}: in intensity they are "
        f"closer than other cases around them, by {sds:.1f} SDs of chance; if they are, name the "
        "persons by data.group or data.group_file and set data.split=group, or persons that were "
        "trained on are tested"
    )
    return Finding(WARNING, "neighbors", "", message)


def _natural(case_id: str) -> list[tuple[int, str]]:
    """Sorts numbers within ids by value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split("([0-9]+)", case_id)
    ]


def _log_ranks(quantiles: np.ndarray) -> np.ndarray:
    """Returns how near cases are to each other among all, (N, Q) -> (N, N) logarithms of ranks."""
    spans = np.maximum(quantiles[:, -1] - quantiles[:, 0], 1e-9)
    away = sum(np.abs(column[:, None] - column) for column in quantiles.T)
    away = away / (spans[:, None] + spans)
    np.fill_diagonal(away, np.inf)
    ranks = np.argsort(np.argsort(away, axis=1, kind="stable"), axis=1) + 1.0
    return (np.log(ranks) + np.log(ranks.T)) / 2


def _sds_closer(ranks: np.ndarray) -> float:
    """Returns by how many SDs the mean over neighbors is below that of shuffled cases."""
    count, rng = len(ranks), np.random.default_rng(0)
    blocks = (np.arange(count) + rng.integers(0, _BLOCK, (_SHUFFLES, 1))) // _BLOCK
    orders = np.argsort(blocks + rng.random((_SHUFFLES, count)), axis=1)
    shuffled = ranks[orders[:, :-1], orders[:, 1:]].mean(axis=1)
    return float((shuffled.mean() - np.diagonal(ranks, 1).mean()) / max(shuffled.std(), 1e-9))
