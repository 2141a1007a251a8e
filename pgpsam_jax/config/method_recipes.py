"""Training recipes of the compared methods' authors, adapted to the common protocol.

Common to all methods: data, few-shot list, augmentation, image size, evaluation, number of steps.
Specific to a method: optimizer, schedule, loss weights, batch size and trainable parts of the
encoder (docs/methods.md). Comments name what is left out of the original recipe.
"""

from typing import Any

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

# Left out: batch 32, 500 epochs, crop and color augmentation. All classes are prompted, not only
# those present in an image.
_SURGICALSAM = {
    "model.train_encoder": "frozen",
    "optim.name": "adam",
    "optim.learning_rate": 1e-3,
    "optim.final_learning_rate": 0.0,
    "optim.weight_decay": 1e-4,
    "optim.decay": "constant",
    "optim.warmup_fraction": 0.0,
}

_NO_AUGMENTATION = {
    "model.train_encoder": "frozen",
    "augment.rotate_probability": 0.0,
    "augment.scale_probability": 0.0,
    "augment.elastic_probability": 0.0,
    "train.steps": 1,
}
# Fitted once, without augmentation (`lbfgs_step.py`). Left out: ten random images, SAM at 1024 px.
_FSSP = _NO_AUGMENTATION | {"model.prompt": "both"}
# No trainable parameters.
_SAM = _NO_AUGMENTATION | {"model.prompt": "box"}

# Adam at a constant rate, batch 4. Left out: decay on plateaus of the last batch's loss, which
# depends on noise; 120 epochs; input of 1024 px.
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

# SAMed's at a fifth of its rate, decay to the end of the run. Left out: the same as for SAMed.
_SAMLST = {
    "model.train_encoder": "frozen",
    "optim.learning_rate": 1e-3,
    "optim.decay": "polynomial",
    "optim.final_learning_rate": 0.0,
}

# Ours: nnU-Net's loss, and AdamW, which a few hundred steps need in place of its SGD.
_UNET = {
    "model.base": "",
    "model.train_encoder": "full",
    "optim.learning_rate": 2e-3,
    "optim.weight_decay": 0.01,
    "optim.decay": "polynomial",
    "optim.final_learning_rate": 0.0,
    "train.ce_weight": 1.0,
    "train.dice_weight": 1.0,
}

# One per method, in the order of tables.
RECIPES: dict[str, dict[str, Any]] = {
    "pgpsam": {},
    "samed": _SAMED,
    "hsam": _HSAM,
    "autosam": _AUTOSAM,
    "samlst": _SAMLST,
    "surgicalsam": _SURGICALSAM,
    "fssp": _FSSP,
    "unet": _UNET,
    "sam": _SAM,
}
# Of a preset, beside its method's: the authors of PGP-SAM show Meta's SAM colors from 0 to 1.
_PRESETS = {"release": {"model.colors": "unit"}}


def recipe_of(name: str, preset: str = "") -> dict[str, Any]:
    """Returns the configuration fields that a method's recipe sets, {"optim.name": ...}."""
    return RECIPES.get(name, {}) | _PRESETS.get(preset, {})


def intrinsic_settings(name: str, preset: str = "") -> dict[str, Any]:
    """Returns the part of a recipe that defines the method itself.

    All methods then share optimizer, schedule, loss weights, batch and LoRA rank.
    """
    own = recipe_of(name, preset).items()
    return {k: v for k, v in own if k.startswith("model.") and k != "model.lora_rank"}


def apply_recipe(config: ConfigDict, name: str) -> None:
    """Sets a method and its recipe in a configuration."""
    config.model.name = name
    config.update_from_flattened_dict(recipe_of(name))
