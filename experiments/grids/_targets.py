"""The two settings of every grid: the paper's on Synapse, and a small one that runs anywhere.

`phantom` adapts a small SAM, weights/sam_vit_t, to generated CT; `pgpsam pretrain`
trains it on generated CT of another seed. It shows that a study runs, and the effect of a module
*there*; it says nothing about Meta's weights or patients.
"""

SYNAPSE, PHANTOM = "synapse", "phantom"
SEEDED = ("seed", "fewshot.seed")  # a seed sets initialization, data order and few-shot list
PHANTOM_NOTE = (
    "Generated phantoms, 400 steps of 4 slices, gradients clipped to norm 1, weight decay 0.01 "
    "where a recipe sets none; all rows start from the same small SAM, trained on other phantoms "
    "with the same kinds of organs (experiments.pretrain), not from Meta's: differences hold in "
    "this setting only."
)
_PHANTOM = {
    "model.base": "weights/sam_vit_t",
    "model.train_encoder": "lora",
    "fewshot.fraction": 0.10,
    "optim.learning_rate": 3e-3,  # the paper's: nothing is trained from scratch
    "train.steps": 400,
    "log.every_steps": 20,
    "log.checkpoint_steps": 200,
    "eval.overlays": False,
}


def target(variant: str) -> dict:
    """Returns the fields `config`, `overrides`, `seed_fields` and `notes` of a plan."""
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
