"""A folder of predicted masks: what is kept beside them, and whose files are never replaced."""

import csv
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import masks

RUN, OTHER = ({"workdir": f"runs/{name}", "parameters": name * 8} for name in "ab")
NAMES = ["background", "liver", "spleen"]


class Oracle:
    """Stands for a trained model: each voxel's class is written into its intensity."""

    preprocessing = Preprocessing(32, (0.0, 100.0))

    def __init__(self):
        self.seen = 0

    def __call__(self, volume):
        self.seen += 1
        return np.rint(volume.array / 10).astype(np.uint8)


@pytest.fixture
def images(tmp_path):
    """Two volumes of 2 x 3 x 4 voxels of 6 mm3: 5 of liver in both, 3 of spleen in `a`."""
    (tmp_path / "in").mkdir()
    for name, spleen in (("a", 3), ("b", 0)):
        array = np.zeros(24, np.int16)
        array[:5], array[5 : 5 + spleen] = 10, 20
        image = nib.Nifti1Image(array.reshape(2, 3, 4), np.diag([1.0, 2, 3, 1]))
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def go(images, output, run=RUN, names=NAMES, **options):
    """Predict a folder, or one file of it; how many volumes were looked at."""
    oracle = Oracle()
    assert (
        predict.predict(oracle, names, predict.find_inputs(images), output, run=run, **options) == 0
    )
    return oracle.seen


def refused(match, *arguments, **options):
    """Nothing is predicted, and no file of the output changes."""
    output = arguments[1]
    before = {p: p.read_bytes() for p in output.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=match) as caught:
        go(*arguments, **options)
    assert {p: p.read_bytes() for p in output.iterdir() if p.is_file()} == before
    return str(caught.value)


def test_what_is_kept_beside_the_masks(images, tmp_path, capsys):
    out = tmp_path / "out"
    warned = {"warnings_of": lambda volume: ["it is odd"] if (volume.array == 20).any() else []}
    assert go(images, out, **warned) == 2
    record = json.loads((out / "predictions.json").read_text())
    assert record["runs"] == {RUN["parameters"]: {"workdir": "runs/a", "labels": NAMES}}
    entry = record["files"]["a.nii.gz"]
    assert entry["voxels"] == {"liver": 5, "spleen": 3}
    assert entry["ml"] == {"liver": 0.03, "spleen": 0.018}
    assert entry["warnings"] == ["it is odd"] and record["files"]["b.nii.gz"]["warnings"] == []
    with open(out / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"file": "a.nii.gz", "liver (ml)": "0.03", "spleen (ml)": "0.018"}
    assert rows[1] == {"file": "b.nii.gz", "liver (ml)": "0.03", "spleen (ml)": "0.0"}
    assert json.loads((out / "labels.json").read_text()) == {n: i for i, n in enumerate(NAMES)}
    said = capsys.readouterr().out
    assert "warning: a.nii.gz: it is odd" in said and "b: liver 0.03 ml\n" in said
    assert f"2 masks in {out} " in said and "fail" not in said


def test_the_same_run_replaces_its_masks_or_keeps_them(images, tmp_path):
    out = tmp_path / "out"
    assert [go(images, out), go(images, out), go(images, out, skip_existing=True)] == [2, 2, 0]
    moved = shutil.move(out, tmp_path / "moved")
    (moved / "b.nii.gz").unlink()
    assert go(images, moved, skip_existing=True) == 1
    rows = (moved / "volumes.csv").read_text().splitlines()
    assert len(rows) == 3


def test_a_killed_run_goes_on(images, tmp_path):
    """What it had announced, and may have written, is its own; it is made again."""
    out = tmp_path / "out"
    folder = masks.Masks(out, predict.by_stem(predict.find_inputs(images).files))
    folder.claim(RUN, NAMES)
    folder.begin(["a", "b"])
    (out / "a.nii.gz").write_bytes(b"half a folder")
    assert go(images, out, skip_existing=True) == 2


@pytest.mark.parametrize("skip", [False, True])
def test_another_runs_masks(images, tmp_path, skip):
    out = tmp_path / "out"
    go(images, out)
    said = refused("masks of another run", images, out, OTHER, skip_existing=skip)
    assert "runs/a" in said and "--overwrite" in said
    refused("masks of another run", images / "a.nii.gz", out, OTHER, skip_existing=skip)
    assert go(images, out, OTHER, skip_existing=skip, overwrite=True) == 2
    assert set(json.loads((out / "predictions.json").read_text())["runs"]) == {OTHER["parameters"]}


def test_names_that_would_not_fit_masks_that_stay(images, tmp_path):
    out = tmp_path / "out"
    go(images, out)
    names = ["background", "spleen", "liver"]
    refused("other class names", images / "a.nii.gz", out, OTHER, names, overwrite=True)
    assert go(images, out, OTHER, names, overwrite=True) == 2


@pytest.mark.parametrize("name", ["a.nii.gz", "hand.nii", "HAND.NII.GZ", "labels.json"])
@pytest.mark.parametrize("skip", [False, True])
def test_manual_labels(images, tmp_path, name, skip):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"by hand")
    said = refused("manual labels perhaps", images, out, skip_existing=skip)
    assert name in said
    assert go(images, out, skip_existing=skip, overwrite=True) == 2
    assert (out / name).read_bytes() == b"by hand" or name in ("a.nii.gz", "labels.json")


def test_a_mask_that_was_corrected_by_hand(images, tmp_path):
    out = tmp_path / "out"
    go(images, out)
    (out / "a.nii.gz").write_bytes(b"corrected")
    assert go(images, out, skip_existing=True, overwrite=True) == 0
    assert "a.nii.gz" in refused("changed since", images, out)
    assert go(images / "b.nii.gz", out) == 1  # it is not in the way
    assert (out / "a.nii.gz").read_bytes() == b"corrected"


def test_pictures_of_others(images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    refused("a.png", images, out, overlay=True)
    assert go(images, out) == 2 and (out / "a.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "record", [b"{}", b"mine", b'{"schema": 1, "runs": {}, "files": {"a": 3}}']
)
def test_a_file_of_the_records_name(images, tmp_path, record):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_bytes(record)
    refused("not a record of predicted masks", images, out)
    assert go(images, out, overwrite=True) == 2


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_inputs_are_never_in_the_way(images, tmp_path, link):
    refused("choose another --output", images, images, overwrite=True)
    (tmp_path / "link").symlink_to(images)
    refused("choose another --output", images, tmp_path / "link", overwrite=True)
    (tmp_path / "out").mkdir()
    link(images / "a.nii.gz", tmp_path / "out" / "b.nii.gz")
    refused("is the same file as", images, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("name", ["config.json", "grid.json"])
def test_the_folder_of_a_run_is_no_place_for_masks(images, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    refused("folder of a run or an experiment grid", images, tmp_path / "run", overwrite=True)


def test_a_file_is_no_folder(images, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        go(images, tmp_path / "out")
