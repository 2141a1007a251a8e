"""The command `pgpsam`: each program of the project as a subcommand."""

import difflib
import importlib
import sys
from typing import NamedTuple

from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime.startup import begin
from pgpsam_jax.version import __version__


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: defines `main()`, which parses `sys.argv`.
        text: its line of `pgpsam --help`; empty for what other commands start.
        arguments: put before those of the user.
    """

    module: str
    text: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("pgpsam_jax.main", "train and evaluate a run, or resume it"),
    "evaluate": Command("pgpsam_jax.main", "evaluate a trained run", ("--mode", "evaluate")),
    "predict": Command(
        "pgpsam_jax.predict", "write masks for NIfTI files, with a run or SAM and boxes"
    ),
    "tune": Command("pgpsam_jax.evaluation.tune", "choose how masks are made, by validation cases"),
    "verify": Command("pgpsam_jax.verify", "check a data set before training"),
    "report": Command("pgpsam_jax.report.__main__", "write the HTML report of a run or a grid"),
    "fetch": Command("weights_conversion.fetch", "download published SAM weights by name"),
    "convert": Command("weights_conversion.convert", "convert SAM and PGP-SAM checkpoints"),
    "grid": Command("experiments.run_grid", "run the cells of an experiment grid"),
    "tables": Command("experiments.tables", "print the tables of runs and grids"),
    "knockout": Command("experiments.knockout", "score a run with parts of PGP-SAM switched off"),
    "pretrain": Command("experiments.pretrain", "train the small SAM of the phantom grids"),
    "benchmark": Command("experiments.benchmark.__main__", "time steps, beside PyTorch if asked"),
    "scaling": Command("experiments.scaling.__main__", "measure or compile steps on many devices"),
    "cell": Command("experiments.run_cell", ""),
}


def _help() -> str:
    listed = {name: command.text for name, command in COMMANDS.items() if command.text}
    width = max(map(len, listed))
    lines = [f"  {name:{width}}  {text}" for name, text in listed.items()]
    return "\n".join(
        [
            "Few-shot medical image segmentation with SAM and PGP-SAM in JAX.",
            "",
            "usage: pgpsam COMMAND ...   (pgpsam COMMAND --help, pgpsam --version)",
            "",
            *lines,
            "",
            "  pgpsam train --config phantom          the built-in demo",
            "  pgpsam report runs/phantom             its report",
        ]
    )


def main() -> None:
    """Entry point; imports only what the subcommand needs."""
    begin()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print(f"pgpsam_jax {__version__}")
    else:
        with exit_on_user_error():
            if name not in COMMANDS:
                near = difflib.get_close_matches(name, COMMANDS, 1)
                hint = f"did you mean {near[0]}?" if near else "pgpsam --help lists them"
                raise UserError(f"pgpsam has no command {name}; {hint}")
        _start(name, COMMANDS[name], arguments)


def _start(name: str, command: Command, arguments: list[str]) -> None:
    from pgpsam_jax.runtime.malloc import keep_freed_memory
    from pgpsam_jax.utils.shipped import make_importable

    keep_freed_memory()
    make_importable()
    sys.argv = [f"pgpsam {name}", *command.arguments, *arguments]
    sys.exit(importlib.import_module(command.module).main())


if __name__ == "__main__":
    main()
