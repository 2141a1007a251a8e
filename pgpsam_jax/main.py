"""Command line: python -m pgpsam_jax.main --config configs/synapse.py --workdir runs/synapse.

The same command resumes a stopped run; --workdir alone uses the run's configuration. Fields are
set as --config.model.lora_rank=8 and --config.optim.clip_norm=None.
Exit codes: 0 done; 2 user error, reported in one sentence; 69 another process of the run is gone;
75 stopped by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, after the current step and its checkpoint; 130
stopped at once by a second Ctrl-C; 1 anything else.
"""

import itertools
import warnings
from pathlib import Path

from absl import app, flags, logging

from pgpsam_jax.distributed import cluster_env
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime import preemption
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.utils.files import local

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, or FILE:VARIANT; fields are set as --config.model.lora_rank=8.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config name>.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate a trained workdir."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off"],
    "auto: join processes that SLURM, Open MPI, Cloud TPU or Kubernetes started; off: run alone.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if no scheduler names it."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.")


def parse(argv):
    """Parses flags; returns the program's name and the (field, text) pairs that are set."""
    with exit_on_user_error():
        for before, word in itertools.pairwise(argv):
            name, _, value = word.rpartition("=")
            local(value, name or before)
        try:
            fields = {}
            if any("config." in argument for argument in argv):  # needs JAX
                from pgpsam_jax.config.overrides import split_flags

                argv, fields = split_flags(argv)
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            raise UserError(f"{' '.join(str(error).split())} (--help lists the flags)") from None
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; settings look like --config.seed=1")
        return [argv[0], *fields.items()]


def _configuration(fields: dict[str, str]):
    """Returns the configuration of the flags; None for the unchanged one of the workdir."""
    from pgpsam_jax.config import overrides
    from pgpsam_jax.config.serialization import load_config, validate

    path, workdir = _CONFIG.value, _WORKDIR.value
    if path is not None:
        config = overrides.load_file(path)
    elif _MODE.value == "evaluate" and not fields:
        return None
    elif workdir is not None and Path(workdir, "config.json").is_file():
        config = load_config(workdir)
    else:
        raise UserError("no configuration; give --config configs/phantom.py, for example")
    overrides.assign(config, fields, "the command line")
    validate(config)
    return config


def main(arguments):
    with exit_on_user_error(), preemption.handle_signals():
        logging.set_verbosity(logging.WARNING)  # orbax logs each file it writes
        warnings.filterwarnings("default", module="pgpsam_jax")
        evaluate = _MODE.value == "evaluate"
        if evaluate and _WORKDIR.value is None:
            raise UserError("--mode evaluate needs --workdir, the folder of a trained run")
        if _CONFIG.value is None and _WORKDIR.value is None:
            raise UserError("no configuration; give --config configs/phantom.py, for example")
        local(_WORKDIR.value or "", "--workdir")
        info = _process_info()
        # JAX is imported after the checks that do not need it.
        config = _configuration(dict(arguments[1:]))
        from pgpsam_jax.distributed import initialize
        from pgpsam_jax.evaluation import workdirs
        from pgpsam_jax.profiling import out_of_memory
        from pgpsam_jax.runtime.compilation_cache import keep_compiled, start
        from pgpsam_jax.training import train

        keep_compiled()
        workdir = _WORKDIR.value or f"runs/{config.name}"
        with initialize.joined(info, workdir), out_of_memory.oom_to_user_error(config, workdir):
            start()
            if evaluate:
                workdirs.evaluate_workdir(workdir, config)
            else:
                train.train(config, workdir)


def _process_info() -> cluster_env.ProcessInfo | None:
    """Returns this process's number and count; None for a single process."""
    info = cluster_env.from_flags(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _COORDINATOR.value is not None or _DISTRIBUTED.value == "off":
        return info
    return cluster_env.from_scheduler()


def run():
    """Entry point."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    keep_freed_memory()
    run()
