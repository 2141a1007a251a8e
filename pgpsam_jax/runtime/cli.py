"""Shared by all commands: parsing arguments, handling signals, exiting."""

import argparse
import contextlib
import math
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime import preemption
from pgpsam_jax.utils.files import local


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Runs a command that cannot be resumed: signals and user errors end it."""
    with exit_on_user_error():
        if threading.current_thread() is not threading.main_thread():  # only that one gets signals
            yield
            return
        with preemption.handle_signals(resumes=False):
            yield


def positive(text: str) -> float:
    """Parses a number above 0, for `add_argument(type=...)`."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def pair(text: str) -> tuple[float, float]:
    """Parses two ascending numbers such as -125,275, for `add_argument(type=...)`."""
    low, high = (float(part) for part in text.strip("()[] ").split(","))
    if not -math.inf < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a lower and a higher number")
    return low, high


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with unwrapped descriptions and the defaults of all flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Argument parser of a command; refuses addresses such as gs://bucket/x in all arguments.

    Args:
        module: name after `python -m`.
        text: the module's docstring; what follows the line "Examples:" is the epilog.
        prog: replaces `python -m module`, or `pgpsam COMMAND` where that was typed.
        **options: for `argparse.ArgumentParser`.
    """

    def __init__(
        self, module: str = "", text: str = "", prog: str | None = None, **options: Any
    ) -> None:
        alone = f"python -m {module}"
        if prog is None:  # argparse sets it for subcommands
            prog = sys.argv[0] if sys.argv[0].startswith("pgpsam ") else alone
        described, examples, rest = text.strip().replace(alone, prog).partition("\nExamples:\n")
        super().__init__(
            prog=prog,
            description=described,
            epilog=(examples + rest).strip() or None,
            formatter_class=_Help,
            allow_abbrev=False,
            **options,
        )
        self._negative_number_matcher = re.compile(r"-[\d.]")  # or -125,275 would be a flag

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str):
                    local(item, (action.option_strings or [str(action.metavar or action.dest)])[-1])
        return found, rest
