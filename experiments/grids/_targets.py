"""The settings of every grid: the paper's on Synapse, and small ones that run on two CPU cores.

`phantom` adapts a small SAM, weights/sam_vit_t, to generated CT; `pgpsam pretrain`
trains it on generated CT of another seed. It shows that a study runs, and the effect of a module
*there*; it says nothing about Meta's weights or patients. `hippocampus` adapts LiteMedSAM to real
patients: `--set data.root=FOLDER` (configs/hippocampus.py). `phantom_lite_medsam` adapts it to the
generated CT.
"""

SYNAPSE, PHANTOM = "synapse", "phantom"
HIPPOCAMPUS, LITE_MEDSAM = "hippocampus", "phantom_lite_medsam"
FROM_LITE_MEDSAM = HIPPOCAMPUS, LITE_MEDSAM
SEEDS = (0, 1, 2)
SEEDED = ("seed", "fewshot.seed")  # a seed sets initialization, data order and few-shot list
PHANTOM_NOTE = (
    "Generated phantoms, 400 steps of 4 slices, gradients clipped to norm 1, weight decay 0.01 "
    "where a recipe sets none; all rows but the U-Net start from the same small SAM, trained on "
    "other phantoms with the same kinds of organs (experiments.pretrain), not from Meta's: "
    "differences hold in this setting only."
)
_PHANTOM = {
    "model.base": "weights/sam_vit_t",
    "model.train_encoder": "lora",
    "fewshot.fraction": 0.10,
    "optim.learning_rate": 3e-3,  # the paper's: SAM is not trained from scratch
    "train.steps": 400,
    "log.every_steps": 20,
    "log.checkpoint_steps": 200,
    "eval.overlays": False,
}
_ON_TWO_CORES = {
    "train.batch_size": 8,
    "train.steps": 150,
    "log.every_steps": 30,
    "log.checkpoint_steps": 75,
    "eval.batch_size": 16,
    "eval.overlays": False,
}
HIPPOCAMPUS_NOTE = (
    "Real T1 MR crops (Medical Segmentation Decathlon, Task04), split by person, 56 px, 150 steps "
    "of 8 slices; all rows but the U-Net start from LiteMedSAM. A seed sets initialization, data "
    "order and few-shot list. PGP-SAM, release, sees 64 px: its class maps need 8 heads to divide "
    "half the number of tokens."
)
LITE_MEDSAM_NOTE = (
    "Generated phantoms, 128 px, 150 steps of 8 slices, gradients clipped to norm 1; all rows but "
    "the U-Net start from LiteMedSAM, which was trained on patients, not on phantoms."
)
# Rows that cannot take the setting as it is, in every grid that has them.
_EXCEPTIONS = {HIPPOCAMPUS: {"pgpsam_release": {"model.image_size": 64}}}
# Config file, fields for all cells, seeds, notes.
_TARGETS: dict[str, tuple[str, dict, tuple[int, ...], tuple[str, ...]]] = {
    SYNAPSE: ("configs/synapse.py", {}, SEEDS, ()),
    PHANTOM: ("configs/phantom.py", _PHANTOM, SEEDS, (PHANTOM_NOTE,)),
    HIPPOCAMPUS: (
        "configs/hippocampus.py:20slices",
        _ON_TWO_CORES,
        tuple(range(6)),
        (HIPPOCAMPUS_NOTE,),
    ),
    LITE_MEDSAM: (
        "configs/phantom_lite_medsam.py",
        _ON_TWO_CORES
        | {"fewshot.fraction": 0.10, "model.train_encoder": "lora", "train.encoded_copies": 0},
        SEEDS,
        (LITE_MEDSAM_NOTE,),
    ),
}


def target(variant: str) -> dict:
    """Returns the fields of a plan that depend on data and weights."""
    if variant not in _TARGETS:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(_TARGETS)}")
    config, overrides, seeds, notes = _TARGETS[variant]
    return {
        "config": config,
        "overrides": dict(overrides),
        "exceptions": _EXCEPTIONS.get(variant, {}),
        "seeds": seeds,
        "seed_fields": SEEDED,
        "notes": notes,
    }
