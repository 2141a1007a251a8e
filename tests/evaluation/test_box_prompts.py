"""`predict` with boxes: masks, Dice, what is recorded, and flags that do not fit together."""

import csv
import json
import sys

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax.data.boxes import COLUMNS
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import box_prompts
from pgpsam_jax.evaluation.masks import RECORD
from tests.support.echo_sam import Echo

TABLE = {"liver": 4, "spleen": 9}  # source ids


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two images, labels that are rectangles, a label table, and weights that nobody reads."""
    monkeypatch.setattr(box_prompts.SamPredictor, "from_pretrained", lambda base: Echo())
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for stem in ("a", "b"):
        image = rng.uniform(0, 100, (6, 5, 4)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[1:3, 0:2, 1:3], label[3:5, 3:5, 2] = 4, 9
        affine = np.diag([-2.0, 2, 3, 1])
        nib.save(nib.Nifti1Image(image, affine), tmp_path / "images" / f"{stem}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), tmp_path / "labels" / f"{stem}.nii.gz")
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    (tmp_path / "base.safetensors").write_bytes(b"weights")
    return tmp_path


def run(folder, monkeypatch, *flags, **paths):
    """Runs the command; `paths` are flags whose values are in `folder`."""
    paths = {"base": "base", "input": "images", "output": "masks"} | paths
    files = [f"--{k.replace('_', '-')}={folder / v}" for k, v in paths.items() if v]
    monkeypatch.setattr(sys, "argv", ["predict", *files, *flags])
    predict.main()


def labels_of(folder, name):
    return np.asarray(nib.load(folder / name).dataobj)


def test_true_boxes(folder, monkeypatch, capsys):
    run(folder, monkeypatch, "--widen=0", boxes_from="labels", label_table="table.json")
    said = capsys.readouterr().out
    assert "mean over 2 volume(s); ORACLE" in said
    assert "| liver  |            1.000 |                   1.000 |" in said
    for stem in ("a", "b"):
        truth = labels_of(folder, f"labels/{stem}.nii.gz")
        found = labels_of(folder, f"masks/{stem}_0000.nii.gz")
        assert np.array_equal(found, (truth == 4) + 2 * (truth == 9))
    record = json.loads((folder / "masks" / RECORD).read_text())
    assert all(box_prompts.ORACLE in entry["warnings"] for entry in record["files"].values())
    assert all("ORACLE" in run["workdir"] for run in record["runs"].values())
    with open(folder / "masks/dice.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["organ"]) for row in rows] == [
        (f"{stem}_0000.nii.gz", organ) for stem in "ab" for organ in TABLE
    ]
    assert {row[key] for row in rows for key in ("own", "on_top")} == {"1.0"}


def test_true_boxes_are_widened_by_a_pixel(folder, monkeypatch):
    run(folder, monkeypatch, boxes_from="labels", label_table="table.json")
    found = labels_of(folder, "masks/a_0000.nii.gz")
    assert np.array_equal(np.argwhere(found[..., 1] == 1).min(0), [0, 0])
    assert np.array_equal(np.argwhere(found[..., 1] == 1).max(0), [3, 2])


def test_a_table_of_boxes(folder, monkeypatch, capsys):
    """One volume has boxes, and the other a warning; a bad box fails its volume alone."""
    lines = [",".join(COLUMNS), "a_0000.nii.gz,spleen,3,4,3,4,2,2", "a_0000,liver,1,2,0,1,1,2"]
    (folder / "boxes.csv").write_text("\n".join(lines))
    run(folder, monkeypatch, boxes="boxes.csv")
    said = capsys.readouterr().out
    assert "b_0000.nii.gz: has no box" in said and "Dice" not in said and "ORACLE" not in said
    assert json.loads((folder / "masks/labels.json").read_text())["spleen"] == 1
    truth = labels_of(folder, "labels/a.nii.gz")
    assert np.array_equal(labels_of(folder, "masks/a_0000.nii.gz"), (truth == 9) + 2 * (truth == 4))
    assert not labels_of(folder, "masks/b_0000.nii.gz").any()

    (folder / "boxes.csv").write_text("\n".join([*lines, "b_0000,liver,1,2,0,9,1,2"]))
    paths = dict(boxes="boxes.csv", truth="labels", label_table="table.json", output="other")
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, **paths)
    said = capsys.readouterr()
    assert "b_0000.nii.gz has 6 x 5 x 4 voxels" in said.out
    assert "1 of 2 files could not be" in said.err
    assert "| liver  |            1.000 |" in said.out
    assert (folder / "other/a_0000.nii.gz").exists()
    assert not (folder / "other/b_0000.nii.gz").exists()


@pytest.mark.parametrize(
    ("changed", "other"),
    [("window", "--window=0,50"), ("widening", "--widen=2"), ("mirror", "--mirrored")],
)
def test_masks_of_other_settings_are_protected(folder, monkeypatch, capsys, changed, other):
    paths = dict(boxes_from="labels", label_table="table.json")
    run(folder, monkeypatch, **paths)
    run(folder, monkeypatch, **paths)
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, other, **paths)
    assert "masks of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "paths", "message"),
    [
        ([], {}, "give --workdir, a trained run, or --base with --boxes"),
        ([], {"workdir": "x", "boxes": "y"}, "not --workdir and --boxes"),
        ([], {"boxes": "x", "base": ""}, "--boxes needs --base"),
        (["--widen=1"], {"workdir": "x"}, "--widen is for --boxes"),
        (["--mirrored"], {"workdir": "x"}, "--mirrored is for --boxes"),
        ([], {"boxes_from": "labels", "truth": "labels"}, "leave out --truth"),
        (["--skip-existing"], {"boxes_from": "labels"}, "--skip-existing would"),
        (
            ["--overwrite"],
            {"boxes_from": "labels", "output": "labels", "label_table": "table.json"},
            "is the folder of the labels, which masks would replace",
        ),
        ([], {"boxes_from": "labels"}, "need a --label-table"),
        (["--widen=-1"], {"boxes_from": "labels"}, "cannot be widened by -1 pixels"),
        (["--widen=nan"], {"boxes_from": "labels"}, "cannot be widened by nan pixels"),
        ([], {"boxes_from": "labels/a.nii.gz", "label_table": "table.json"}, "is one label for 2"),
        ([], {"boxes_from": "lost", "label_table": "table.json"}, "has no label for a_0000"),
    ],
)
def test_flags_that_do_not_fit(folder, monkeypatch, capsys, flags, paths, message):
    (folder / "lost").mkdir()
    with pytest.raises(SystemExit):
        run(folder, monkeypatch, *flags, **paths)
    assert message in capsys.readouterr().err


def test_a_table_for_other_volumes(folder):
    (folder / "boxes.csv").write_text(f"{','.join(COLUMNS)}\nc,liver,1,2,0,1,1,2\n")
    with pytest.raises(UserError, match=r"has no box for a_0000\.nii\.gz"):
        box_prompts.open_box_run(
            [folder / "images/a_0000.nii.gz"],
            str(folder / "base"),
            output=folder / "masks",
            boxes=folder / "boxes.csv",
        )
