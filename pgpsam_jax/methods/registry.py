"""The registered methods: (`config.model.name`, `config.model.preset`) -> `Segmenter` class."""

import importlib
import pkgutil

from ml_collections import ConfigDict

from pgpsam_jax import models
from pgpsam_jax.config.method_recipes import RECIPES
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.segmenter import METHODS, Segmenter, Training

__all__ = ["METHODS", "RELEASE", "Segmenter", "Training"]

RELEASE = ("pgpsam", "release")

# Importing the file of a method registers it.
for _module in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
    importlib.import_module(_module.name)
# In tables they stand in the order of their recipes.
for _key in sorted(METHODS, key=lambda key: ([*RECIPES, key[0]].index(key[0]), key[1])):
    METHODS[_key] = METHODS.pop(_key)


def key_of(settings: ConfigDict) -> tuple[str, str]:
    """Returns the key of `METHODS` that `config.model` names."""
    single = settings.name, ""
    key = single if single in METHODS else (settings.name, settings.preset)
    if key not in METHODS:
        known = ", ".join(name_of(key) for key in METHODS)
        raise UserError(
            f"unknown method {'/'.join(key)} (model.name/model.preset); choose from {known}"
        )
    return key


def name_of(key: tuple[str, str]) -> str:
    """Returns a key as text: `pgpsam/paper`, `samed`."""
    return "/".join(filter(None, key))


def method_of(settings: ConfigDict) -> type[Segmenter]:
    """Returns the class that `config.model` names."""
    return METHODS[key_of(settings)]


_TRUE = {"point": "points", "box": "boxes", "both": "points and boxes"}


def notice(settings: ConfigDict) -> str | None:
    """Returns the notice that logs and reports of a run must show; None for most methods."""
    if not method_of(settings).oracle:
        return None
    return (
        f"ORACLE: SAM is prompted with the true {_TRUE[settings.prompt]}, made from the labels of "
        "the scored volumes: not a prediction but an upper bound for methods that find their "
        "prompts."
    )


def refuse_without_labels(settings: ConfigDict) -> None:
    """Raises `UserError` for a method that cannot segment a volume without labels."""
    if method_of(settings).oracle:
        raise UserError(
            f"method {settings.name} takes its prompts from the labels of a volume, so it "
            "cannot segment one without labels (model.name); use a run of another method"
        )
