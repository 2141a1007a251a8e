"""User settings: config files, `--config.model.k=2`, `--set model.k=2`.

A config file is Python with `get_config()`, or `get_config(variant)` for `FILE:VARIANT`. Values on
the command line are parsed by the type of their field: None unsets an optional field, `()` is an
empty tuple, text needs no quotes.
"""

import ast
import difflib
import functools
import importlib.machinery
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ml_collections import ConfigDict

from pgpsam_jax.config import defaults, exclusive_fields, serialization
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils import shipped
from pgpsam_jax.utils.untrusted_text import sanitize

_FLAG = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_FOLDERS = {"config": "configs", "grid": "experiments/grids"}  # of shipped files
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def load_file(spec: str) -> ConfigDict:
    """Returns the configuration of `FILE` or `FILE:VARIANT`."""
    path, get_config, variant = load_function(spec, "get_config", "config")
    try:
        return get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's code does
        raise UserError(f"config file {path}: {_reason(error)}") from None


class _Uncached(importlib.machinery.SourceFileLoader):
    """Compiles a file without Python's cache, which compares only size and second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(spec: str, function: str, what: str) -> tuple[str, Callable[..., Any], str]:
    """Loads a function from a Python file.

    Args:
      spec: `FILE` or `FILE:VARIANT`; a shipped file may go by its bare name.
      function: its name.
      what: kind of file, `config` or `grid`.

    Returns:
      (file, function, variant).

    Raises:
      UserError: the file is missing, fails to run, or lacks the function.
    """
    name, _, variant = spec.partition(":")
    path = str(shipped.find(name, _FOLDERS[what]))
    if not Path(path).is_file():
        raise UserError(f"{what} {name} not found; {shipped.hint(name, _FOLDERS[what])}")
    if Path(path).suffix != ".py":
        raise UserError(f"{what} file {path} is not a Python file; its name must end in .py")
    title = f"_{what}_{Path(path).stem}"
    module = ModuleType(title)
    module.__file__ = path
    try:
        _Uncached(title, path).exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's code does
        raise UserError(f"{what} file {path} cannot be run: {_reason(error)}") from None
    if not callable(getattr(module, function, None)):
        raise UserError(f"{what} file {path} defines no {function}()")
    return path, getattr(module, function), variant


def split_flags(argv: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Splits arguments into those that set no field, and field -> text."""
    rest, fields, arguments = [], {}, iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif match := _FLAG.fullmatch(argument):
            no, field, text = match.groups()
            if no and text is not None:
                raise UserError(f"{argument}: --noconfig.FIELD takes no value")
            if text is None:
                on_off = isinstance(_default(field)[0], bool)
                if no and not on_off:
                    raise UserError(f"{argument}: {field} is not a switch; set it to a value")
                text = str(not no) if on_off else next(arguments, None)
            if text is None:
                raise UserError(f"{argument} has no value; write {argument}=VALUE")
            fields[field] = text
        else:
            rest.append(argument)
    return rest, fields


def assign(config: ConfigDict, fields: dict[str, Any], source: str) -> None:
    """Sets the fields given by one source; unsets exclusive ones of other sources.

    Args:
      config: changed in place.
      fields: `model.k` -> value, or its text.
      source: names the source, for error messages and `exclusive_fields`.

    Raises:
      UserError: a field does not exist or cannot have the value.
    """
    if {"train.steps", "train.epochs"} <= fields.keys() and fields["train.steps"] not in (0, "0"):
        raise UserError(f"train.steps and train.epochs exclude each other; give one ({source})")
    with exclusive_fields.set_by(source):
        for field, value in fields.items():
            _set(config, field, value)


def _set(config: ConfigDict, field: str, value: Any) -> None:
    default, kind = _default(field)
    if isinstance(value, str) and kind is not str:
        value = _read(field, value, default, kind)
    elif value == "None" and default == "":
        value = ""
    *parts, last = field.split(".")
    section = config
    for part in parts:
        section = section[part]
    value = tuple(value) if isinstance(value, list) else value
    unset = value is None and default is not None
    if unset or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{field} cannot be {value!r}; {_wanted(default, kind)}")
    try:
        section[last] = value
    except (TypeError, ValueError):
        raise UserError(f"{field} cannot be {value!r:.60}; {_wanted(default, kind)}") from None


@functools.cache
def _defaults() -> ConfigDict:
    return defaults.default_config()


def _default(field: str) -> tuple[Any, type]:
    """(default value, kind) of a field."""
    value = fields = _defaults()
    section, _, last = field.rpartition(".")
    try:
        for part in section.split(".") if section else ():
            value = value[part]
        kind = value.get_type(last)
        value = value[last]
    except (AttributeError, KeyError, TypeError, ValueError):
        near = difflib.get_close_matches(field, serialization.flatten(fields.to_dict()), 1, 0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no such configuration field: {sanitize(field)}{hint}") from None
    if isinstance(value, ConfigDict):
        raise UserError(f"{field} is a section; set a field of it, as {field}.{next(iter(value))}")
    return value, kind


def _read(field: str, text: str, default: Any, kind: type) -> Any:
    """Parses the text of a field that is not a string."""
    word = text.strip()
    try:
        if default is None and word.lower() in ("none", ""):
            return None
        if kind is bool:
            return _WORDS[word.lower()]
        if kind is tuple:
            return _tuple(word, default)
        if kind is int and not re.fullmatch(r"[+-]?\d+", word):
            number = float(word)  # 1e3
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(word)
    except (KeyError, ValueError, OverflowError):
        raise UserError(
            f"{field} cannot be {sanitize(text, 60)!r}; {_wanted(default, kind)}"
        ) from None


def _tuple(word: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parses `(0, 100)`, `0,100`, `7`, `()`, and words without quotes: `q,v`."""
    try:
        value = ast.literal_eval(word or "()")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = [part.strip() for part in word.strip("()[]").split(",") if part.strip()]
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    kind = type(default[0]) if default else int
    kinds = (int, float) if kind is float else (kind,)
    if any(type(item) not in kinds for item in value):
        raise ValueError
    return tuple(kind(item) for item in value)


def _wanted(default: object, kind: type) -> str:
    """The remedy for an invalid value."""
    if kind is tuple:
        return f"give a list such as {default}" if default else "give a list such as (2, 5) or ()"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return f"give {names.get(kind, kind.__name__)}" + (" or None" if default is None else "")


def _reason(error: Exception) -> str:
    """An error in a user's code as one line."""
    if isinstance(error, AttributeError | KeyError) and error.args:
        text = str(error.args[0])
        if unknown := re.search(r'Key "([^"]*)" does not exist and cannot', text):
            text = f"no such configuration field: {unknown[1]}"
    else:
        text = str(error)
    return sanitize(" ".join(text.split()) or type(error).__name__, 300)
