"""Where libtpu is installed and no TPU is, JAX is kept from trying; it decides everywhere else."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pgpsam_jax.runtime import startup
from tests.support.places import REPOSITORY

SPEC = SimpleNamespace(submodule_search_locations=[])


@pytest.fixture
def laptop(monkeypatch, tmp_path):
    """A machine with libtpu and no accelerator, on which nobody has chosen a platform."""
    for name in [name for name in os.environ if name.startswith(startup._CHOSEN)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(startup, "_ACCELERATORS", (f"{tmp_path}/dev/accel[0-9]*",))
    monkeypatch.setattr(startup, "_PCI_DEVICES", f"{tmp_path}/pci")
    monkeypatch.setattr(startup, "find_spec", {"libtpu": SPEC}.get)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    return tmp_path


def chosen() -> str | None:
    startup.avoid_absent_tpu()
    return os.environ.get("JAX_PLATFORMS")


def pci_device(folder, vendor: str, kind: str) -> None:
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_only_the_cpu_is_there(laptop):
    for name, kind in (("network", "0x020000"), ("storage", "0x010802")):  # a virtual machine's
        pci_device(laptop / "pci" / name, "0x1ae0", kind)
    pci_device(laptop / "pci" / "other", "0x8086", "0x120000")
    (laptop / "pci" / "unreadable").mkdir()
    assert chosen() == "cpu"


@pytest.mark.parametrize("name", ["TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"])
def test_variables_that_jax_sets_are_no_choice(laptop, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert chosen() == "cpu"


@pytest.mark.parametrize("name", ["TPU_WORKER_ID", "JAX_FORCE_TPU_INIT"])
def test_a_choice_of_the_user_stays(laptop, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert chosen() is None


@pytest.mark.parametrize("platforms", ["", "tpu", "cuda,cpu"])
def test_named_platforms_stay(laptop, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert chosen() == platforms


def test_a_device_file_leaves_the_choice_to_jax(laptop):
    (laptop / "dev").mkdir()
    (laptop / "dev" / "accel0").touch()
    assert chosen() is None


def test_a_tpu_that_this_user_cannot_open_is_jaxs_matter(laptop):
    pci_device(laptop / "pci" / "chip", "0x1ae0", "0x120000")
    assert chosen() is None


def test_without_libtpu_nothing_is_looked_at(laptop, monkeypatch):
    monkeypatch.setattr(startup, "find_spec", lambda name: None)
    assert chosen() is None


@pytest.mark.parametrize(("plugin", "expected"), [("xla_cuda12", "cpu"), ("metal", None)])
def test_plugins_for_other_devices(laptop, monkeypatch, plugin, expected):
    """CUDA's is not used where no NVIDIA GPU is; others know their devices themselves."""
    plugins = [SimpleNamespace(name=plugin)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    assert chosen() == expected


def test_a_command_prints_no_error_of_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install '.[tpu]')")
    own = {k: v for k, v in os.environ.items() if not k.startswith(startup._CHOSEN)}
    code = "import os, sys; sys.argv[0] = '-m'; import pgpsam_jax; "
    code += "print(os.environ.get('JAX_PLATFORMS'), flush=True); import jax; jax.devices()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True)
    if done.stdout == "None\n":
        pytest.skip("a TPU, a GPU or another device of JAX may be here")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
