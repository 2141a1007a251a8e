"""Every volume of a folder is found, each bad entry is one sentence, and the rest is counted."""

import os
import shutil
import socket

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax import verify as program
from pgpsam_jax.data import dataset
from pgpsam_jax.data.io import volumes
from pgpsam_jax.data.io.nifti import write_label
from pgpsam_jax.data.io.volume_files import find_inputs, skipped_entries, volumes_in
from pgpsam_jax.data.layouts import find
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.data.quality import verification
from pgpsam_jax.errors import UserError
from tests.support.layout_data import write_nnunet
from tests.support.refusal import refuse
from tests.support.small_run import config_for, few_shot_data, write_data

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(0, 5, (4, 5, 3)).astype(np.int16)


def save(path, kind=nib.Nifti1Image):
    """A small volume, under a name that nibabel need not like."""
    suffix = ".img" if kind is nib.Nifti1Pair else ".nii.gz" if path.name[-1] in "zZ" else ".nii"
    plain = path.with_name(f"plain{suffix}")
    nib.save(kind(VOXELS, AFFINE), plain)
    return plain.rename(path)


class Known:
    preprocessing = Preprocessing(32, (0.0, 5.0))

    def __call__(self, volume):
        return np.rint(volume.array).astype(np.uint8)


def dangling(path):
    path.symlink_to(path.parent / "not fetched")


def ring(path):
    path.symlink_to(path.name)


def bound(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


BAD = {
    "dangling.nii.gz": dangling,
    "ring.nii": ring,
    "folder.nii.gz": os.mkdir,
    "pipe.nii": os.mkfifo,
    "socket.nii": bound,
    "device.nii": lambda path: path.symlink_to("/dev/zero"),
    "alone.img": lambda path: path.write_bytes(b"x"),
    "lonely.hdr": lambda path: path.write_bytes(b"x"),
    os.fsdecode(b"\xfcber.nii"): save,
    "病" * 83 + ".nii": save,
}
GOOD = ["a.nii", "UPPER.NII.GZ", "b.Nii.gz", "cost $_$ <b> [red].nii", 'n\nerror: "q".nii']
GOOD += ["é" * 120 + ".nii"]


def good(folder):
    for name in GOOD:
        save(folder / name)
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), folder / "pair.img")
    return len(GOOD) + 1


def test_one_bad_entry_never_stops_a_folder(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    count = good(folder)
    for name, make in BAD.items():
        make(folder / name)
    for name in ("twice.nii", "twice.nii.gz", "twice.NII"):
        save(folder / name)
    (folder / "._a.nii").write_bytes(b"\0" * 100)
    (folder / "readme.txt").write_text("x")
    inputs = find_inputs(folder)
    assert len(inputs.files) == count and len(inputs.faults) == len(BAD) + 3
    names, run = ["background", *"abcde"], {"workdir": "runs/x", "parameters": "0123abcd"}
    failed = predict.predict(Known(), names, inputs, tmp_path / "out", run=run)
    assert failed == len(BAD) + 3
    masks = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".gz"]
    assert len(masks) == count and tmp_path / "out" / "UPPER.nii.gz" in masks
    for mask in masks:
        assert np.array_equal(np.asarray(nib.load(mask).dataobj), VOXELS)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == len(BAD) + 3
    assert all(line.isprintable() for line in lines if line.startswith("error"))
    assert len([line for line in lines if "would write the same mask as" in line]) == 3
    assert lines[0] == (
        "2 entries of in skipped: 1 hidden file (._a.nii), 1 other file (readme.txt)"
    )


@pytest.mark.parametrize("name", [n for n in BAD if n[:2] not in ("al", "lo") and n.isascii()])
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, name):
    """A pipe would be waited for, a device read without end."""
    BAD[name](tmp_path / name)
    for read in (volumes.read_image, volumes.digest, volumes.read_grid, find_inputs):
        if read is not find_inputs or not (tmp_path / name).is_dir():
            refuse(read, tmp_path / name, "is not a file")


@pytest.mark.parametrize("name", ["p.img", "p.img.gz", "p.IMG", "P.Img.GZ"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_pairs_are_the_volumes_they_hold(tmp_path, kind, name):
    zipped = name.lower().endswith(".gz")
    nib.save(kind(VOXELS, AFFINE), tmp_path / f"x.img{'.gz' * zipped}")
    header = name.replace("img", "hdr").replace("IMG", "HDR").replace("Img", "hdr")
    (tmp_path / f"x.img{'.gz' * zipped}").rename(tmp_path / name)
    (tmp_path / f"x.hdr{'.gz' * zipped}").rename(tmp_path / header)
    nib.save(nib.Nifti1Image(VOXELS, AFFINE), tmp_path / "single.nii")
    wanted = volumes.read_image(tmp_path / "single.nii")
    assert volumes_in(tmp_path) == sorted([tmp_path / name, tmp_path / "single.nii"])
    for path in (tmp_path / name, tmp_path / header):
        found = volumes.read_image(path)
        assert np.array_equal(found.array, wanted.array)
        np.testing.assert_array_equal(found.source.affine, AFFINE)
        assert volumes.read_grid(path).display_shape == found.array.shape
    write_label(tmp_path / "mask.nii", np.zeros(found.array.shape, np.uint8), found.source)
    assert nib.load(tmp_path / "mask.nii").header["magic"].item().startswith(b"n+")
    before = volumes.digest(tmp_path / name)
    assert before == volumes.digest(tmp_path / header)
    assert {path.name for path in volumes.files_of(tmp_path / name)} == {name, header}
    other = tmp_path / "other"
    other.mkdir()
    nib.save(kind(VOXELS, np.diag([1.0, 1, 1, 1])), other / f"x.img{'.gz' * zipped}")
    shutil.copy(other / f"x.hdr{'.gz' * zipped}", tmp_path / header)
    assert volumes.digest(tmp_path / name) != before  # a header is content too


def test_pairs_that_cannot_be_read(tmp_path):
    nib.save(nib.AnalyzeImage(VOXELS, AFFINE), tmp_path / "old.img")
    refuse(volumes.read_image, tmp_path / "old.img", "does not say where the patient's right")
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "p.img")
    whole = (tmp_path / "p.img").read_bytes()
    (tmp_path / "p.img").write_bytes(whole[:-1])
    refuse(volumes.read_image, tmp_path / "p.img", "cut off")
    (tmp_path / "p.hdr").unlink()
    refuse(volumes.read_image, tmp_path / "p.img", r"whose \.hdr is missing")
    for suffix in ("hdr", "img"):
        nib.save(nib.Nifti1Image(VOXELS, AFFINE), tmp_path / "s.nii")
        (tmp_path / "s.nii").rename(tmp_path / f"s.{suffix}")
    refuse(volumes.read_image, tmp_path / "s.img", "is that of a single file")


def test_folders_of_other_formats(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "a.mha").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no \.nii .*1 DICOM folder \(study\), 1 MetaImage"):
        find_inputs(tmp_path)
    for number in range(5):
        (tmp_path / f"{number}.dcm").write_bytes(b"x")
    assert "5 DICOM files (0.dcm, 1.dcm, 2.dcm, ...)" in skipped_entries(tmp_path, [])
    assert skipped_entries(tmp_path / "none", []) == ""


def btcv(root):
    for kind, name in (("images", "img"), ("labels", "label")):
        folder = root / "RawData" / "Training" / name
        folder.mkdir(parents=True)
        for number, case in enumerate("ab", 1):
            source = root / "pairs" / kind / f"{case}.nii.gz"
            shutil.copy(source, folder / f"{name}{number:04}.nii.gz")
    return "btcv", folder.parent / "img", None, None


def nnunet(root):
    write_nnunet(root, cases=("a", "b"))
    return "nnunet", root / "imagesTr", None, None


def pairs(root):
    return "pairs", root / "pairs/images", "pairs/images/*.nii.gz", "pairs/labels/*.nii.gz"


@pytest.mark.parametrize("layout", [btcv, nnunet, pairs])
def test_layouts_find_the_same_entries(tmp_path, layout):
    write_data(tmp_path / "pairs", ("a", "b"))
    name, folder, *globs = layout(tmp_path)
    first, second = sorted(folder.iterdir())
    first.rename(folder / first.name.replace(".nii.gz", ".NII.GZ"))
    (folder / f"._{second.name}").write_bytes(b"x")
    (folder / "readme.txt").write_text("x")
    listing = find.scan(name, tmp_path, *globs)
    assert len(listing.cases) == 2 and not listing.findings
    assert listing.skipped == [
        f"2 entries of {folder.name} skipped: 1 hidden file (._{second.name}), "
        "1 other file (readme.txt)"
    ]
    second.unlink()
    second.symlink_to("not fetched")
    cases = find.find_cases(name, tmp_path, *globs)
    assert len(cases) == 2  # not dropped: who needs it is told
    table = find.label_table(name, tmp_path)
    lines = []
    report = program.verify(
        tmp_path, name, image_glob=globs[0], label_glob=globs[1], table=table, say=lines.append
    )
    found = [f for file in report["files"] for f in file["findings"] if f["level"] == "error"]
    assert [f["code"] for f in found if f["file"] == str(second)] == ["missing"]
    assert any(line.startswith("note     2 entries") for line in lines)
    assert report["skipped"] == listing.skipped


@pytest.mark.parametrize("make", [dangling, os.mkfifo, os.mkdir])
def test_training_names_the_image_that_is_none(tmp_path, make):
    root = write_data(tmp_path)
    (root / "images" / "b.nii.gz").unlink()
    make(root / "images" / "b.nii.gz")
    config = config_for(root, data__axis="axial")
    split = dataset.find_split(config.data)
    with pytest.raises(UserError, match=r"b\.nii\.gz is not a file"):
        verification.verify_run_data(config.data, split, tmp_path / "run")
    with pytest.raises(UserError, match=r"b\.nii\.gz not found"):
        few_shot_data(config, split, tmp_path / "run")
