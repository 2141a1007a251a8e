"""First step of a command, before its slow imports; imports little itself."""

import faulthandler
import glob
import os
import pkgutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

# TPUs (v2 to v4, later ones) and GPUs (NVIDIA's, in WSL, AMD's).
_ACCELERATORS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
_CHOSEN = ("TPU_", "JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS")
_SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # on any machine, inherited by children
_PCI_DEVICES = "/sys/bus/pci/devices"
_GOOGLE = "0x1ae0"  # PCI vendor
_STORAGE_OR_NETWORK = ("0x01", "0x02")  # PCI classes of its virtual devices


def begin() -> None:
    """Prepares this process for `python -m` while the modules of the command load.

    An interrupt exits at once, as nothing can be lost yet, until the command installs its own
    handlers. Characters that the terminal cannot encode are printed escaped. A crash in native code
    prints where Python was.
    """
    if sys.stderr is not None:
        faulthandler.enable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if hasattr(sys.stdout, "reconfigure"):  # not closed or replaced
        sys.stdout.reconfigure(errors="backslashreplace")
    if not {"-h", "--help", "--version"}.intersection(sys.argv):
        avoid_absent_tpu()


def _leave(number: int, _: object) -> None:
    os.write(2, b"stopped: SIGINT came\n")
    os._exit(128 + number)


def avoid_absent_tpu() -> None:
    """Keeps JAX from trying libtpu where there is no TPU; call before JAX is imported.

    The attempt takes seconds and prints errors before JAX uses the CPU. Sets `JAX_PLATFORMS` only
    if the CPU is all that JAX can use here; otherwise, or if the user chose, JAX decides.
    """
    if find_spec("libtpu") is None:
        return
    names = os.environ.keys() - _SET_BY_JAX
    if any(name.startswith(_CHOSEN) for name in names) or any(map(glob.glob, _ACCELERATORS)):
        return
    if any(map(_may_be_tpu, glob.glob(f"{_PCI_DEVICES}/*"))) or _other_plugins():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"


def _may_be_tpu(device: str) -> bool:
    """Returns whether a PCI device is a chip of Google's, perhaps one this user cannot open."""
    try:
        vendor, kind = (Path(device, name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _GOOGLE and not kind.startswith(_STORAGE_OR_NETWORK)


def _other_plugins() -> bool:
    """Returns whether JAX has plugins for devices other than TPUs and NVIDIA GPUs."""
    from importlib.metadata import entry_points  # slow to import

    package = find_spec("jax_plugins")
    found = package and pkgutil.iter_modules(package.submodule_search_locations)
    names = {module.name for module in found or ()}
    names |= {plugin.name for plugin in entry_points(group="jax_plugins")}
    return not all(name.startswith("xla_cuda") for name in names)
