"""Where cases are found and how they are split by patient."""

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgpsam_jax.data.layouts.cases import Case, safe_case_id
from pgpsam_jax.data.layouts.find import find_cases
from pgpsam_jax.data.layouts.split import (
    BTCV_TEST,
    BTCV_TEST_6,
    BTCV_TRAIN,
    BTCV_VALIDATION_6,
    split_cases,
)
from pgpsam_jax.errors import UserError
from tests.support.layout_data import write_nnunet


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def btcv_names(ids, kinds=("img", "label")):
    return [f"RawData/Training/{k}/{k}{i:04d}.nii.gz" for k in kinds for i in ids]


def test_btcv_from_every_entry_folder(tmp_path):
    touch(tmp_path / "Abdomen", *btcv_names([40, 1, 22]), "RawData/Training/img/._img0001.nii.gz")
    for root in ("Abdomen", "Abdomen/RawData", "Abdomen/RawData/Training", "."):
        cases = find_cases("btcv", tmp_path / root)
        assert [case.case_id for case in cases] == ["0001", "0022", "0040"]
        assert [case.image.name for case in cases][1] == "img0022.nii.gz"
        assert [case.label.name for case in cases][1] == "label0022.nii.gz"


def test_btcv_problems(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: .*img0001.*syn3193805.*registration"):
        find_cases("btcv", tmp_path / "none")
    with pytest.raises(UserError, match=r"no img folder .*syn3193805"):
        find_cases("btcv", tmp_path)
    touch(tmp_path, *btcv_names([1, 2, 3], ["img"]), *btcv_names([2, 9], ["label"]))
    with pytest.raises(UserError, match=r"label of 0001 is missing, label of .*, image of 0009 "):
        find_cases("btcv", tmp_path)
    touch(tmp_path / "x", *btcv_names([1, 2]), "RawData/Training/img/img0002.nii")
    with pytest.raises(UserError, match=r"several image files for case 0002 \(img0002.nii, img"):
        find_cases("btcv", tmp_path / "x")
    with pytest.raises(UserError, match=r"unknown data layout 'dicom'; known are btcv, nnunet"):
        find_cases("dicom", tmp_path)


def test_pairs_match_by_id_not_by_position(tmp_path):
    touch(tmp_path, "im/b b_0000.nii.gz", "im/a_0000.nii.gz", "im/.c_0000.nii.gz", "lab/a.nii.gz")
    with pytest.raises(UserError, match=r"label of b_b is missing; expected"):
        find_cases("pairs", tmp_path, "im/*_0000.nii.gz", "lab/*.nii.gz")
    touch(tmp_path, "lab/b b.nii.gz")
    cases = find_cases("pairs", tmp_path, "im/*_0000.nii.gz", "lab/*.nii.gz")
    assert [(c.case_id, c.image.name, c.label.name) for c in cases] == [
        ("a", "a_0000.nii.gz", "a.nii.gz"),
        ("b_b", "b b_0000.nii.gz", "b b.nii.gz"),
    ]
    touch(tmp_path, "s/p1/t1.nii.gz", "s/p1/seg.nii.gz", "s/p2/t1.nii.gz", "s/p2/seg.nii.gz")
    cases = find_cases("pairs", tmp_path, "s/*/t1.nii.gz", "s/*/seg.nii.gz")
    assert [(c.case_id, c.label.parent.name) for c in cases] == [("p1", "p1"), ("p2", "p2")]
    cases = find_cases("pairs", tmp_path, "s/*/t1.nii.gz")
    assert [(c.case_id, c.label) for c in cases] == [("p1", None), ("p2", None)]


def test_pairs_single_case(tmp_path, monkeypatch):
    touch(tmp_path / "abdomen", "ct.nii.gz", "seg.nii.gz")
    expected = Case("abdomen", tmp_path / "abdomen/ct.nii.gz", tmp_path / "abdomen/seg.nii.gz")
    assert find_cases("pairs", tmp_path / "abdomen", "ct.nii.gz", "seg.nii.gz") == [expected]
    monkeypatch.chdir(tmp_path / "abdomen")
    assert find_cases("pairs", ".", "ct.nii.gz", "seg.nii.gz")[0].case_id == "abdomen"
    with pytest.raises(UserError, match="label of abdomen"):
        find_cases("pairs", ".", "ct.nii.gz", "none.nii.gz")


@pytest.mark.parametrize(
    "globs, message",
    [
        ((None, None), "needs an image_glob"),
        (("a/*.nii", "b.nii"), "must both hold one"),
        (("*/*.nii", "b/*.nii"), "at most one"),
        (("**/a.nii", "b/*.nii"), "at most one"),
        (("../*.nii", "b/*.nii"), "without"),
        (("/*.nii", "b/*.nii"), "relative"),
        (("im?/*.nii", "b/*.nii"), "at most one"),
        (("x/*.nii", "b/*.nii"), "no images found"),
    ],
)
def test_pairs_problems(tmp_path, globs, message):
    with pytest.raises(UserError, match=message):
        find_cases("pairs", tmp_path, *globs)
    with pytest.raises(UserError, match=r"needs an image_glob|does not exist"):
        find_cases("pairs", tmp_path / "none", *globs)


@given(st.text(max_size=30) | st.text("äعक्षि病 ", max_size=120))
def test_case_ids_are_safe(text):
    try:
        case_id = safe_case_id(text)
    except UserError:
        assert not text.strip(".") or len(text.encode(errors="surrogatepass")) > 255
    else:
        assert safe_case_id(case_id) == case_id  # what a list of ours names is found again
        assert re.fullmatch(r"[\w.-]+", re.sub(r"[^\x00-\x7f]", "a", case_id), re.ASCII)
        assert all(unicodedata.category(c)[0] in "LMN" or c in "_.-" for c in case_id)
        assert not case_id.startswith(".") and len(case_id.encode()) <= 200
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, text)
            if len(other.encode(errors="surrogatepass")) <= 255:
                assert safe_case_id(other) == case_id


def cases_of(ids):
    return [Case(str(i), f"{i}.nii", f"{i}-seg.nii") for i in ids]


def ids_of(cases):
    return [case.case_id for case in cases]


def test_btcv_split():
    ids = [f"{i:04d}" for i in (*range(1, 11), *range(21, 41))]
    train, validation, test = split_cases(cases_of(ids), "btcv_18_12")
    assert [int(i) for i in ids_of(train)] == list(BTCV_TRAIN) and len(train) == 18
    assert validation == []
    assert [int(i) for i in ids_of(test)] == list(BTCV_TEST) and len(test) == 12
    assert sorted(ids_of(train) + ids_of(test)) == ids
    with pytest.raises(UserError, match="not in the data: 40, 5"):
        split_cases(cases_of(set(ids) - {"0005", "0040"}), "btcv_18_12")


def test_btcv_split_of_the_release():
    ids = [f"{i:04d}" for i in (*range(1, 11), *range(21, 41))]
    train, validation, test = split_cases(cases_of(ids), "btcv_18_6_6")
    assert [int(i) for i in ids_of(train)] == list(BTCV_TRAIN)
    assert [int(i) for i in ids_of(validation)] == list(BTCV_VALIDATION_6)
    assert [int(i) for i in ids_of(test)] == list(BTCV_TEST_6)
    assert len(validation) == len(test) == 6
    assert sorted(BTCV_VALIDATION_6 + BTCV_TEST_6) == list(BTCV_TEST)
    with pytest.raises(UserError, match="not in the data: 36"):
        split_cases(cases_of(set(ids) - {"0036"}), "btcv_18_6_6")


def test_file_split(tmp_path):
    file = tmp_path / "split.json"

    def split(value):
        file.write_text(json.dumps(value))
        return split_cases(cases_of(["a", "b", "0007"]), "file", file=file)

    train, validation, test = split({"train": [7, "a"], "test": ["b"]})
    assert (ids_of(train), validation, ids_of(test)) == (["0007", "a"], [], ["b"])
    parts = split({"validation": ["a"], "train": [7], "test": ["b"]})
    assert list(map(ids_of, parts)) == [["0007"], ["a"], ["b"]]
    for double in ({"train": ["a"], "test": ["b"]}, {"train": [7], "test": ["a"]}):
        with pytest.raises(UserError, match="twice, which would leak: a"):
            split(double | {"validation": ["a"]})
    with pytest.raises(UserError, match="not in the data: c"):
        split({"train": ["a"], "test": ["c"]})
    with pytest.raises(UserError, match="twice, which would leak: 7"):
        split({"train": ["a", 7], "test": ["0007"]})
    with pytest.raises(UserError, match="twice"):
        split({"train": ["a", "a"], "test": ["b"]})
    for bad in (
        [],
        {"train": ["a"]},
        {"train": ["a"], "test": []},
        {"train": "a", "test": ["b"]},
        {"train": ["a"], "test": [None]},
        {"train": ["a"], "test": ["b"], "val": ["a"]},
        {"train": ["a"], "test": ["b"], "validation": []},
        {"train": ["a"], "test": ["b"], "validation": 7},
        {"train": ["a"], "validation": ["b"]},
    ):
        with pytest.raises(UserError, match="must be"):
            split(bad)
    with pytest.raises(UserError, match="cannot be read"):
        split_cases(cases_of("ab"), "file", file=tmp_path / "none.json")
    with pytest.raises(UserError, match="leading zeros"):
        split_cases(cases_of(["1", "01"]), "fraction", test_fraction=0.5)


@given(st.integers(2, 20), st.floats(0.01, 0.99), st.integers(0, 9))
def test_fraction_split(count, fraction, seed):
    cases = cases_of(range(count))
    train, validation, test = split_cases(cases, "fraction", test_fraction=fraction, seed=seed)
    assert sorted(ids_of(train + test)) == sorted(ids_of(cases)) and train and test
    assert validation == []
    assert len(test) == min(max(round(fraction * count), 1), count - 1)
    again = split_cases(cases[::-1], "fraction", test_fraction=fraction, seed=seed)
    assert again == (train, [], test)


@given(st.integers(3, 20), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(0, 9))
def test_fraction_split_with_validation(count, fraction, held_out, seed):
    cases, settings = cases_of(range(count)), {"test_fraction": fraction, "seed": seed}
    wanted = [max(round(part * count), 1) for part in (held_out, fraction)]
    if sum(wanted) >= count:
        with pytest.raises(UserError, match="leave one of the"):
            split_cases(cases, "fraction", validation_fraction=held_out, **settings)
        return
    parts = split_cases(cases, "fraction", validation_fraction=held_out, **settings)
    assert sorted(i for part in parts for i in ids_of(part)) == sorted(ids_of(cases))
    assert list(map(len, parts[1:])) == wanted and parts[0]
    assert parts[2] == split_cases(cases, "fraction", **settings)[2]  # the same test cases
    again = split_cases(cases[::-1], "fraction", validation_fraction=held_out, **settings)
    assert again == parts


def test_other_splits():
    cases = cases_of("abcdefghij")
    drawn = {
        tuple(ids_of(split_cases(cases, "fraction", test_fraction=0.3, seed=s)[2]))
        for s in range(5)
    }
    assert len(drawn) > 1
    assert split_cases(cases, "within_volume") == (cases, [], cases)
    for fraction in (None, 0, 1, 2):
        with pytest.raises(UserError, match="0 < test_fraction < 1"):
            split_cases(cases, "fraction", test_fraction=fraction)
    with pytest.raises(UserError, match="within_volume"):
        split_cases(cases[:1], "fraction", test_fraction=0.5)
    for held_out in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"must lie in \[0, 1\)"):
            split_cases(cases, "fraction", test_fraction=0.3, validation_fraction=held_out)
    with pytest.raises(UserError, match="which split 'within_volume' does not use"):
        split_cases(cases, "within_volume", validation_fraction=0.2)
    with pytest.raises(UserError, match="unknown split"):
        split_cases(cases, "random")


def test_nothing_is_dropped_without_a_count(tmp_path, recwarn):
    """Neither what is no volume, nor a test image without a label."""
    write_nnunet(tmp_path, ("a", "b"), ("c", "d"), labeled_tests=False)
    (tmp_path / "imagesTr" / "notes.txt").write_text("x")
    (tmp_path / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"x")
    assert [case.case_id for case in find_cases("nnunet", tmp_path)] == ["a", "b"]
    said = " ".join(str(warning.message) for warning in recwarn)
    assert "2 entries of imagesTr skipped: 1 hidden file" in said and "notes.txt" in said
    assert "2 image(s)" in said
