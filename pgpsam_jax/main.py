"""Trains and evaluates a run. The same command resumes a stopped run.

Fields of the configuration are set as --config.model.lora_rank=8 and --config.optim.clip_norm=None.
Exit codes: 0 done; 2 user error, reported in one sentence; 69 another process of the run is gone;
75 stopped by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, after the current step and its checkpoint; 130
stopped at once by a second Ctrl-C; 1 anything else.

Examples:
  python -m pgpsam_jax.main --config configs/synapse.py --workdir runs/synapse
  python -m pgpsam_jax.main --workdir runs/synapse --config.train.epochs=400
  python -m pgpsam_jax.main --workdir runs/synapse --mode evaluate
"""

import argparse
import sys
import warnings
from pathlib import Path

from pgpsam_jax.distributed import cluster_env
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime import preemption
from pgpsam_jax.runtime.cli import Parser
from pgpsam_jax.runtime.malloc import keep_freed_memory

_NO_CONFIG = "no configuration; give --config phantom, for example"


class _HelpWithFields(argparse.Action):
    """Prints the flags, then every field of the configuration."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pgpsam_jax.config.field_help import describe_fields

        parser.print_help()
        print(f"\nFields of the configuration, with their defaults:\n{describe_fields()}")
        parser.exit()


def _parser() -> Parser:
    parser = Parser("pgpsam_jax.main", __doc__, add_help=False)
    parser.add_argument("-h", "--help", nargs=0, action=_HelpWithFields, help="print this help")
    parser.add_argument(
        "--config", help="config file, or the name of a shipped one; NAME:VARIANT for a variant"
    )
    parser.add_argument("--workdir", help="folder of the run; default runs/<config name>")
    parser.add_argument(
        "--mode",
        choices=["train", "evaluate"],
        default="train",
        help="train and evaluate, or evaluate a trained workdir",
    )
    parser.add_argument(
        "--distributed",
        choices=["auto", "off"],
        default="auto",
        help="auto: join processes that SLURM, Open MPI, Cloud TPU or Kubernetes started; off: run "
        "alone",
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, if no scheduler names it")
    parser.add_argument("--processes", type=int, help="number of processes, with --coordinator")
    parser.add_argument("--process", type=int, help="index of this process, from 0")
    return parser


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parses the command line; returns the flags and the configuration fields as texts."""
    fields: dict[str, str] = {}
    if any("config." in argument for argument in arguments):
        from pgpsam_jax.config.overrides import split_flags

        arguments, fields = split_flags(arguments)
    return _parser().parse_args(arguments), fields


def _configuration(flags: argparse.Namespace, fields: dict[str, str]):
    """Returns the configuration of the flags; None for the unchanged one of the workdir."""
    from pgpsam_jax.config import overrides
    from pgpsam_jax.config.serialization import load_config, validate

    path, workdir = flags.config, flags.workdir
    if path is not None:
        config = overrides.load_file(path)
    elif flags.mode == "evaluate" and not fields:
        return None
    elif workdir is not None and Path(workdir, "config.json").is_file():
        config = load_config(workdir)
    else:
        raise UserError(_NO_CONFIG)
    overrides.assign(config, fields, "the command line")
    validate(config)
    return config


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` replace those of the command line."""
    with exit_on_user_error(), preemption.handle_signals():
        flags, fields = parse(sys.argv[1:] if arguments is None else arguments)
        evaluate = flags.mode == "evaluate"
        if evaluate and flags.workdir is None:
            raise UserError("--mode evaluate needs --workdir, the folder of a trained run")
        if flags.config is None and flags.workdir is None:
            raise UserError(_NO_CONFIG)
        warnings.filterwarnings("default", module="pgpsam_jax")
        info = _process_info(flags)
        # JAX is imported after the checks that do not need it.
        config = _configuration(flags, fields)
        from absl import logging

        from pgpsam_jax.config.serialization import load_config
        from pgpsam_jax.distributed import initialize
        from pgpsam_jax.evaluation import workdirs
        from pgpsam_jax.profiling import out_of_memory
        from pgpsam_jax.report.after_run import report_after_run
        from pgpsam_jax.runtime.compilation_cache import keep_compiled, start
        from pgpsam_jax.training import train

        logging.set_verbosity(logging.WARNING)  # orbax logs each file it writes
        keep_compiled()
        workdir = flags.workdir or f"runs/{config.name}"
        with initialize.joined(info, workdir), out_of_memory.oom_to_user_error(config, workdir):
            start()
            if evaluate:
                workdirs.evaluate_workdir(workdir, config)
            else:
                train.train(config, workdir)
        config = config or load_config(workdir)
        if config.log.report and (info is None or info.process == 0):
            print(report_after_run(workdir, config.data.root, config.model.base), flush=True)


def _process_info(flags: argparse.Namespace) -> cluster_env.ProcessInfo | None:
    """Returns this process's number and count; None for a single process."""
    info = cluster_env.from_flags(flags.coordinator, flags.processes, flags.process)
    if flags.coordinator is not None or flags.distributed == "off":
        return info
    return cluster_env.from_scheduler()


if __name__ == "__main__":
    keep_freed_memory()
    main()
