"""Configuration sections with mutually exclusive fields: setting one unsets the others.

The later source wins: the command line over the config file, a config file over the one it builds
on. Fields set by the same source are all kept; the checks below refuse contradictions.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError

RULES = {  # rule -> (settings of which exactly one is needed, default seed)
    "random": (("fraction", "count"), 0),
    "area": (("fraction", "count"), 42),
    "volumes": (("volumes",), 0),
    "every": (("every",), 0),
    "all": ((), 0),
}
SIZES = ("fraction", "count", "volumes", "every")
_DEFAULT_RULE = "random"

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar("source", default=None)
_BETWEEN = (str(Path(ml_collections.__file__).parent), __file__)


@contextlib.contextmanager
def set_by(name: str) -> Iterator[None]:
    """Attributes fields set inside the block to the source `name`, not to the calling file."""
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


class _Section(ConfigDict):
    """Remembers which source set each field."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        sources, ours = self.__dict__.setdefault("_sources", {}), _named.get() or _caller()
        sources[key] = ours
        for field, unset in self._excluded(key).items():
            if field in self._fields and sources.get(field) != ours:
                super().__setitem__(field, unset)

    def _excluded(self, key: str) -> dict[str, Any]:
        """Fields excluded by the value of `key` -> their unset values."""
        return {}


class DataSettings(_Section):
    """`config.data`: a split file implies split `file`; globs belong to layout `pairs`.

    Groups have one source. A window implies normalization by window, percentiles that by
    percentile.
    """

    def _excluded(self, key: str) -> dict[str, Any]:
        if key == "split_file" and self[key]:
            return {"split": "file"}
        if key == "split" and self[key] != "file":
            return {"split_file": ""}
        if key == "layout" and self[key] != "pairs":
            return {"image_glob": "", "label_glob": ""}
        if key in ("group", "group_file") and self[key]:
            return {"group_file" if key == "group" else "group": ""}
        if key in ("window", "percentiles"):
            return {"normalize": key.removesuffix("s")}
        return {}


class TrainSettings(_Section):
    """`config.train`: epochs set after steps replace them."""

    def _excluded(self, key: str) -> dict[str, Any]:
        return {"steps": 0} if key == "epochs" else {}


class FewShotSettings(_Section):
    """`config.fewshot`: a list, or a rule with its one size."""

    def _excluded(self, key: str) -> dict[str, Any]:
        value = self[key]
        if value is None or value == "":
            return {}
        if key == "file":
            return dict.fromkeys(SIZES, None) | {"seed": None, "rule": _DEFAULT_RULE}
        if key == "rule":
            taken = RULES.get(value, (SIZES,))[0]
            return dict.fromkeys(set(SIZES) - set(taken), None) | {"file": ""}
        if key not in SIZES:
            return {}
        others = dict.fromkeys(set(SIZES) - {key}, None) | {"file": ""}
        if key not in RULES.get(self.get("rule"), ((key,),))[0]:
            others["rule"] = next(rule for rule, (taken, _) in RULES.items() if key in taken)
        return others


def check_few_shot(fewshot: ConfigDict) -> None:
    """Refuses few-shot settings that contradict each other."""
    sizes = {key: fewshot[key] for key in SIZES if fewshot.get(key) is not None}
    rule = fewshot.rule
    if fewshot.file:
        beside = sizes | ({"seed": fewshot.seed} if fewshot.seed is not None else {})
        beside |= {"rule": rule} if rule != _DEFAULT_RULE else {}
        if beside:
            raise UserError(
                f"fewshot.file is a complete list and excludes {_listed(beside)}; give one or the "
                "other"
            )
    if len(sizes) > 1:
        raise UserError(f"{_listed(sizes)} exclude each other; give one of them")
    if rule not in RULES:
        raise UserError(f"fewshot.rule is {rule!r}; choose from {', '.join(RULES)}")
    taken = RULES[rule][0]
    if set(sizes) - set(taken):
        takes = " or ".join(f"fewshot.{size}" for size in taken) or "no size"
        raise UserError(f"fewshot.rule is {rule!r}, which takes {takes}, not {_listed(sizes)}")


def check_few_shot_size(fewshot: ConfigDict) -> None:
    """Refuses a few-shot rule without its size."""
    taken = RULES[fewshot.rule][0]
    if not fewshot.file and taken and all(fewshot.get(size) is None for size in taken):
        raise UserError(
            f"fewshot.rule is {fewshot.rule!r}, which needs a size; give "
            f"{' or '.join(f'fewshot.{size}' for size in taken)}"
        )


def _listed(fields: dict[str, Any]) -> str:
    *first, last = (f"fewshot.{key}={value}" for key, value in fields.items())
    return f"{', '.join(first)} and {last}" if first else last


def _caller() -> str:
    """The file whose code set a field."""
    frame: FrameType | None = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def check_run_settings(config: ConfigDict) -> None:
    """Refuses settings that contradict each other, before anything is read or written."""
    check_few_shot(config.fewshot)
    check_few_shot_size(config.fewshot)
    _check_used(config.data)
    copies, trains = config.train.encoded_copies, config.model.train_encoder
    if copies and trains != "frozen":
        raise UserError(
            f"train.encoded_copies is {copies}, but model.train_encoder is {trains!r}: only a "
            "frozen encoder's features can be precomputed; set train.encoded_copies=0, or "
            "model.train_encoder=frozen"
        )


def _check_used(data: ConfigDict) -> None:
    """Refuses paths that layout or split would not use, and two sources of groups."""
    if data.group and data.group_file:
        raise UserError(
            f"data.group {data.group!r} and data.group_file {data.group_file!r} exclude each "
            "other; give one of them"
        )
    unused = {"split_file": data.split != "file" and ("split", data.split, "file")}
    pairs = data.layout != "pairs" and ("layout", data.layout, "pairs")
    for field, used_by in (unused | dict.fromkeys(("image_glob", "label_glob"), pairs)).items():
        if used_by and data[field]:
            other, value, needed = used_by
            raise UserError(
                f"data.{field} is {data[field]!r}, but data.{other} {value!r} does not use it; set "
                f"data.{other}={needed}, or leave it empty"
            )
