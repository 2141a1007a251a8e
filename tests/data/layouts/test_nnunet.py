"""The raw layout of nnU-Net: what is read of it, and what is refused."""

import json
import shutil

import pytest

from pgpsam_jax import verify as program
from pgpsam_jax.data import dataset
from pgpsam_jax.data.layouts import nnunet
from pgpsam_jax.data.layouts.find import detect, find_cases, scan
from pgpsam_jax.errors import UserError
from tests.support.layout_data import NNUNET, layout_config, write_nnunet


def describe(root, **fields):
    value = {k: v for k, v in (NNUNET | fields).items() if v is not None}
    (root / "dataset.json").write_text(json.dumps(value))


def ids_of(cases):
    return [(case.case_id, case.part) for case in cases]


def test_cases_and_classes(tmp_path):
    write_nnunet(tmp_path, cases=("b", "a_1"), tests=("t",))
    (tmp_path / "imagesTr" / "._b_0000.nii.gz").write_bytes(b"")
    (tmp_path / "labelsTr" / "notes.txt").write_text("")
    assert detect(tmp_path) == "nnunet"
    cases = find_cases("nnunet", tmp_path)
    assert ids_of(cases) == [("a_1", "train"), ("b", "train"), ("t", "test")]
    assert cases[0].image.name == "a_1_0000.nii.gz" and cases[0].label.name == "a_1.nii.gz"
    assert cases[2].label.parent.name == "labelsTs"
    table = nnunet.label_table(tmp_path)
    assert table.names == ("background", "spleen", "liver")
    assert table.source_to_class == {0: 0, 1: 1, 6: 2} and table.other == "error"
    describe(tmp_path, labels={"0": "background", "6": "liver", "1": "spleen"})  # version 1
    assert nnunet.label_table(tmp_path) == table
    describe(tmp_path, labels={"background": "0", "liver": "6", "spleen": "1"})
    assert nnunet.label_table(tmp_path) == table


def test_splits(tmp_path):
    write_nnunet(tmp_path, tests=("t", "u"))
    split = dataset.find_split(layout_config(tmp_path, "nnunet", data__split="given").data)
    assert ids_of(split.train) == [(i, "train") for i in "abc"]
    assert ids_of(split.test) == [("t", "test"), ("u", "test")]
    split = dataset.find_split(layout_config(tmp_path, "nnunet").data)  # fraction
    assert {case.case_id for case in split.train + split.test} == set("abc")
    write_nnunet(tmp_path / "x", tests=("t",), labeled_tests=False)
    assert ids_of(find_cases("nnunet", tmp_path / "x")) == [(i, "train") for i in "abc"]
    with pytest.raises(UserError, match="training and test cases of its own"):
        dataset.find_split(layout_config(tmp_path / "x", "nnunet", data__split="given").data)


def test_paths_in_the_description(tmp_path):
    write_nnunet(tmp_path)
    entry = {"images": ["imagesTr/a_0000.nii.gz"], "label": "./labelsTr/a.nii.gz"}
    describe(tmp_path, dataset={"one": entry}, numTraining=1)
    (case,) = find_cases("nnunet", tmp_path)
    assert case.case_id == "one" and case.image.is_file() and case.label.is_file()
    for path in ("../a.nii", "/etc/passwd", "x/../../y", "C:\\a", "..\\a", "", None, 3, "a\0b"):
        for bad in (entry | {"images": [path]}, entry | {"label": path}):
            describe(tmp_path, dataset={"one": bad})
            with pytest.raises(UserError, match="which is not a path inside the data set"):
                find_cases("nnunet", tmp_path)
    for bad in ({"one": []}, {"one": {}}, {"one": entry | {"images": ["a", "b"]}}, 7):
        describe(tmp_path, dataset=bad)
        with pytest.raises(UserError, match=r"dataset\.json"):
            find_cases("nnunet", tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, "exactly one channel"),
        ({"channel_names": None}, "exactly one channel"),
        ({"channel_names": ["CT"]}, "exactly one channel"),
        ({"file_ending": ".png"}, "convert the files"),
        ({"file_ending": ["x"]}, "convert the files"),
        ({"labels": None}, '"labels"'),
        ({"labels": [1]}, '"labels"'),
    ],
)
def test_descriptions_that_are_refused(tmp_path, fields, message):
    write_nnunet(tmp_path)
    describe(tmp_path, **fields)
    with pytest.raises(UserError, match=message) as caught:
        find_cases("nnunet", tmp_path)
    assert "dataset.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, "regions are not supported"),
        ({"background": 0, "a": 1, "ignore": 2}, "ignore label"),
        ({"a": 1}, '"background": 0'),
        ({"background": 1, "a": 0}, '"background": 0'),
        ({"background": 0, "a": 1, "b": 1}, "appears twice"),
        ({"0": "background", "1": "a", "2": "a"}, "appears twice"),
        ({"background": 0, "a": True}, "not one id"),
        ({"background": 0, "a": -1}, "must be integers"),
        ({"background": 0}, "named classes"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, message):
    describe(tmp_path, labels=labels)
    with pytest.raises(UserError, match=message) as caught:
        nnunet.label_table(tmp_path)
    assert "dataset.json" in str(caught.value)


def test_files_that_are_amiss(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json not found: expected the raw layout"):
        find_cases("nnunet", tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find_cases("nnunet", tmp_path)
    describe(tmp_path)
    with pytest.raises(UserError, match="no images found"):
        find_cases("nnunet", tmp_path)
    write_nnunet(tmp_path, tests=("t",))
    shutil.copy(tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "imagesTs")
    with pytest.raises(UserError, match="case a is in imagesTr and in imagesTs"):
        find_cases("nnunet", tmp_path)
    shutil.rmtree(tmp_path / "imagesTs")
    for name in ("b_0001.nii.gz", "c.nii.gz"):
        shutil.copy(tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "imagesTr" / name)
        with pytest.raises(UserError, match=r"does not end in _0000"):
            find_cases("nnunet", tmp_path)
        (tmp_path / "imagesTr" / name).unlink()
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(UserError, match="label of b is missing"):
        find_cases("nnunet", tmp_path)


def test_verified(tmp_path):
    write_nnunet(tmp_path, tests=("t",), labeled_tests=False, numTraining=5)
    shutil.copy(tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "imagesTs" / "t_0000.nii.gz")
    lines = []
    report = program.verify(tmp_path, say=lines.append)
    assert report["layout"] == "nnunet" and report["counts"]["files"] == 7
    assert {(f["code"], f["level"]) for f in report["data_set"]} == {("count", "warning")}
    assert any("one in train and one in test; keep only one of them" in line for line in lines)
    assert report["counts"]["errors"] == 1


def write_decathlon(root, cases=("organ_1", "organ_2"), tests=("organ_3",), **fields):
    """The same data named and described as in the Medical Segmentation Decathlon."""
    write_nnunet(root, cases, tests, labeled_tests=False)
    for path in root.glob("images*/*"):
        path.rename(path.with_name(path.name.replace("_0000.nii", ".nii")))
        (path.parent / f"._{path.name}").write_bytes(b"x")  # as its archives have them
    training = [
        {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases
    ]
    value = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen", "6": "liver"},
        "numTraining": len(cases),
        "training": training,
        "test": [f"./imagesTs/{case}.nii.gz" for case in tests],
    }
    (root / "dataset.json").write_text(json.dumps(value | fields))
    return root


def described(cases):
    return [(c.case_id, c.part, c.label and c.label.name) for c in cases]


def test_the_decathlon_is_read(tmp_path):
    root = write_decathlon(tmp_path)
    assert detect(root) == "nnunet"
    listing = scan("nnunet", root)
    assert described(listing.cases) == [
        ("organ_1", "train", "organ_1.nii.gz"),
        ("organ_2", "train", "organ_2.nii.gz"),
        ("organ_3", "test", None),
    ]
    assert not listing.findings and nnunet.label_table(root).names[1:] == ("spleen", "liver")
    assert [line.partition(" skipped")[0] for line in listing.skipped] == [
        "2 entries of imagesTr",
        "1 entry of imagesTs",
    ]
    report = program.verify(root, say=lambda line: None)
    assert report["counts"]["errors"] == 0 and report["counts"]["files"] == 5
    # Its list is what counts, where it names files that are there; else the folders do.
    value = json.loads((root / "dataset.json").read_text())

    def describe(**fields):
        (root / "dataset.json").write_text(json.dumps(value | fields))

    describe(training=value["training"][:1], numTraining=1)
    listing = scan("nnunet", root)
    assert described(listing.cases)[0][0] == "organ_1" and len(listing.cases) == 2
    assert "1 other volume (organ_2.nii.gz)" in listing.skipped[0]
    describe(training=[])
    assert [c.case_id for c in find_cases("nnunet", root)] == ["organ_1", "organ_2"]
    describe(modality={"0": "FLAIR", "1": "T1w"})
    with pytest.raises(UserError, match="must name exactly one channel"):
        find_cases("nnunet", root)


def test_which_of_the_two_layouts_it_is(tmp_path):
    """Names of the Decathlon may end in four digits; nnU-Net's first version has its list too."""
    root = write_decathlon(tmp_path / "a", cases=("c_0000", "c_0001"), training=[])
    assert [c.case_id for c in find_cases("nnunet", root)] == ["c_0000", "c_0001"]
    value = json.loads((root / "dataset.json").read_text())
    root = write_nnunet(tmp_path / "b", cases=("a", "b"))
    training = [{"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for c in "ab"]
    (root / "dataset.json").write_text(json.dumps(value | {"training": training}))
    cases = find_cases("nnunet", root)
    assert [(c.case_id, c.image.name) for c in cases] == [
        ("a", "a_0000.nii.gz"),
        ("b", "b_0000.nii.gz"),
    ]
    root = write_decathlon(tmp_path / "c")
    (root / "imagesTr" / "organ_2.nii.gz").unlink()
    (root / "imagesTr" / "organ_2.nii.gz").symlink_to("not fetched")
    report = program.verify(root, say=lambda line: None)
    (found,) = [f for file in report["files"] for f in file["findings"] if f["level"] == "error"]
    assert found["code"] == "missing" and "broken link" in found["message"]
