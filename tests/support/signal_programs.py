"""Programs for tests of signals, without JAX: python signal_programs.py SCENARIO [FOLDER]."""

import signal
import sys
import time
from pathlib import Path

from pgpsam_jax.checkpointing import workdir_lock
from pgpsam_jax.errors import exit_on_user_error
from pgpsam_jax.runtime import cli, preemption
from pgpsam_jax.utils.files import atomic_path

preemption.GRACE_SECONDS = 0.2


def ready():
    print("ready", flush=True)


def read(folder):
    """Work of which nothing would be lost."""
    with preemption.handle_signals():
        ready()
        time.sleep(60)


def compile_(folder):
    """The same, where no Python code runs that could handle a signal."""
    with preemption.handle_signals():
        signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
        ready()
        time.sleep(60)


def train(folder):
    """Steps, of which the last is written down."""
    with preemption.handle_signals(), preemption.defer_to_step(0) as stop:
        for step in range(1, 10**9):
            time.sleep(0.01)
            if step == 3:
                ready()
            if stop.should_stop(step):
                (folder / "saved").write_text(str(step))
                stop.interrupt(step)


def hang(folder):
    """A step that does not end."""
    with preemption.handle_signals(), preemption.defer_to_step(0):
        ready()
        time.sleep(60)


def hold(folder):
    """A workdir's lock."""
    with workdir_lock.hold(folder, "training"):
        ready()
        time.sleep(60)


def command(folder):
    """A command that writes a file."""
    preemption.GRACE_SECONDS = 60
    with cli.running(), atomic_path(folder / "file"):
        ready()
        time.sleep(60)


def masked(folder):
    """A module of another language that tells of the interrupt in an error of its own."""
    preemption.GRACE_SECONDS = 60
    with cli.running(), atomic_path(folder / "file"):
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("it failed to load") from None


class _Deaf:
    def __del__(self):
        ready()
        time.sleep(60)


def deaf(folder):
    """Code from which no exception gets out, and then some more."""
    preemption.GRACE_SECONDS = 60
    with cli.running(), atomic_path(folder / "file"):
        _Deaf()
        time.sleep(60)


def talk(folder):
    """A command that prints for long."""
    with cli.running():
        ready()
        while True:
            print("more")


def say(folder):
    """A command that prints a little."""
    with cli.running():
        print("some")


if __name__ == "__main__":
    # What a shell's background and nohup ignore is heard here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with exit_on_user_error():
        globals()[sys.argv[1]](Path(sys.argv[2]))
