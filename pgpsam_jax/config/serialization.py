"""Stores, loads and validates configurations (`config.json`).

A config file (`configs/*.py`) calls `default_config()` and changes fields. The dictionary is
locked: unknown fields are errors, in a file and on the command line.
"""

import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgpsam_jax.config import exclusive_fields
from pgpsam_jax.config.defaults import default_config
from pgpsam_jax.config.exclusive_fields import SIZES
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath, local, write_json
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

MAX_INT = 2**31 - 1  # of integers and seeds: the step carries them in 32 bits
# Numbers are 0 or more, except for these: 1 or more, -1 or more, any. `OptimConfig` and
# `AugmentConfig` validate their fields.
_COUNTS = """
    model.image_size model.patch_size model.alpha model.k model.prompt_tokens train.batch_size
    train.microbatches train.epochs fewshot.count fewshot.volumes fewshot.every log.every_steps
    log.checkpoint_steps eval.batch_size
""".split()
_LEAST: dict[str, float] = dict.fromkeys(_COUNTS, 1)
_LEAST |= dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor", "eval.workers"), -1)
_LEAST |= dict.fromkeys(("model.mix_start", "data.window"), -math.inf)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as plain JSON values."""
    return json.loads(config.to_json(sort_keys=True))


def from_json(value: dict[str, Any], where: str = "stored configuration") -> ConfigDict:
    """Returns a stored configuration on top of the defaults.

    Args:
      value: of `to_json`, by this or an earlier version.
      where: names the source in errors.

    Raises:
      UserError: unknown fields or invalid values.
    """
    config = default_config()
    try:
        value = _tuples(_upgrade(value))
        _check_kinds(flatten(value), flatten(config.to_dict()))
        config.update(value)
        validate(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = sanitize(str(error), 200)
        raise UserError(f"{where} does not fit this version: {reason}") from None
    return config


def validate(config: ConfigDict) -> None:
    """Refuses URLs, numbers out of range, and contradictory few-shot settings."""
    for key, value in flatten(config.to_dict()).items():
        least = -math.inf if key.startswith(("optim.", "augment.")) else _LEAST.get(key, 0)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, str):
                local(item, key)
            if type(item) is int and not max(least, -MAX_INT) <= item <= MAX_INT:
                wanted = f"a whole number from {max(least, -MAX_INT)} to {MAX_INT}"
                raise UserError(f"{key} is {sanitize(str(item), 30)}; give {wanted}")
            if isinstance(item, float) and not (math.isfinite(item) and item >= least):
                wanted = "a finite number" + f", {least} or more" * (least > -math.inf)
                raise UserError(f"{key} is {sanitize(str(value), 60)}; give {wanted}")
    for field in ("window", "percentiles"):
        if len(config.data[field]) != 2:
            raise UserError(f"data.{field} is {config.data[field]}; give two numbers, (low, high)")
    exclusive_fields.check_few_shot(config.fewshot)


def _check_kinds(stored: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuses what `ConfigDict.update` accepts: None, True for a number, mixed lists."""
    for key, default in defaults.items():
        value = stored.get(key, default)
        if default is None:  # a placeholder, which knows its own type
            wrong = isinstance(value, bool)
        elif isinstance(default, tuple):
            kinds = {type(item) for item in default} or {int}
            kinds |= {int} if float in kinds else set()
            wrong = not isinstance(value, tuple) or not {*map(type, value)} <= kinds
        else:
            wrong = value is None or isinstance(value, bool) != isinstance(default, bool)
        if wrong:
            raise ValueError(f"{key} is {value!r:.60}, but by default {default!r:.60}")


def _upgrade(value: dict[str, Any]) -> dict[str, Any]:
    """Converts a configuration of an earlier version to the present fields."""
    value = {part: dict(v) if isinstance(v, dict) else v for part, v in value.items()}
    if isinstance(remat := value.get("model", {}).get("remat"), bool):  # before it had names
        value["model"]["remat"] = "blocks" if remat else "none"
    if isinstance(model := value.get("model"), dict) and "colors" not in model:
        asks_sam = model.get("name") in ("surgicalsam", "fssp", "sam")
        colors = "normalized" if asks_sam else "unit"
        value["model"] = model | {"colors": colors, "start": "random", "ppr_norm": False}
    if isinstance(model, dict) and model.get("start") == "drawn":
        value["model"] |= {"start": "random"}
    fewshot, data = value.get("fewshot"), value.get("data")
    if isinstance(fewshot, dict) and fewshot.get("file"):  # the rule was not used
        value["fewshot"] = fewshot | dict.fromkeys((*SIZES, "seed")) | {"rule": "random"}
    if isinstance(data, dict):
        value["data"] = data = {"axis": "axial"} | data  # before there was a choice
        if data.get("split", "file") != "file":  # nor a file of another
            value["data"] = data = data | {"split_file": ""}
        unit = data.get("window_unit")  # now data.normalize
        if unit in ("intensity", "percent"):
            del data["window_unit"]
        if unit == "percent" and "window" in data:
            data |= {"normalize": "percentile", "percentiles": data.pop("window")}
    if value.get("optim", {}).get("accumulate_steps") == 1:  # now train.microbatches
        del value["optim"]["accumulate_steps"]
    return value


def load_config(workdir: StrPath) -> ConfigDict:
    """Returns the configuration a workdir was trained with."""
    path = local(workdir, "workdir") / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} not found, so {workdir} is not a training workdir; train one with "
            "pgpsam train --config CONFIG --workdir WORKDIR"
        )
    return from_json(read_user_json(path, "configuration"), f"configuration {path}")


def save_config(config: ConfigDict, workdir: StrPath) -> None:
    """Writes `config.json`, which ties the workdir to this configuration."""
    write_json(Path(workdir) / "config.json", to_json(config))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections to one dictionary with keys such as `model.k`."""
    fields: dict[str, Any] = {}
    for key, item in value.items():
        nested = isinstance(item, dict)
        fields |= flatten(item, f"{prefix}{key}.") if nested else {prefix + key: item}
    return fields
