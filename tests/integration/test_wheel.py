"""The built wheel in an environment without the repository: what is in it, and that it works."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.support.places import QUICK_FLAGS, REPOSITORY

DEADLINE = 500  # seconds for a command on a busy machine


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def pgpsam(wheel, tmp_path_factory):
    """The installed command, run in a folder of its own; returns its output.

    The environment is new; it finds the dependencies of the package where these tests have them.
    """
    home, work = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("work")
    venv.create(home, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    python = ["-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([sys.executable, *python, "--no-index", str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables["XLA_FLAGS"] = QUICK_FLAGS

    def run(*words, program=home / "bin" / "pgpsam"):
        options = {"cwd": work, "env": variables, "capture_output": True, "text": True}
        ended = subprocess.run([program, *map(str, words)], timeout=DEADLINE, **options)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run.site, run.work, run.python = site, work, home / "bin" / "python"
    return run


def test_wheel_holds_one_package(wheel, pgpsam):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pgpsam_jax"}
    assert "pgpsam_jax/py.typed" in names
    tracked = ["git", "ls-files", "pgpsam_jax", "configs", "experiments", "weights_conversion"]
    listed = subprocess.run(tracked, cwd=REPOSITORY, capture_output=True, text=True)
    for name in listed.stdout.split():
        assert name in names or f"pgpsam_jax/_bundle/{name}" in names
    installed = {path.name.split("-")[0] for path in pgpsam.site.iterdir()}
    assert installed == {"pgpsam_jax", "dependencies.pth"}
    where = pgpsam("-c", "import pgpsam_jax; print(pgpsam_jax.__file__)", program=pgpsam.python)
    assert where.startswith(str(pgpsam.site))


def test_grids_by_name(pgpsam):
    """With a folder of the user's that is called like ours."""
    folder = pgpsam.work / "experiments"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('not ours')")
    assert "12 cells in runs/table3_phantom" in pgpsam("grid", "table3:phantom", "--dry-run")


@pytest.mark.slow  # compiles the step of the demo
def test_demo_of_an_installed_package(pgpsam):
    """Two steps of the built-in run, then its masks and its report."""
    fields = ["train.steps=2", "data.root=data", "data.split=fraction", "data.test_fraction=0.1"]
    fields += ["model.image_size=32", "log.report=False"]
    pgpsam("train", "--config", "phantom", *[f"--config.{field}" for field in fields])
    image = next((pgpsam.work / "data").rglob("img*.nii.gz"))
    pgpsam("predict", "--workdir", "runs/phantom", "--input", image, "--output", "masks")
    assert len(list((pgpsam.work / "masks").glob("*.nii.gz"))) == 1
    pgpsam("report", "runs/phantom")
    assert (pgpsam.work / "runs" / "phantom" / "report" / "report.html").is_file()
    assert "strict" in pgpsam("tables", "runs/phantom")
