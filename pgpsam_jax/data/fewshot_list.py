"""Few-shot slice lists: sampling rules, file format, hash."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pgpsam_jax.config.exclusive_fields import RULES
from pgpsam_jax.data.layouts.cases import safe_case_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import write_text
from pgpsam_jax.utils.untrusted_text import read_text, sanitize

Areas = Mapping[str, np.ndarray]  # case id -> (D, K) native pixels per slice and class


@dataclass(frozen=True)
class FewShotList:
    """Sorted (case_id, slice index) entries and the sampling rule."""

    entries: tuple[tuple[str, int], ...]
    rule: dict = field(compare=False)

    def __post_init__(self):
        object.__setattr__(self, "entries", tuple(sorted(self.entries)))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def hash(self) -> str:
        """SHA-256 of the entries, which does not depend on the rule."""
        return hashlib.sha256(_text(self.entries).encode()).hexdigest()

    def summary(self, areas: Areas, names: Sequence[str]) -> str:
        """Returns one line: slices, volumes, and the number of slices with each organ."""
        present = sum(areas[case_id][index] > 0 for case_id, index in self.entries)
        organs = ", ".join(f"{names[k]} {present[k]}" for k in range(1, len(names)))
        volumes = len({case_id for case_id, _ in self.entries})
        return f"{len(self)} slices of {volumes} of {len(areas)} volumes; with {organs}"

    def write(self, path) -> None:
        """Writes the list as text: `#` header lines, then `case_id<TAB>slice` per line."""
        volumes = len({case_id for case_id, _ in self.entries})
        head = [
            f"# rule: {json.dumps(self.rule, sort_keys=True)}",
            f"# counts: {len(self)} slices, {volumes} volumes",
            f"# hash: {self.hash}",
        ]
        write_text(path, "\n".join(head) + "\n" + _text(self.entries))


def make_list(
    areas: Areas,
    rule: str,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int | None = None,
    pool: str = "valid",
    volumes: int | None = None,
    every: int | None = None,
    min_pixels: int = 100,
    groups: Mapping[str, str] | None = None,
) -> FewShotList:
    """Samples a few-shot list.

    Args:
        areas: case id -> (D, K) native pixels per slice and class.
        rule: "random", a `fraction` or `count` of the pool; "area", the rule of the authors' code
            (docs/release_code.md#few-shot-list; seed 42 by default); "volumes", the pool of as many
            random cases, none of a group that has one already while there are others; "every", each
            n-th slice of the pool of each case, from its first; "all".
        pool: "valid" for slices in which some organ has at least `min_pixels` pixels, else all.
        groups: case id -> its group, such as a person; each case is its own by default.
    """
    if rule not in RULES:
        raise UserError(f"unknown few-shot rule {rule!r}; known are {', '.join(RULES)}")
    given = {"fraction": fraction, "count": count, "volumes": volumes, "every": every}
    given = {key: value for key, value in given.items() if value is not None}
    needed, default_seed = RULES[rule]
    seed = default_seed if seed is None else seed
    if set(given) - set(needed) or len(given) != min(len(needed), 1):
        takes = f"one setting, {' or '.join(needed)}" if needed else "no size setting"
        raise UserError(f"few-shot rule {rule} takes {takes}; got {given or 'none'}")
    slices = _pool(areas, pool, min_pixels)
    draw = random.Random(seed)
    if rule == "random":
        entries = draw.sample(slices, _size(len(slices), fraction, count))
    elif rule == "area":
        entries = _by_area(areas, slices, fraction, count, draw)
    elif volumes is not None:
        entries = _by_volume(slices, volumes, groups or {}, draw)
    elif every is not None:
        entries = _every(slices, every)
    else:
        entries = slices
    described = {"rule": rule, **given, "seed": seed, "pool": pool, "min_pixels": min_pixels}
    return FewShotList(tuple(entries), described | {"pool_slices": len(slices)})


def read_list(path, areas: Areas | None = None) -> FewShotList:
    """Reads and checks a list, including its hash if it has one.

    Args:
        path: the file; its header is optional. Cases may be named like their files, which
            `safe_case_id` converts.
        areas: if given, all cases and slices must exist in them.
    """
    lines = read_text(path, "few-shot list").splitlines()
    head = dict(line[1:].strip().partition(": ")[::2] for line in lines if line.startswith("#"))
    entries = [
        _entry(line, f"{path} line {number}", areas)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not entries or len(set(entries)) < len(entries):
        raise UserError(f"few-shot list {path} {'has duplicate' if entries else 'holds no'} slices")
    try:
        rule = json.loads(head.get("rule", '{"rule": "file"}'))
    except (ValueError, RecursionError) as error:
        raise UserError(f"few-shot list {path} has a broken rule line: {error}") from error
    if not isinstance(rule, dict):
        raise UserError(f"few-shot list {path} has a broken rule line: {head['rule']!r:.60}")
    result = FewShotList(tuple(entries), rule)
    if head.get("hash", result.hash) != result.hash:
        raise UserError(
            f"few-shot list {path} was changed after it was written (hash {result.hash[:12]}, "
            f"recorded {sanitize(head['hash'], 12)}); restore it or remove the hash line"
        )
    return result


def _entry(line: str, where: str, areas: Areas | None) -> tuple[str, int]:
    match = re.fullmatch(r"([^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*)\t([0-9]{1,6})", line)
    if match is None:
        raise UserError(
            f"{where} is not `case_id<TAB>slice` with a plain case id: {line[:80]!r:.60}"
        )
    case_id, index = safe_case_id(match[1]), int(match[2])
    if areas is not None and case_id not in areas:
        raise UserError(f"{where} names case {case_id}, which is not among the training cases")
    if areas is not None and index >= len(areas[case_id]):
        raise UserError(
            f"{where} names slice {index} of case {case_id}, which has {len(areas[case_id])}"
        )
    return case_id, index


def _text(entries) -> str:
    return "".join(f"{case_id}\t{index}\n" for case_id, index in sorted(entries))


def in_pool(areas: np.ndarray, pool: str, min_pixels: int) -> np.ndarray:
    """Returns which slices of a case belong to a pool: (D, K) native pixels to boolean (D,)."""
    if pool not in ("all", "valid"):
        raise UserError(f'few-shot pool must be "all" or "valid", got {pool!r}')
    if pool == "all":
        return np.ones(len(areas), bool)
    return areas[:, 1:].max(axis=1) >= min_pixels


def _pool(areas: Areas, pool: str, min_pixels: int) -> list[tuple[str, int]]:
    slices = [
        (case_id, int(index))
        for case_id in sorted(areas)
        for index in np.flatnonzero(in_pool(areas[case_id], pool, min_pixels))
    ]
    if not slices:
        raise UserError(f"no slice has an organ of {min_pixels} pixels or more; lower min_pixels")
    return slices


def _size(total: int, fraction, count, extra: int = 0) -> int:
    """Returns the number of slices to draw; `extra` 1: the area rule's floor(M * fraction) + 1."""
    if count is None:
        if not 0 < fraction <= 1:
            raise UserError(f"few-shot fraction must lie in (0, 1], got {fraction}")
        # 1e-9: 0.29 * 100 is 28.999... in binary.
        count = int(total * fraction + (1e-9 if extra else 0.5)) + extra
        count = min(max(count, 1), total)
    if not 1 <= count <= total:
        raise UserError(f"few-shot count {count} is not in 1..{total}, the size of the pool")
    return count


def _by_area(areas: Areas, slices, fraction, count, draw: random.Random):
    """Returns the slices with most of each organ, thinned or topped up to the target size."""
    target = _size(len(slices), fraction, count, extra=1)
    organs = next(iter(areas.values())).shape[1] - 1
    chosen: dict[tuple[str, int], None] = {}  # keeps the order of first appearance
    for organ in range(1, organs + 1):
        rich = [(areas[case_id][index, organ], (case_id, index)) for case_id, index in slices]
        rich = [item for item in rich if item[0] > 0]
        rich.sort(key=lambda item: -item[0])
        chosen.update(dict.fromkeys(entry for _, entry in rich[: len(slices) // organs]))
    if len(chosen) > target:
        return draw.sample(list(chosen), target)
    others = [entry for entry in slices if entry not in chosen]
    return [*chosen, *draw.sample(others, target - len(chosen))]


def _by_volume(slices, volumes: int, groups: Mapping[str, str], draw: random.Random):
    cases = sorted({case_id for case_id, _ in slices})
    if not 1 <= volumes <= len(cases):
        raise UserError(f"few-shot volumes {volumes} is not in 1..{len(cases)}, the cases at hand")
    drawn = draw.sample(cases, len(cases) if groups else volumes)  # the two differ in what is first
    members: Counter[str] = Counter()
    rank = {}  # case -> number of cases of its group that were drawn before it
    for case in drawn:
        group = groups.get(case, case)
        rank[case] = members[group]
        members[group] += 1
    kept = set(sorted(drawn, key=rank.__getitem__)[:volumes])
    return [entry for entry in slices if entry[0] in kept]


def _every(slices, every: int):
    if every < 1:
        raise UserError(f"few-shot every must be 1 or more, got {every}")
    by_case = itertools.groupby(slices, key=lambda entry: entry[0])
    return [entry for _, entries in by_case for entry in list(entries)[::every]]
