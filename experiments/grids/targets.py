"""The two settings every grid has: the paper's on Synapse, and a small one that runs anywhere.

`phantom` trains a four-block encoder from scratch on generated CT, 12 cells in under 20 minutes on
two CPU cores: it shows that a study runs, and what a module does *there*; it says nothing about
SAM weights or patients.
"""

SYNAPSE, PHANTOM = "synapse", "phantom"
SEEDED = ("seed", "fewshot.seed")  # a seed is a model, an order of data and a few-shot list
PHANTOM_NOTE = (
    "Generated phantoms, a small encoder trained from scratch for 400 steps, no SAM weights: shows "
    "what changes in this setting only."
)
_SMALL_SAM = "weights/sam_vit_t"
_SMALL_SAM_NOTE = (
    "Generated phantoms, 400 steps of 4 slices, gradients clipped to norm 1, weight decay 0.01 "
    "where a recipe has none of its own; every row starts from the same small SAM, trained on "
    "other phantoms with organs of the same kinds (experiments.pretrain), not Meta's: shows what "
    "differs in this setting only."
)
_PHANTOM = {
    "fewshot.fraction": 0.10,
    "train.steps": 400,
    "log.every_steps": 20,
    "log.checkpoint_steps": 200,
    "eval.overlays": False,
}


def target(variant: str) -> dict:
    """The fields `config`, `overrides`, `seed_fields` and `notes` of a plan for one setting."""
    if variant == SYNAPSE:
        return {"config": "configs/synapse.py", "overrides": {}, "seed_fields": SEEDED, "notes": ()}
    if variant == PHANTOM:
        return {
            "config": "configs/phantom.py",
            "overrides": dict(_PHANTOM),
            "seed_fields": SEEDED,
            "notes": (PHANTOM_NOTE,),
        }
    raise ValueError(f"unknown variant {variant!r}; there are {SYNAPSE} and {PHANTOM}")


def methods_target(variant: str) -> dict:
    """The same for a table of methods, some of which freeze the encoder: a small SAM for all."""
    setting = target(variant)
    if variant == PHANTOM:
        setting["overrides"] |= {
            "model.base": _SMALL_SAM,
            "model.train_encoder": "lora",
            "optim.learning_rate": 3e-3,  # the paper's again: nothing is trained from scratch
        }
        setting["notes"] = (_SMALL_SAM_NOTE,)
    return setting
