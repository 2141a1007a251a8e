"""What a start costs: modules that are not imported, and programs that are not compiled again."""

import collections
import json
import os
import subprocess
import sys

import filelock
import jax
import pytest

from pgpsam_jax.config import serialization
from pgpsam_jax.runtime import compilation_cache
from tests.support import few_steps, tiny_method
from tests.support.faults import NOISE
from tests.support.places import QUICK_FLAGS, REPOSITORY
from tests.support.small_run import config_for, write_data

# What training imports nowhere, or where it is used.
LATER = ("matplotlib", "scipy.ndimage", "scipy.stats", "scipy.interpolate", "grain", "torch")
LATER += ("orbax.checkpoint", "transformers", "tensorboardX")
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def python(program, *arguments, **variables):
    """Standard output of a program in a fresh interpreter."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    run = dict(check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return subprocess.run(command, env=environment, **run).stdout


def imported(program):
    """Modules that are there once the program has run."""
    program = f"import sys\n{program}\nprint(*sys.modules)"
    return set(python(program).splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--mode", "evaluate"]])
def test_commands_answer_without_jax(arguments):
    program = f"""
import contextlib
from pgpsam_jax import main
sys.argv = ["main", *{arguments}]
with contextlib.suppress(SystemExit):
    main.main()
"""
    assert "jax" not in imported(program)


COMMANDS = ["main", "predict", "verify", "report", "cli"]
COMMANDS = [*(f"pgpsam_jax.{name}" for name in COMMANDS), "weights_conversion.convert"]
COMMANDS += ["experiments.tables", "experiments.run_grid"]
SLOW = {"jax", "flax", "optax", "orbax", "grain", "torch", "transformers"}
SLOW |= {"scipy", "matplotlib", "PIL", "nibabel", "h5py", "loky", "tqdm"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_little(command):
    """Less than half a second of imports; modules are counted, as times depend on the machine."""
    program = f"""
import contextlib, runpy
sys.argv = ["{command}", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_module("{command}", run_name="__main__")
"""
    found = imported(program)
    others = set() if command == "pgpsam_jax.main" else {"ml_collections"}  # which lists the fields
    assert not found.intersection(others | SLOW)


def test_the_package_alone_is_light():
    found = imported("import pgpsam_jax; assert pgpsam_jax.__version__")
    assert not found.intersection(SLOW | {"numpy", "ml_collections", "argparse"})


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings as in a process that has said nothing, and a cache home of the test's own."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_default_folder(settings):
    compilation_cache.keep_compiled()
    folder = compilation_cache.cache_folder()
    assert settings.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings.jax_compilation_cache_max_size == 5 * 10**9
    assert settings.jax_persistent_cache_min_compile_time_secs == 0
    assert settings.jax_persistent_cache_min_entry_size_bytes == -1


@pytest.mark.parametrize("chosen", ["/elsewhere", ""])
def test_chosen_folder_stays(settings, chosen, tmp_path):
    jax.config.update("jax_compilation_cache_dir", chosen)
    size = settings.jax_compilation_cache_max_size
    compilation_cache.keep_compiled()
    assert settings.jax_compilation_cache_dir == chosen
    assert settings.jax_compilation_cache_max_size == size
    assert settings.jax_persistent_cache_min_compile_time_secs == 0
    assert not list(tmp_path.iterdir())


def test_variables_of_jax_win(settings, monkeypatch):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    jax.config.update("jax_compilation_cache_max_size", 12345)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "12345")
    compilation_cache.keep_compiled()
    assert settings.jax_persistent_cache_min_compile_time_secs == 3
    assert settings.jax_compilation_cache_max_size == 12345


def test_empty_variable_is_off():
    """JAX reads its variables when it is imported: only a fresh process shows it."""
    program = """
import jax
from pgpsam_jax.runtime.compilation_cache import keep_compiled
keep_compiled()
jax.numpy.ones(3) + 1
print(repr(jax.config.jax_compilation_cache_dir))
"""
    assert python(program, JAX_COMPILATION_CACHE_DIR="") == "''\n"


def no_home(*_):
    raise RuntimeError("no home folder")


def as_file(folder, _):
    folder.parent.mkdir(parents=True)
    folder.touch()


def open_to_all(folder, _):
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def homeless(_, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compilation_cache.Path, "home", no_home)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (as_file, "File exists"),
        (open_to_all, "others can write"),
        (homeless, "no home folder"),
    ],
)
def test_folder_that_cannot_be_used(settings, monkeypatch, spoil, reason):
    spoil(compilation_cache.cache_folder(), monkeypatch)
    with pytest.warns(UserWarning, match=f"not kept.*{reason}.*JAX_COMPILATION_CACHE_DIR"):
        compilation_cache.keep_compiled()
    assert settings.jax_compilation_cache_dir is None


def test_torn_programs_are_removed(settings):
    folder = compilation_cache.cache_folder()
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).write_bytes(b"12345678")
    with filelock.FileLock(folder / ".lockfile"):  # another process is writing that very one
        compilation_cache.keep_compiled()
    assert settings.jax_compilation_cache_dir == str(folder)
    assert (folder / "torn-cache").is_file()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.keep_compiled()
    left = {path.name for path in folder.iterdir()}
    assert left - {".lockfile"} == {"whole-cache", "whole-atime"}


def test_place_and_kind_of_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    three = compilation_cache.machine_kind()
    assert compilation_cache.cache_folder() == tmp_path / ".cache/pgpsam_jax/compiled" / three
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert compilation_cache.machine_kind() not in (three, "")
    table = tmp_path / "cpuinfo"
    kinds = set()
    for model, clock in (("A", 1), ("A", 2), ("B", 1)):
        table.write_text(f"model name\t: {model}\ncpu MHz\t\t: {clock}\n\nmodel name\t: C\n")
        monkeypatch.setattr(compilation_cache, "Path", lambda _: table)
        kinds.add(compilation_cache.machine_kind())
    assert len(kinds) == 2


# A start as the command does it: programs that were asked for, and those found ready.
START = """
import collections, json, sys
import pgpsam_jax.training.train
modules = list(sys.modules)
from tests.support import micro, tiny_method
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
from pgpsam_jax import config
from pgpsam_jax.training import train
from pgpsam_jax.runtime.compilation_cache import keep_compiled
keep_compiled()
settings, workdir = sys.argv[1:]
train.MetricLogger._draw = lambda self: None  # which takes its time
with tiny_method.known():
    train.train(config.from_json(json.load(open(settings))), workdir)
start = "/jax/compilation_cache/"
names = ("compile_requests_use_cache", "cache_hits")
print(json.dumps([modules, *(counts[start + name] for name in names)]))
"""


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"name": tiny_method.NAME}, marks=pytest.mark.slow),
        pytest.param({"stage_taps": (1,)}, marks=pytest.mark.slow),
        pytest.param({"preset": "release", "stage_taps": (1,)}, marks=pytest.mark.slow),
    ],
    ids=["tiny", "paper", "release"],
)
def test_second_start_compiles_nothing(model, tmp_path):
    """Nor does any import what it does not use at once. What came out is the same."""
    fields = {f"model__{name}": value for name, value in model.items()}
    fields |= {"train__steps": 1, "eval__overlays": False}
    fields |= NOISE if model.get("name") else {}
    stored = tmp_path / "config.json"
    config = config_for(write_data(tmp_path / "data"), **fields)
    stored.write_text(json.dumps(serialization.to_json(config)))
    # One device: what is partitioned over eight takes longer and has no other keys.
    own = {
        "XLA_FLAGS": QUICK_FLAGS,
        "XDG_CACHE_HOME": str(tmp_path / "home"),
        "JAX_COMPILATION_CACHE_DIR": "unset",
    }
    program = f"import os; del os.environ['JAX_COMPILATION_CACHE_DIR']\n{START}"
    starts = []
    for seed, workdir in enumerate(("first", "second")):  # sets of strings in another order
        output = python(program, stored, tmp_path / workdir, PYTHONHASHSEED=str(seed + 1), **own)
        modules, *counts = json.loads(output.splitlines()[-1])
        assert "jax" in modules and not set(modules).intersection(LATER)
        starts.append(counts)
    (asked, ready), again = starts
    assert asked > 6 and ready < asked
    assert again == [asked, asked]
    losses = [(tmp_path / w / "metrics.jsonl").read_text() for w in ("first", "second")]
    assert json.loads(losses[0])["loss"] == json.loads(losses[1])["loss"]


def test_training_imports_nothing_early():
    assert not imported("import pgpsam_jax.training.train").intersection(LATER)


def test_the_same_steps_again_compile_nothing(settings):
    """In a process that has forgotten its programs, as a new one has none."""
    counts, starts = collections.Counter(), []

    def count(name, **_):
        counts.update([name.removeprefix("/jax/compilation_cache/")])

    compilation_cache.keep_compiled()
    jax.monitoring.register_event_listener(count)
    try:
        for _ in range(2):
            counts.clear()
            jax.clear_caches()
            with tiny_method.known():
                few_steps.trained({"name": tiny_method.NAME} | NOISE)
            starts.append((counts["compile_requests_use_cache"], counts["cache_hits"]))
    finally:
        jax.monitoring.unregister_event_listener(count)
    (asked, ready), again = starts
    assert asked > 6 and ready < asked
    assert again == (asked, asked)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_the_restart_for_large_pages_loses_nothing(tmp_path):
    """Arguments, standard input, options of the interpreter and the process id stay."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom pgpsam_jax.runtime.malloc import keep_freed_memory\n"
        "print('once', os.getpid(), flush=True)\nkeep_freed_memory()\n"
        "print(os.getpid(), sys.argv[1:], sys.stdin.read(), sys.flags.optimize)\n"
    )
    command = [sys.executable, "-O", str(program), "a b", "--c=1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GLIBC_TUNABLES": ""}
    run = dict(check=True, stdout=subprocess.PIPE, text=True, env=environment)
    first, again, last = subprocess.run(command, input="in", **run).stdout.splitlines()
    assert first == again  # started twice, as the same process
    assert last == f"{first.split()[1]} ['a b', '--c=1'] in 1"
