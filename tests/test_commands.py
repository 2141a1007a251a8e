"""The commands as a user types them: each mistake ends in one sentence and exit code 2."""

import warnings

import forks
import launcher
import pytest
import tiny_method
from absl.testing import flagsaver
from faults import TINY
from launcher import DEADLINE
from places import REPOSITORY
from small_run import config_for, write_data

from pgpsam_jax import main

SMALL = "configs/phantom.py"


@pytest.fixture(scope="module")
def start():
    modules = ("settings", "session", "cluster", "train", "memory_advice", "data.verification")
    with forks.starting(*(f"pgpsam_jax.{name}" for name in modules)) as start:
        yield start


@pytest.fixture
def refuses(start):
    """That `python -m module` ends with a sentence."""

    def refuses(message, *command, start=start):
        process = start("-m", *command, devices=1)
        output = "".join(process.communicate(timeout=DEADLINE))
        assert process.returncode == 2, output
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert message in line
        assert "Traceback" not in output

    return refuses


@pytest.fixture
def refuses_here(capsys, monkeypatch):
    """The same of `pgpsam_jax.main` in this process, for what is said before anything begins."""
    monkeypatch.chdir(REPOSITORY)

    def refuses(message, *command):
        with flagsaver.flagsaver(), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main.main(main.parse(["main", *command]))
        assert ended.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert message in line

    return refuses


def test_unknown_field(refuses):
    refuses("no_such_field", "pgpsam_jax.main", "--config", SMALL, "--config.no_such_field=1")


def test_value_of_the_wrong_type(refuses_here):
    refuses_here("seed", "--config", SMALL, "--config.seed=many")


@pytest.mark.parametrize("value", ["train.batch_size=-4", "train.dice_weight=nan"])
def test_number_out_of_range(refuses_here, value):
    field = value.split("=")[0]
    refuses_here(f"{field} is", "--config", SMALL, f"--config.{value}")


def test_missing_config_file(refuses_here):
    refuses_here("nowhere.py", "--config", "configs/nowhere.py")


def test_no_config(refuses):
    refuses("give --config", "pgpsam_jax.main", start=launcher.start)  # as users do


def test_unknown_variant(refuses_here):
    refuses_here("knows no variant", "--config", "configs/abdomen_ct.py:huge")


def test_missing_data_root(refuses, tmp_path):
    refuses(
        "syn3193805",
        "pgpsam_jax.main",
        "--config=configs/synapse.py",
        f"--config.data.root={tmp_path / 'nothing'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert not (tmp_path / "run").exists()


def test_image_size_not_divisible(refuses, tmp_path):
    root = write_data(tmp_path / "data")
    refuses(
        "choose a multiple of 8",
        "pgpsam_jax.main",
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


@pytest.mark.parametrize("mode", ["pgpsam_jax.main", "pgpsam_jax.predict"])
def test_workdir_that_is_none(refuses, mode, tmp_path):
    arguments = ["--workdir", tmp_path / "none"]
    if mode == "pgpsam_jax.main":
        arguments += ["--mode", "evaluate"]
    else:
        arguments += ["--input", tmp_path, "--output", tmp_path / "out"]
    refuses("is no training workdir", mode, *arguments)


@pytest.fixture
def tiny():
    with tiny_method.known():
        yield


def test_missing_sam_weights_name_the_download(tiny, tmp_path):
    from pgpsam_jax import train
    from pgpsam_jax.errors import UserError

    config = config_for(
        write_data(tmp_path / "data"), **TINY, model__base=str(tmp_path / "sam_vit_b")
    )
    with pytest.raises(UserError, match=r"segment_anything/sam_vit_b_01ec64.pth.*then run: python"):
        train.train(config, tmp_path / "run")


def test_bad_volumes_are_named(tiny, tmp_path):
    import nibabel as nib
    import numpy as np

    from pgpsam_jax import train
    from pgpsam_jax.errors import UserError

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
