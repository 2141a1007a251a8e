"""Lists, JSON and names of files that are made to harm: sound, or refused in one sentence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax import verify as program
from pgpsam_jax.config import defaults, serialization
from pgpsam_jax.data import fewshot_list
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.layouts import cases, find, groups, label_table, nnunet, split, transunet
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import sanitize
from tests.support.layout_data import NNUNET
from tests.support.refusal import refuse
from tests.support.small_run import TABLE, write_data


def nnunet_folder(root, text: str):
    (root / "imagesTr").mkdir(parents=True, exist_ok=True)
    (root / "labelsTr").mkdir(exist_ok=True)
    (root / "dataset.json").write_text(text, encoding="utf-8")
    return root


def transunet_folder(root, lines: str):
    (root / "train_npz").mkdir(parents=True, exist_ok=True)
    (root / "train_npz" / "a_slice0.npz").write_bytes(b"")
    (root / "train.txt").write_text(lines, encoding="utf-8", newline="")
    return root


def split_of(file):
    cases = [Case(i, Path(i), Path(i)) for i in "ab"]
    return split.split_cases(cases, "file", file=file)


def test_marks_and_line_ends_of_windows_are_read(tmp_path):
    """A byte order mark and CRLF, as Notepad writes them."""
    path = tmp_path / "list"
    made = fewshot_list.make_list({"a": np.full((9, 2), 500)}, "random", count=3)
    made.write(path)
    text = path.read_text().replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert fewshot_list.read_list(path) == made and fewshot_list.read_list(path).rule == made.rule
    root = transunet_folder(tmp_path / "t", "\ufeffa_slice0\r\n")
    assert [case.case_id for case in transunet.scan(root).cases] == ["a"]
    for value, read in (
        (TABLE, label_table.load_label_table),
        ({"train": ["a"], "test": ["b"]}, split_of),
    ):
        path.write_bytes(
            b"\xef\xbb\xbf" + json.dumps(value, indent=1).replace("\n", "\r\n").encode()
        )
        assert read(path)
    text = "\ufeff" + json.dumps(NNUNET, indent=1).replace("\n", "\r\n")
    assert nnunet.label_table(nnunet_folder(tmp_path / "n", text)).num_classes == 3


READERS = {
    "few-shot list": fewshot_list.read_list,
    "label table": label_table.load_label_table,
    "split": split_of,
    "groups": groups.read_groups,
    "TransUNet": lambda path: transunet.scan(path.parent),
    "nnU-Net": lambda path: nnunet.label_table(path.parent),
}
NAMES = {"TransUNet": "train.txt", "nnU-Net": "dataset.json"}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, kind):
    """A pipe would block for ever and /dev/zero never ends."""
    transunet_folder(tmp_path, "")
    path = tmp_path / NAMES.get(kind, "text")
    makers = (os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p))
    for make in makers:
        path.unlink(missing_ok=True)
        make(path)
        if kind == "TransUNet":  # no list: the folder counts
            assert READERS[kind](path).cases[0].case_id == "a"
        else:
            refuse(READERS[kind], path, "read|not found")
        path.rmdir() if path.is_dir() else path.unlink()


names = st.text(max_size=6) | st.sampled_from(["..", "/a", "a\0", "a" * 300, "spleen", "ignore"])
numbers = st.integers() | st.sampled_from([-1, 0, 1, 6, 256, 10**30]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoilt(draw, sound):
    """A sound value of which up to three parts are replaced by anything."""
    value = {"it": json.loads(json.dumps(sound))}
    for _ in range(draw(st.integers(0, 3))):
        place, key = value, "it"
        while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            options = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(options)))
        place[key] = draw(values)
    return value["it"]


TABLES = spoilt({**TABLE, "background": [3], "classes": [*TABLE["classes"]]})
DESCRIPTIONS = spoilt(
    NNUNET
    | {"dataset": {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}}
)
SPLITS = spoilt({"train": ["a"], "test": ["b"], "validation": []})


def sound_or_refused(read, path):
    """The value that a reader gives; None where it refuses, in one sentence."""
    try:
        return read(path)
    except UserError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 2000, said
        return None


def text_of(value) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=100, deadline=None)
@given(TABLES | values)
def test_any_label_table_is_sound_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "table.json"
    path.write_bytes(text_of(value))
    table = sound_or_refused(label_table.load_label_table, path)
    if table is not None:
        assert label_table.LabelTable.from_json(table.to_json()) == table
        ids = np.array(sorted(table.source_to_class), np.int32)
        classes = table.remap(ids, "x")
        assert classes.max() < table.num_classes and set(classes) == set(range(table.num_classes))


@settings(max_examples=100, deadline=None)
@given(DESCRIPTIONS | values)
def test_any_description_of_nnunet_is_sound_or_refused(tmp_path_factory, value):
    root = nnunet_folder(tmp_path_factory.getbasetemp() / "nnunet", json.dumps(value))
    table = sound_or_refused(nnunet.label_table, root)
    assert table is None or 2 <= table.num_classes <= 255
    listing = sound_or_refused(nnunet.scan, root)
    for case in listing.cases if listing is not None else ():
        for file in (case.image, case.label):
            assert file is None or root in file.parents
            assert file is None or (".." not in file.parts and not file.is_file())


@settings(max_examples=70, deadline=None)
@given(SPLITS | values)
def test_any_split_file_is_sound_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "split.json"
    path.write_bytes(text_of(value))
    parts = sound_or_refused(split_of, path)
    if parts is not None:
        ids = [case.case_id for part in parts for case in part]
        assert len(set(ids)) == len(ids) <= 2 and parts[0] and parts[2]


@settings(max_examples=70, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode(errors="replace")))
def test_any_bytes_as_text_are_sound_or_refused(tmp_path_factory, data):
    root = transunet_folder(tmp_path_factory.getbasetemp() / "bytes", "")
    path = root / "text"
    for head in (b"", b"# rule: ", b"a\t1\n", b'{"classes": ', b'{"train": [', b"\xef\xbb\xbf"):
        path.write_bytes(head + data)
        for read in (label_table.load_label_table, split_of):
            assert sound_or_refused(read, path) is None
        found = sound_or_refused(fewshot_list.read_list, path)
        for case_id, index in found.entries if found is not None else ():
            assert cases.safe_case_id(case_id) == case_id and 0 <= index < 10**6
        (root / "train.txt").write_bytes(head + data)
        sound_or_refused(transunet.scan, root)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"classes": [], "classes": [{"name": "a", "source": [1]}]}', "'classes' appears twice"),
        ('{"classes": [{"name": "a", "name": "b", "source": [1]}]}', "'name' appears twice"),
        ('{"classes": [{"name": "a", "source": [%s]}]}' % ("9" * 5000), "cannot be read as JSON"),
        ('{"classes": [{"name": "a", "source": [%s]}]}' % ("9" * 4000), "integers in 0..65535"),
        ('{"classes": [{"name": "a", "source": [NaN]}]}', "must be an integer"),
        ('{"classes": [{"name": "a", "source": [1e400]}]}', "must be an integer"),
        ('{"classes": [{"name": "a\\nb", "source": [1]}]}', "control characters"),
        ('{"classes": [{"name": "%s", "source": [1]}]}' % ("a" * 100), "over 80 characters"),
        (
            json.dumps({"classes": [{"name": f"c{i}", "source": [i + 1]} for i in range(300)]}),
            "1 to 254 named classes, got 301",
        ),
    ],
)
def test_label_tables_made_to_harm(tmp_path, text, said):
    path = tmp_path / "table.json"
    path.write_text(text)
    refuse(label_table.load_label_table, path, said)


def test_descriptions_of_nnunet_made_to_harm(tmp_path):
    """Found here: a name of 5000 digits was taken for a number, as version 1 wrote them."""
    for text, said in {
        '{"background": 0, "a": 1, "a": 2}': "'a' appears twice",
        '{"background": 0, "%s": "liver"}' % ("9" * 5000): "not one id",
        '{"background": 0, "liver": 1.5}': "not one id",
        '{"background": 0, "liver": 70000}': "integers in 0..65535",
    }.items():
        root = nnunet_folder(tmp_path, f'{{"labels": {text}}}')
        with pytest.raises(UserError, match=said) as caught:
            nnunet.label_table(root)
        assert "dataset.json" in str(caught.value) and len(str(caught.value)) < 500


def test_names_of_files_cannot_forge_lines(tmp_path, capsys):
    """Control characters, bytes that are no text, and names too long for the system."""
    root = write_data(tmp_path, ("a", "b\nok       images", "c\x1b[31m", os.fsdecode(b"d\xff")))
    table = label_table.load_label_table(root / "table.json")
    report = program.verify(
        root, image_glob="images/*.nii.gz", label_glob="labels/*.nii.gz", table=table
    )
    assert report["counts"]["cases"] == 4 and report["counts"]["errors"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("ok")]) == 6
    of_name = [line for line in lines if "is not UTF-8" in line]
    assert len(of_name) == 2 and all(line.startswith("warning") for line in of_name)
    assert all(line.isprintable() for line in lines)
    assert any("c\\x1b[31m" in line for line in lines) and any("d\\udcff" in line for line in lines)
    assert sanitize("a" * 200) == "a" * 100 + "..." and sanitize("\n", 1) == "\\n"


def test_links_in_a_data_folder(tmp_path):
    """Links to other disks are how data are kept; rings, pipes and devices are refused."""
    real, root = write_data(tmp_path / "real", ("a",)), tmp_path / "root"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
        (root / kind / "a.nii.gz").symlink_to(real / kind / "a.nii.gz")
    (root / "images" / "loop").symlink_to(root / "images")
    globs = {"image_glob": "images/*.nii.gz", "label_glob": "labels/*.nii.gz"}
    (case,) = find.find_cases("pairs", root, *globs.values())
    assert read_image(case.image).array.shape == (10, 20, 24)
    makers = (lambda p: p.symlink_to(p), os.mkfifo, lambda p: p.symlink_to("/dev/zero"))
    for make in makers:
        path = root / "images" / "b.nii.gz"
        make(path)
        refuse(read_image, path, "is not a file")
        with pytest.raises(UserError, match="label of b is missing"):  # it is not passed over
            find.find_cases("pairs", root, *globs.values())
        path.unlink()
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_image(root / ("a" * 300 + ".nii.gz"))


def test_long_names_in_lists_are_refused(tmp_path):
    """The system knows no names of over 255 characters: asking for one is an error of its own."""
    long = "a" * 300
    with pytest.raises(UserError, match="not a plain file name"):
        transunet.scan(transunet_folder(tmp_path, f"{long}_slice0\n"))
    cases = {"one": {"images": [f"imagesTr/{long}"], "label": "labelsTr/a"}}
    for listed, said in (
        (cases, "not a path inside"),
        ({long: cases["one"]}, "cannot make a case id"),
    ):
        root = nnunet_folder(tmp_path / "n", json.dumps(NNUNET | {"dataset": listed}))
        with pytest.raises(UserError, match=said):
            nnunet.scan(root)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", None),
        ("seed", True),
        ("seed", [1]),
        ("seed", "many"),
        ("train.batch_size", None),
        ("model.cfm", 1),
        ("model.stage_taps", ["a"]),
        ("model.stage_taps", 3),
        ("data.window", [0, None]),
        ("data", 5),
        ("data", {"unknown": 1}),
        ("fewshot.count", True),
        ("train.ce_weight", float("nan")),
        ("optim.learning_rate", float("inf")),
        ("data.window", [float("-inf"), 1.0]),
        ("train.batch_size", 0),
        ("mesh.data", -2),
    ],
    ids=str,
)
def test_a_stored_configuration_of_other_types(tmp_path, field, value):
    stored = serialization.to_json(defaults.default_config())
    *parts, name = field.split(".")
    place = stored
    for part in parts:
        place = place[part]
    place[name] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError) as caught:
        serialization.load_config(tmp_path)
    said = str(caught.value)
    assert str(tmp_path / "config.json") in said and len(said) < 600


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, '{"seed": 1, "seed": 2}', "\0"],
)
def test_a_stored_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        serialization.load_config(tmp_path)
