"""Command line: python -m pgpsam_jax.main --config configs/synapse.py --workdir runs/synapse.

The same command goes on with a run that was stopped. Exit codes: 0 done; 2 a mistake, said in a
sentence; 69 another process of the run is gone; 75 stopped by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1,
after the step under way and its checkpoint; 130 by a second Ctrl-C, at once; 1 anything else.
"""

import re
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from pgpsam_jax import cluster, interruption
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.files import local
from pgpsam_jax.hostmemory import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; fields are set as --config.model.lora_rank=8.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config name>.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate a trained workdir."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off"],
    "Several processes as SLURM, Open MPI, Cloud TPU or Kubernetes starts them, or this one alone.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where no scheduler names it."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def parse(argv):
    """absl's parsing, with what it makes of an unknown field or a bad value said in a sentence."""
    with exit_on_user_error():
        for name, _, value in (word.rpartition("=") for word in argv[1:]):
            local(value, name or "a flag's")
        try:
            rest = flags.FLAGS(argv)
            getattr(_CONFIG.value, "name", None)  # a file that failed to load raises only here
        except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{_essence(error)} (--help lists the flags)") from None
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; settings look like --config.seed=1")
        return rest


def _essence(error: Exception) -> str:
    """One line of an error of the flags, which may carry a traceback of the config file."""
    text = str(error)
    if isinstance(error, AttributeError | KeyError):
        text = f"no such configuration field: {error.args[0]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OSError):
        return f"config file cannot be loaded: {lines[-1]}"
    if any("Traceback" in line for line in lines):
        lines = [line for line in lines if re.match(r"\w+(Error|Exception): ", line)][-1:]
    return " ".join(lines)


def main(_):
    with exit_on_user_error(), interruption.listening():
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
        warnings.filterwarnings("default", module="pgpsam_jax")
        config, evaluate = _CONFIG.value, _MODE.value == "evaluate"
        if evaluate and _WORKDIR.value is None:
            raise UserError("--mode evaluate needs --workdir, the folder of a trained run")
        if config is None and not evaluate:
            raise UserError("no configuration; give --config configs/phantom.py, for example")
        workdir = local(_WORKDIR.value or f"runs/{config.name}", "--workdir")
        place = _place()
        # JAX: not before the mistakes that show without it
        from pgpsam_jax import memory_advice, session, train
        from pgpsam_jax.compilation import keep_compiled, start
        from pgpsam_jax.config import check

        if config is not None:
            check(config)
        keep_compiled()
        with session.joined(place), memory_advice.explained(config, workdir):
            start()
            if evaluate:
                train.evaluate_workdir(workdir, config)
            else:
                train.train(config, workdir)


def _place() -> cluster.Place | None:
    """Which of how many processes this is; None for one alone."""
    place = cluster.from_flags(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _COORDINATOR.value is not None or _DISTRIBUTED.value == "off":
        return place
    return cluster.from_scheduler()


def run():
    """Entry point."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    keep_freed_memory()
    run()
