"""Patient-level training / validation / test splits."""

import random
from collections.abc import Sequence

from pgpsam_jax.data.layouts import groups
from pgpsam_jax.data.layouts.cases import Case, case_key, listed
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import read_user_json

# The split used by all papers of this family on BTCV/Synapse.
BTCV_TRAIN = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
# The authors' code: half of the test cases select the checkpoint, the other half are scored.
BTCV_VALIDATION_6 = (2, 8, 22, 32, 36, 38)
BTCV_TEST_6 = (1, 3, 4, 25, 29, 35)

Ids = tuple[Sequence[int | str], Sequence[int | str], Sequence[int | str]]  # of the three parts
Parts = tuple[list[Case], list[Case], list[Case]]
_PUBLISHED = {
    "btcv_18_12": (BTCV_TRAIN, (), BTCV_TEST),
    "btcv_18_6_6": (BTCV_TRAIN, BTCV_VALIDATION_6, BTCV_TEST_6),
}


def split_cases(
    cases: Sequence[Case],
    kind: str,
    *,
    file=None,
    test_fraction=None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    folds: int = 5,
    fold: int = 0,
) -> Parts:
    """Splits cases by patient; no patient is in two parts.

    Args:
        cases: of one data set.
        kind: "btcv_18_12", the published split; "btcv_18_6_6", that of the authors' code; "file";
            "given" by the layout (the lists of TransUNet, imagesTr and imagesTs of nnU-Net);
            "fraction", a seeded draw of cases; "group", one of groups of cases (`groups`), such as
            persons with several volumes; "folds", one of `folds` parts of the cases, or of the
            groups of those that have one, is tested; "all", none is; or "within_volume", which
            returns all cases as training and as test cases, so that scoring has to leave out the
            training slices. The last five ignore the test cases that the layout has.
        file: JSON object with id lists "train", "test" and optionally "validation".
        test_fraction: share of the cases or groups drawn for testing.
        validation_fraction: share drawn for validation; it does not change the test cases.
        seed: of the draw.
        folds, fold: number of parts of split "folds", and the one to test, from 0.

    Returns:
        Training, validation (may be empty) and test cases (empty for split "all").

    Raises:
        UserError: the split does not fit the cases, or has a group of cases in two parts.
    """
    cases = list(cases)
    if validation_fraction and kind not in ("fraction", "group", "folds"):
        raise UserError(
            f"data.validation_fraction is {validation_fraction}, which split {kind!r} does not "
            "use; set it to 0, or data.split to fraction, group or folds"
        )
    own = [case for case in cases if case.part != "test"] or cases
    if kind == "within_volume":
        return own, [], own
    if kind == "all":
        return own, [], []
    if kind == "folds":
        ids = _split_folds(own, validation_fraction, folds, fold, seed)
        parts = _select(cases, ids, f"fold {fold} of {folds}")
    else:
        parts = _parts(cases, own, kind, file, validation_fraction, test_fraction, seed)
    groups.check_parts(dict(zip(("train", "validation", "test"), parts, strict=True)), kind)
    return parts


def _parts(cases: list[Case], own: list[Case], kind: str, file, validation, test, seed) -> Parts:
    if kind == "given":
        return _given(cases)
    if kind in _PUBLISHED:
        parts: Ids = _PUBLISHED[kind]
    elif kind == "file":
        parts = _split_file(file)
    elif kind == "fraction":
        ids = [case.case_id for case in own]
        parts = _draw(ids, "cases", validation, test, seed)
    elif kind == "group":
        parts = _split_groups(own, validation, test, seed)
    else:
        raise UserError(
            f"unknown split {kind!r}; known are btcv_18_12, btcv_18_6_6, file, given, fraction, "
            "group, folds, all and within_volume"
        )
    return _select(cases, parts, f"split {file or kind}")


def _given(cases: list[Case]) -> Parts:
    parts = [[case for case in cases if case.part == part] for part in ("train", "test")]
    if not all(parts):
        raise UserError(
            f"split given needs a layout with training and test cases of its own, here are "
            f"{len(parts[0])} and {len(parts[1])}; choose another data.split"
        )
    return parts[0], [], parts[1]


def _split_file(file) -> Ids:
    value = read_user_json(file or "", "split file")
    keys = set(value) if isinstance(value, dict) else set()
    if (
        keys - {"validation"} != {"train", "test"}
        or not all(isinstance(ids, list) and ids for ids in value.values())
        or not all(type(i) in (str, int) for ids in value.values() for i in ids)
    ):
        raise UserError(
            f'split file {file} must be {{"train": [ids], "test": [ids]}}, with or without '
            '"validation": [ids], none of them empty'
        )
    return value["train"], value.get("validation", []), value["test"]


def _split_groups(cases: list[Case], validation, test, seed: int) -> Ids:
    members: dict[str, list[str]] = {}
    for case in cases:
        members.setdefault(case.group, []).append(case.case_id)
    if "" in members:
        raise UserError(
            "split group needs the group of each case; give data.group, a regular expression with "
            "one capture group that is searched in case ids, or data.group_file"
        )
    return _members(_draw(list(members), "groups", validation, test, seed), members)


def _members(parts: Ids, members: dict[str, list[str]]) -> Ids:
    """The cases of groups."""
    train, held_out, tests = (
        sorted(case_id for group in part for case_id in members[str(group)]) for part in parts
    )
    return train, held_out, tests


def _split_folds(cases: list[Case], validation, folds: int, fold: int, seed: int) -> Ids:
    members: dict[str, list[str]] = {}
    for case in cases:  # a case without a group is one of its own, and no group has that name
        members.setdefault(case.group or f"\0{case.case_id}", []).append(case.case_id)
    units, draw = sorted(members), random.Random(seed)
    if not 2 <= folds <= len(units):
        raise UserError(
            f"data.folds is {folds}; choose from 2 to {len(units)}, the cases or groups at hand"
        )
    if not 0 <= fold < folds:
        raise UserError(f"data.fold is {fold}; the {folds} folds are numbered from 0")
    draw.shuffle(units)
    tests = units[fold::folds]
    rest = [unit for unit in units if unit not in tests]
    count = _validation_size(validation, len(units), len(tests), "cases or groups")
    held_out = draw.sample(rest, count)
    train = [unit for unit in rest if unit not in held_out]
    return _members((train, held_out, tests), members)


def _draw(units: list[str], what: str, validation, test, seed: int) -> Ids:
    """Draws the parts of a split from cases or groups."""
    total = len(units)
    if test is None or not 0 < test < 1 or total < 2:
        raise UserError(
            f"split by seed needs 0 < test_fraction < 1 and at least 2 {what}, got {test} and "
            f"{total} (within_volume is the split for a single case)"
        )
    count = min(max(round(test * total), 1), total - 1)
    held_out = _validation_size(validation, total, count, what)
    ids, draw = sorted(units), random.Random(seed)
    tests = set(draw.sample(ids, count))
    rest = [i for i in ids if i not in tests]
    chosen = set(draw.sample(rest, held_out))
    return [i for i in rest if i not in chosen], sorted(chosen), sorted(tests)


def _validation_size(validation: float, total: int, tests: int, what: str) -> int:
    size = max(round(validation * total), 1) if validation else 0
    if not 0 <= validation < 1 or tests + size >= total:
        raise UserError(
            f"data.validation_fraction {validation} must lie in [0, 1) and, beside {tests} for "
            f"testing, leave one of the {total} {what} to train on; lower one of them"
        )
    return size


def _select(cases: list[Case], parts: Ids, what: str) -> Parts:
    known = {case_key(case.case_id): case for case in cases}
    if len(known) < len(cases):
        raise UserError(f"{what}: case ids differ only by leading zeros; rename the files")
    keys = [[case_key(i) for i in part] for part in parts]
    named = [i for part in keys for i in part]
    missing = sorted({i for i in named if i not in known})
    if missing:
        raise UserError(f"{what} names cases that are not in the data: {listed(missing)}")
    double = sorted({i for i in named if named.count(i) > 1})
    if double:
        raise UserError(f"{what} names cases twice, which would leak: {listed(double)}")
    train, validation, test = ([known[i] for i in part] for part in keys)
    return train, validation, test
