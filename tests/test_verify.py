"""`python -m pgpsam_jax.verify`: every fault of a data set is found and named; none stops it."""

import gzip
import json
import re
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import verify as program
from pgpsam_jax.data import dataset
from pgpsam_jax.data.io import array_checks
from pgpsam_jax.data.layouts.label_table import SYNAPSE8, LabelTable, load_label_table
from pgpsam_jax.data.quality import verification
from pgpsam_jax.data.quality.verification import findings_of, verify_run_data
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import worker_pool
from tests.reference.golden.make_phantom_anatomy import FILE
from tests.support.data_faults import FAULTS, change, cut, moved, spoiled, two_affines, voxels
from tests.support.label_orders import CASCADE, SAMED, TABLES, renumbered
from tests.support.places import REPOSITORY, shared
from tests.support.small_run import config_for, write_data

PAIRS = {"image_glob": "images/*.nii.gz", "label_glob": "labels/*.nii.gz"}


@pytest.fixture
def root(tmp_path):
    return write_data(tmp_path)


def check(root, **options):
    """The report of a folder of pairs and the lines said."""
    lines = []
    options = PAIRS | {"table": load_label_table(root / "table.json")} | options
    return program.verify(root, say=lines.append, **options), lines


def codes(report):
    """{(level, code, file name)} of all findings."""
    found = findings_of(report)
    return {(f["level"], f["code"], f["file"].rsplit("/", 1)[-1]) for f in found}


def test_a_sound_data_set(root, capsys):
    report, lines = check(root)
    assert report["counts"] == {"files": 6, "cases": 3, "errors": 0, "warnings": 0}
    assert [line[:9] for line in lines[:6]] == ["ok       "] * 6
    assert "images/a.nii.gz: 10 x 20 x 24 voxels of 4 x 2 x 1.5 mm" in lines[0]
    assert lines[-1].startswith("6 files of 3 cases") and str(root) not in "".join(lines)
    assert report["order"]["verdict"] == "unclear"  # two organs are too few
    file = report["files"][1]
    assert (file["kind"], file["shape"], file["orientation"]) == ("label", [10, 20, 24], "LPS")
    assert set(file["voxels"]) == {"0", "1", "6"}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_and_the_rest_is_still_checked(root, fault):
    folder, spoil, level, code, text = FAULTS[fault]
    path = root / folder / "b.nii.gz"
    spoil(path)
    report, lines = check(root)
    found = [f for f in findings_of(report) if f["code"] == code]
    assert found and found[0]["level"] == level and text in found[0]["message"], report
    name = path if fault != "no file" else root / "images" / "b.nii.gz"
    assert found[0]["file"] == str(name) and str(path) not in found[0]["message"]
    assert len(lines) >= report["counts"]["files"] + 2  # a line each, nothing stopped
    of_others = [f for file in report["files"] if file["case"] != "b" for f in file["findings"]]
    assert of_others == []
    lines = [line for line in lines if line.startswith(level) and name.name in line]
    assert len([line for line in lines if text in line]) >= 1
    assert not any("\n" in line for line in lines)


def test_several_faults_in_one_line(root):
    spoiled(np.nan)(root / "images" / "a.nii.gz")
    two_affines(root / "labels" / "a.nii.gz")
    change(root / "labels" / "a.nii.gz", voxels(root / "labels" / "a.nii.gz") + 0.3)
    cut(root / "labels" / "c.nii.gz")
    report, lines = check(root)
    assert codes(report) >= {
        ("error", "not_finite", "a.nii.gz"),
        ("error", "not_integer", "a.nii.gz"),
        ("error", "damaged", "c.nii.gz"),
    }
    assert sum(line.startswith("error") for line in lines[:6]) == 3


def test_unknown_label_values(root):
    (root / "table.json").write_text(
        json.dumps({"classes": [{"name": "liver", "source": [6]}, {"name": "x", "source": [1]}]})
    )
    for value in (3, -2, 70000):
        array = voxels(root / "labels" / "b.nii.gz", np.int32)
        array[0, 0, :2] = value
        change(root / "labels" / "b.nii.gz", array)
        report, _ = check(root)
        (finding,) = findings_of(report)
        assert finding["code"] == "unknown_label"
        assert f"{value} (2 voxels)" in finding["message"]


def test_the_same_voxels_twice(root):
    """Packed anew, and stored in another type and along other axes: still the same image."""
    image = nib.load(root / "images" / "a.nii.gz")
    turned = nib.as_closest_canonical(image)
    turned = nib.Nifti1Image(np.asarray(turned.dataobj, np.float32), turned.affine)
    (root / "images" / "d.nii.gz").write_bytes(gzip.compress(turned.to_bytes(), 1))
    shutil.copy(root / "labels" / "a.nii.gz", root / "labels" / "d.nii.gz")
    report, lines = check(root)
    assert codes(report) == {
        ("error", "duplicate", "d.nii.gz"),
        ("warning", "duplicate", "d.nii.gz"),
    }
    assert any("has the same voxels as images/a.nii.gz; keep only one" in line for line in lines)
    split = root / "split.json"
    split.write_text(json.dumps({"train": ["a", "b"], "test": ["c", "d"]}))
    report, _ = check(root, split="file", split_file=split)
    assert codes(report) == {("error", "duplicate", "d.nii.gz")}
    assert all("one in train and one in test" in f["message"] for f in findings_of(report))


def test_a_patient_in_both_splits(root):
    split = root / "split.json"
    split.write_text(json.dumps({"train": ["a", "b"], "test": ["b", "c"]}))
    report, _ = check(root, split="file", split_file=split)
    (finding,) = report["data_set"]
    assert finding["level"] == "error" and "twice, which would leak: b" in finding["message"]


def test_without_a_table_the_ids_are_guessed(root):
    report, lines = check(root, table=None, layout="pairs")
    assert codes(report) == {("error", "no_table", "")}
    assert any(line.startswith("error") and '"classes"' in line for line in lines)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_nothing(root, count):
    cut(root / "images" / "b.nii.gz")
    assert check(root)[0] | {"seconds": 0} == check(root, workers=count)[0] | {"seconds": 0}


def test_the_program(root, capsys):
    arguments = ["--data", str(root), "--label-table", str(root / "table.json")]
    arguments += ["--image-glob", PAIRS["image_glob"], "--label-glob", PAIRS["label_glob"]]
    report = root / "out" / "verify.json"
    assert program.main([*arguments, "--report", str(report)]) == 0
    moved(root / "labels" / "b.nii.gz")
    assert program.main(arguments) == 0  # a warning
    cut(root / "images" / "b.nii.gz")
    assert program.main([*arguments, "--report", str(report)]) == 1
    stored = json.loads(report.read_text())
    assert stored["schema"] == 3 and stored["layout"] == "pairs" and stored["root"] == str(root)
    assert stored["counts"]["errors"] == 1 and len(stored["files"]) == 6
    assert "error    images/b.nii.gz: is damaged" in capsys.readouterr().out
    for wrong in (
        ["--data", str(root / "none")],
        ["--data", str(root)],
        ["--data", str(root), "--layout", "pairs"],
        ["--data", str(root), "--layout", "dicom"],
        [*arguments, "--label-table", str(root / "none.json")],
        [*arguments, "--report", str(root / "table.json" / "x.json")],
        [*arguments, "--workers", "-3"],
    ):
        with pytest.raises(SystemExit) as ended:
            program.main(wrong)
        assert ended.value.code == 2
        assert "error: " in (said := capsys.readouterr().err) and "Traceback" not in said


def test_a_killed_process_speaks_of_the_program_s_own_setting():
    kill = worker_pool.map_in_order(
        signal.raise_signal, [signal.SIGKILL], 1, verification._CHECKING
    )
    with pytest.raises(UserError, match=r"checks cases was killed \(signal 9\).* set --workers to"):
        list(kill)


def split_of(root):
    return dataset.find_split(config_for(root).data)


def test_a_run_checks_its_data_once(root, tmp_path, monkeypatch):
    workdir, config, said = tmp_path / "run", config_for(root), []
    report = verify_run_data(config.data, split_of(root), workdir, say=said.append)
    assert report["counts"]["cases"] == 3 and said == ["checked 3 of 3 cases: 0 errors, 0 warnings"]
    assert json.loads((workdir / "verify.json").read_text()) == json.loads(json.dumps(report))
    assert {file["part"] for file in report["files"]} == {"train", "test"}

    seen, original = [], verification.check_case
    monkeypatch.setattr(
        verification, "check_case", lambda case, *a: seen.append(case.case_id) or original(case, *a)
    )
    again = verify_run_data(config.data, split_of(root), workdir, say=said.append)
    assert seen == [] and len(said) == 1 and again["counts"] == report["counts"]
    moved(root / "labels" / "b.nii.gz")
    verify_run_data(config.data, split_of(root), workdir, say=said.append)
    assert seen == ["b"] and said[1] == "checked 1 of 3 cases: 0 errors, 1 warnings"
    assert re.match(r"warning: .*/labels/b\.nii\.gz lies up to 5\.00 mm off", said[2])

    (workdir / "cache" / "verified.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        verify_run_data(config.data, split_of(root), workdir, say=said.append)
    assert seen == ["b", "a", "b", "c"]


def test_a_run_on_bad_data_is_refused(root, tmp_path):
    config = config_for(root)
    spoiled(np.nan)(root / "images" / "c.nii.gz")
    for _ in range(2):  # and remembered
        with pytest.raises(UserError, match=r"has errors: .*c\.nii\.gz holds NaN.*verify"):
            verify_run_data(config.data, split_of(root), tmp_path / "run", say=lambda line: None)
    stored = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert stored["counts"]["errors"] == 1


def test_a_window_that_shows_nothing_is_refused(root, tmp_path):
    config = config_for(root, data__window=(5000.0, 9000.0))
    with pytest.raises(UserError, match=r"almost all .* data\.window \(.*\); set data\.window"):
        verify_run_data(config.data, split_of(root), tmp_path, say=lambda line: None)


def test_a_mixed_up_order_is_an_error_with_its_name(tmp_path):
    """Two phantoms whose labels follow CASCADE's order, read as TransUNet's."""

    stored = json.loads(FILE.read_text())
    records = [
        {
            "case": case,
            "part": "",
            "files": [],
            "features": renumbered(
                {int(i): f for i, f in stored[case]["eight"].items()}, TABLES[CASCADE]
            ),
        }
        for case in ("1", "2")
    ]
    names = TABLES[SAMED]
    table = LabelTable(("background", *names.values()), {i: i for i in names})
    report = verification.summarize(records, table)
    (finding,) = report["data_set"]
    assert (finding["level"], finding["code"]) == ("error", "order")
    assert CASCADE in finding["message"]
    assert "5 looks like pancreas, not liver, 6 looks like liver, not stomach" in finding["message"]
    assert verification.summarize(records, SYNAPSE8)["order"]["order"] == CASCADE


@pytest.mark.golden
@pytest.mark.parametrize(
    "table, verdict", [("abdomen_ct", "consistent"), ("four_organs", "mixed_up")]
)
def test_a_real_ct_with_other_structures(table, verdict):
    """59 structures, of which a table lists eight; another takes the stomach for the liver."""
    report = program.verify(
        shared("data/abdomen_ct"),
        image_glob="ct.nii.gz",
        label_glob="seg104.nii.gz",
        table=load_label_table(REPOSITORY / "configs" / "labels" / f"{table}.json"),
        say=lambda line: None,
    )
    assert report["order"]["verdict"] == verdict and report["counts"]["warnings"] == 0
    assert (report["counts"]["errors"] > 0) == (verdict == "mixed_up")


def test_another_file_is_no_place_for_the_report(root, tmp_path, capsys):
    arguments = ["--data", str(root), "--layout", "pairs", "--image-glob", "images/*.nii.gz"]
    for name, content in (("mine.json", "{}"), ("notes.txt", "mine")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit):
            program.main([*arguments, "--report", str(tmp_path / name)])
        assert "is not a report of verify" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content
    with pytest.raises(SystemExit):
        program.main([*arguments, "--report", str(tmp_path)])
    assert "is a folder" in capsys.readouterr().err
    for _ in range(2):  # its own report it replaces
        program.main([*arguments, "--report", str(tmp_path / "report.json")])


@pytest.mark.parametrize(
    "said, wanted",
    [
        ("choose another data.split", "choose another --split"),
        ("set data.window to it", "set --window to it"),
        ("needs an image_glob such as", "needs an --image-glob such as"),
        ("set data.label_table to it", "set --label-table to it"),
        ("/x/image_glob/a.nii and split", "/x/image_glob/a.nii and split"),
    ],
)
def test_flags_are_named_as_they_are_spelled(said, wanted):
    assert program.with_flag_names(said) == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_the_largest_volume_is_a_setting(root, workers, monkeypatch):
    """Refused with the setting and what it takes; the processes have the same limit."""
    monkeypatch.setattr(array_checks, "_allowed", 1e-6)
    report = check(root, workers=workers)[0]
    sizes = [f for f in findings_of(report) if f["code"] == "size"]
    assert len(sizes) == 6
    assert "(--max-gib of predict and verify) to 1, which takes 3 GiB" in sizes[0]["message"]
    if workers:
        return  # what starts a process twice
    array_checks.allow(1e-3)
    assert not [f for f in findings_of(check(root, workers=workers)[0]) if f["code"] == "size"]
