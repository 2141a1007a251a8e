"""Runs for tests of what happens to them: in processes of their own, or in this one."""

import json
import os
import shutil
import threading
import time

from pgpsam_jax.checkpointing import checkpoint
from pgpsam_jax.training import train
from tests.support import tiny_method
from tests.support.launcher import DEADLINE, start
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data

PROGRAM = REPOSITORY / "tests" / "support" / "tiny_method.py"

TINY = {"model__name": "tiny", "model__train_encoder": "frozen", "eval__overlays": False}
# Draws anew in every step, and compiles sooner than what moves pixels.
NOISE = {f"augment__{kind}_probability": 0.0 for kind in ("rotate", "scale", "elastic")}
NOISE |= {"augment__noise_probability": 0.5}
_CONFIG = """
from pathlib import Path
from tests.support.small_run import config_for

def get_config():
    return config_for(Path({root!r}), **{settings!r})
"""


def prepare(root, **settings):
    """Data in a folder, and `config.py` beside them for processes; the folder."""
    write_data(root)
    text = _CONFIG.format(root=str(root), settings=settings)
    (root / "config.py").write_text(text)
    return root


def begin(root, workdir, *flags, devices=1, start=start):
    """The program with the configuration of `prepare`, started, as `forks.starting` does or so."""
    return start(
        PROGRAM, "--config", root / "config.py", "--workdir", workdir, *flags, devices=devices
    )


def run(root, workdir, **settings):
    """A few steps of the tiny method in this process; the summary."""
    with tiny_method.known():
        return train.train(config_for(root, **TINY | settings), workdir)


def again(root, workdir, **settings):
    """A run of nine slices, begun or gone on with; its cache is elsewhere."""
    settings = NOISE | {"data__cache_dir": str(root / "cache"), "fewshot__count": 9} | settings
    return run(root, workdir, **settings)


def copied(workdir, into, step=6):
    """A run as it stood after a step that was saved."""
    shutil.copytree(workdir, into, ignore=shutil.ignore_patterns("evaluation", ".lock"))
    for number in checkpoint.saved_steps(into):
        if number > step:
            shutil.rmtree(into / "checkpoints" / str(number))
    return into


def records(workdir):
    """Every logged number but the speed, by step; a half line at the end is none."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in found]


def logged(workdir) -> int:
    """The last step in the log."""
    found = records(workdir)
    return found[-1]["step"] if found else 0


def newest(workdir) -> int:
    """The newest complete checkpoint."""
    return max(checkpoint.saved_steps(workdir), default=0)


def saving(workdir) -> set[str]:
    """Checkpoints that are being written, or whose writing was killed."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if "tmp" in name}


def rubbish(workdir) -> list[str]:
    """What should not be left when a run has ended by itself."""
    found = [*workdir.rglob(".tmp-*"), workdir / "running.json"]
    return sorted(saving(workdir)) + [str(path) for path in found if path.exists()]


def await_that(condition, process=None, pause=0.002):
    """Wait for what another process brings about; whether it did before it ended."""
    deadline, event = time.monotonic() + DEADLINE, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        if process is not None and process.poll() is not None:
            return False
        event.wait(pause)
    return True
