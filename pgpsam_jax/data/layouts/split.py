"""Patient-level training / validation / test splits."""

import random
from collections.abc import Sequence

from pgpsam_jax.data.layouts.cases import Case, safe_case_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

# The split used by all papers of this family on BTCV/Synapse.
BTCV_TRAIN = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
# The authors' code: half of the test cases select the checkpoint, the other half are scored.
BTCV_VALIDATION_6 = (2, 8, 22, 32, 36, 38)
BTCV_TEST_6 = (1, 3, 4, 25, 29, 35)

Ids = tuple[Sequence[int | str], Sequence[int | str], Sequence[int | str]]  # of the three parts
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
) -> tuple[list[Case], list[Case], list[Case]]:
    """Splits cases by patient; no patient is in two parts.

    Args:
        cases: of one data set.
        kind: "btcv_18_12", the published split; "btcv_18_6_6", that of the authors' code; "file";
            "given" by the layout (the lists of TransUNet, imagesTr and imagesTs of nnU-Net);
            "fraction", a seeded draw of patients; or "within_volume", which returns all cases as
            training and as test cases, so that scoring has to leave out the training slices. The
            last two ignore the test cases that the layout has.
        file: JSON object with id lists "train", "test" and optionally "validation".
        test_fraction: share of the cases drawn for testing.
        validation_fraction: share drawn for validation; it does not change the test cases.
        seed: of the draw.

    Returns:
        Training, validation (may be empty) and test cases.
    """
    cases = list(cases)
    if validation_fraction and kind != "fraction":
        raise UserError(
            f"data.validation_fraction is {validation_fraction}, which split {kind!r} does not "
            "use; set it to 0, or data.split to fraction"
        )
    own = [case for case in cases if case.part != "test"] or cases
    if kind == "within_volume":
        return own, [], own
    if kind == "given":
        return _given(cases)
    if kind in _PUBLISHED:
        parts: Ids = _PUBLISHED[kind]
    elif kind == "file":
        parts = _split_file(file)
    elif kind == "fraction":
        parts = _split_fraction(own, validation_fraction, test_fraction, seed)
    else:
        raise UserError(
            f"unknown split {kind!r}; known are btcv_18_12, btcv_18_6_6, file, given, fraction and "
            "within_volume"
        )
    return _select(cases, parts, f"split {file or kind}")


def _given(cases: list[Case]) -> tuple[list[Case], list[Case], list[Case]]:
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


def _split_fraction(cases: list[Case], validation, test, seed: int) -> Ids:
    if test is None or not 0 < test < 1 or len(cases) < 2:
        raise UserError(
            f"split fraction needs 0 < test_fraction < 1 and at least 2 cases, got {test} and "
            f"{len(cases)} (within_volume is the split for a single case)"
        )
    count = min(max(round(test * len(cases)), 1), len(cases) - 1)
    held_out = max(round(validation * len(cases)), 1) if validation else 0
    if not 0 <= validation < 1 or count + held_out >= len(cases):
        raise UserError(
            f"data.validation_fraction {validation} must lie in [0, 1) and, beside test_fraction "
            f"{test}, leave one of the {len(cases)} cases to train on; lower one of them"
        )
    ids, draw = sorted(case.case_id for case in cases), random.Random(seed)
    tests = set(draw.sample(ids, count))
    rest = [i for i in ids if i not in tests]
    chosen = set(draw.sample(rest, held_out))
    return [i for i in rest if i not in chosen], sorted(chosen), sorted(tests)


def _select(cases: list[Case], parts: Ids, what: str) -> tuple[list[Case], list[Case], list[Case]]:
    known = {_key(case.case_id): case for case in cases}
    if len(known) < len(cases):
        raise UserError(f"{what}: case ids differ only by leading zeros; rename the files")
    keys = [[_key(i) for i in part] for part in parts]
    named = [i for part in keys for i in part]
    missing = sorted({i for i in named if i not in known})
    if missing:
        raise UserError(f"{what} names cases that are not in the data: {_listed(missing)}")
    double = sorted({i for i in named if named.count(i) > 1})
    if double:
        raise UserError(f"{what} names cases twice, which would leak: {_listed(double)}")
    train, validation, test = ([known[i] for i in part] for part in keys)
    return train, validation, test


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    return ", ".join(sanitize(i) for i in ids[:20]) + more


def _key(case_id) -> str:
    """Maps `5`, `05` and `0005` to one patient, and `pat 1` to the file `pat 1.nii.gz`."""
    try:
        text = safe_case_id(str(case_id))
    except UserError:  # no file has such a name
        text = str(case_id)
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text
