"""How the compared methods were trained by their authors, adapted to the common protocol.

Common to all: data, few-shot list, augmentation, image size, evaluation, and the steps of a run.
What is a method's own: optimiser, schedule, loss weights, batch, and what of the encoder trains
(methods.md 3 to 5). Each recipe's comment says what of the original is left out, and why.
"""

from ml_collections import ConfigDict

# Decay over 200 epochs, stopped at 160; warm-up of 250 steps (of a short run, a tenth). Left out:
# batch 24 on two devices, slices stored at 224 px, updates that lag a step behind the schedule.
_SAMED = {
    "optim.learning_rate": 5e-3,
    "optim.decay": "polynomial",
    "optim.decay_horizon": 1.25,
    "optim.final_learning_rate": 0.0,
}

RECIPES: dict[str, dict] = {
    "pgpsam": {},
    "samed": _SAMED,
}


def of(name: str) -> dict:
    """The fields of the configuration that a method's recipe sets, {"optim.name": ...}."""
    return RECIPES.get(name, {})


def use(config: ConfigDict, name: str) -> None:
    """Make a configuration that of a method, trained by its recipe."""
    config.model.name = name
    config.update_from_flattened_dict(of(name))
