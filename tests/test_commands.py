"""The commands as a user types them: each mistake ends in one sentence and exit code 2."""

import sys
import warnings

import pytest

from pgpsam_jax import main, predict
from tests.support import launcher, tiny_method
from tests.support.faults import TINY
from tests.support.launcher import DEADLINE
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data

SMALL = "configs/phantom.py"


@pytest.fixture
def refuses(capsys, monkeypatch):
    """That a command, `pgpsam_jax.main` if no other, ends with a sentence; in this process."""
    monkeypatch.chdir(REPOSITORY)

    def refuses(message, *command, run=None):
        words = ["program", *map(str, command)]
        monkeypatch.setattr(sys, "argv", words)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            run() if run else main.main(words[1:])
        assert ended.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert message in line

    return refuses


def test_unknown_field(refuses):
    refuses("no_such_field", "--config", SMALL, "--config.no_such_field=1")


def test_value_of_the_wrong_type(refuses):
    refuses("seed", "--config", SMALL, "--config.seed=many")


@pytest.mark.parametrize("value", ["train.batch_size=-4", "train.dice_weight=nan"])
def test_number_out_of_range(refuses, value):
    field = value.split("=")[0]
    refuses(f"{field} is", "--config", SMALL, f"--config.{value}")


def test_missing_config_file(refuses):
    refuses("nowhere.py", "--config", "configs/nowhere.py")


def test_no_config():
    """As users do it: a process that ends with its sentence."""
    process = launcher.start("-m", "pgpsam_jax.main", devices=1)
    output = "".join(process.communicate(timeout=DEADLINE))
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "give --config" in line and "Traceback" not in output


def test_unknown_variant(refuses):
    refuses("knows no variant", "--config", "configs/abdomen_ct.py:huge")


def test_missing_data_root(refuses, tmp_path):
    refuses(
        "syn3193805",
        "--config=configs/synapse.py",
        "--config.train.batch_size=8",  # which eight devices divide
        f"--config.data.root={tmp_path / 'nothing'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert not (tmp_path / "run").exists()


def test_no_data_root(refuses, tmp_path):
    flags = ("--config=configs/abdomen_ct.py", f"--workdir={tmp_path / 'run'}")
    flags += ("--config.train.batch_size=8",)  # which eight devices divide
    expected = "a folder with ct.nii.gz and seg104.nii.gz"
    refuses(f"give --config.data.root=FOLDER: expected {expected}", *flags)


def test_image_size_not_divisible(refuses, tmp_path):
    root = write_data(tmp_path / "data")
    refuses(
        "choose a multiple of 8",
        f"--config={SMALL}",
        "--config.model.image_size=30",
        "--config.data.layout=pairs",
        f"--config.data.root={root}",
        "--config.data.image_glob=images/*.nii.gz",
        "--config.data.label_glob=labels/*.nii.gz",
        f"--config.data.label_table={root / 'table.json'}",
        "--config.data.split=fraction",
        f"--workdir={tmp_path / 'run'}",
    )


@pytest.mark.parametrize("program", [main, predict])
def test_workdir_that_is_none(refuses, program, tmp_path):
    arguments = ["--workdir", tmp_path / "none"]
    if program is main:
        refuses("is not a training workdir", *arguments, "--mode", "evaluate")
    else:
        arguments += ["--input", tmp_path, "--output", tmp_path / "out"]
        refuses("is not a training workdir", *arguments, run=predict.main)


@pytest.fixture
def tiny():
    with tiny_method.known():
        yield


def test_missing_sam_weights_name_the_download(tiny, tmp_path):
    from pgpsam_jax.errors import UserError
    from pgpsam_jax.training import train

    config = config_for(
        write_data(tmp_path / "data"), **TINY, model__base=str(tmp_path / "sam_vit_b")
    )
    with pytest.raises(
        UserError, match=r"segment_anything/sam_vit_b_01ec64.pth.*then run: pgpsam convert"
    ):
        train.train(config, tmp_path / "run")


def test_bad_volumes_are_named(tiny, tmp_path):
    import nibabel as nib
    import numpy as np

    from pgpsam_jax.errors import UserError
    from pgpsam_jax.training import train

    root = write_data(tmp_path / "data")
    image, label = root / "images" / "a.nii.gz", root / "labels" / "a.nii.gz"
    whole, labels = image.read_bytes(), nib.load(label)
    ids, affine = np.asarray(labels.dataobj), labels.affine

    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"images/a.nii.gz"):
        train.train(config_for(root, **TINY), tmp_path / "run1")
    image.write_bytes(whole)

    nib.save(nib.Nifti1Image(ids[:-1], affine), label)
    with pytest.raises(UserError, match=r"labels/a.nii.gz has shape"):
        train.train(config_for(root, **TINY), tmp_path / "run2")

    strange = (root / "table.json").read_text().replace('"background"', '"error"', 1)
    (root / "table.json").write_text(strange)
    ids[0, 0, 0] = 77
    nib.save(nib.Nifti1Image(ids, affine), label)
    with pytest.raises(UserError, match=r"labels/a.nii.gz holds label values outside .*77"):
        train.train(config_for(root, **TINY), tmp_path / "run3")
    for run_folder in tmp_path.glob("run*"):
        assert not list(run_folder.rglob(".tmp-*"))
