"""How the compared methods were trained by their authors, adapted to the common protocol.

Common to all: data, few-shot list, augmentation, image size, evaluation, and the steps of a run.
What is a method's own: optimiser, schedule, loss weights, batch, and what of the encoder trains
(docs/methods.md). Each recipe's comment says what of the original is left out, and why.
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

# Rank 5, a larger share of Dice, decay to the end. Left out: batch 16 on two devices, the kinds of
# augmentation, 221 slices of all, empty ones too.
_HSAM = {
    "model.lora_rank": 5,
    "optim.learning_rate": 2.5e-3,
    "optim.decay": "polynomial",
    "optim.final_learning_rate": 0.0,
    "train.ce_weight": 0.1,
    "train.dice_weight": 0.9,
}

# Left out: batch 32, 500 epochs, crops and colours varied; classes asked for are all, not those
# that an image is known to show.
_SURGICALSAM = {
    "model.train_encoder": "frozen",
    "optim.name": "adam",
    "optim.learning_rate": 1e-3,
    "optim.final_learning_rate": 0.0,
    "optim.weight_decay": 1e-4,
    "optim.decay": "constant",
    "optim.warmup_fraction": 0.0,
}

_AS_IT_IS = {
    "model.train_encoder": "frozen",
    "augment.rotate_probability": 0.0,
    "augment.scale_probability": 0.0,
    "augment.elastic_probability": 0.0,
    "train.steps": 1,
}
# Fitted once to the slices as they are (`fit.py`). Left out: ten images at random, SAM at 1024 px.
_FSSP = _AS_IT_IS | {"model.prompt": "both"}
# Nothing trains.
_SAM = _AS_IT_IS | {"model.prompt": "box"}

# Adam at a constant rate, batch 4. Left out: the rate's fall whenever the last batch's loss has not
# improved for ten epochs, which noise decides; 120 epochs; input of 1024 px.
_AUTOSAM = {
    "model.train_encoder": "frozen",
    "optim.name": "adam",
    "optim.learning_rate": 5e-4,
    "optim.weight_decay": 0.0,
    "optim.warmup_fraction": 0.0,
    "optim.decay": "constant",
    "train.batch_size": 4,
    "train.ce_weight": 1.0,
    "train.dice_weight": 1.0,
}

# SAMed's at a fifth of its rate, decay to the end of the run. Left out: what SAMed's leaves out.
_SAMLST = {
    "model.train_encoder": "frozen",
    "optim.learning_rate": 1e-3,
    "optim.decay": "polynomial",
    "optim.final_learning_rate": 0.0,
}

# One per method, in the order of tables.
RECIPES: dict[str, dict] = {
    "pgpsam": {},
    "samed": _SAMED,
    "hsam": _HSAM,
    "autosam": _AUTOSAM,
    "samlst": _SAMLST,
    "surgicalsam": _SURGICALSAM,
    "fssp": _FSSP,
    "sam": _SAM,
}


def recipe_of(name: str) -> dict:
    """The fields of the configuration that a method's recipe sets, {"optim.name": ...}."""
    return RECIPES.get(name, {})


def intrinsic_settings(name: str) -> dict:
    """What of a recipe is the method itself; all else is left to the configuration.

    So every method has the same optimizer, schedule, loss weights, batch and LoRA rank.
    """
    own = recipe_of(name).items()
    return {k: v for k, v in own if k.startswith("model.") and k != "model.lora_rank"}


def apply_recipe(config: ConfigDict, name: str) -> None:
    """Make a configuration that of a method, trained by its recipe."""
    config.model.name = name
    config.update_from_flattened_dict(recipe_of(name))
