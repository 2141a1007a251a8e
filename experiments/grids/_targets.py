"""The two settings every grid has: the paper's on Synapse, and a small one that runs anywhere.

`phantom` starts from a small SAM, weights/sam_vit_t, that `python -m experiments.pretrain` trains
on generated CT of another seed, and adapts it to generated CT: it shows that a study runs, and what
a module does *there*; it says nothing about Meta's weights or patients.
"""

SYNAPSE, PHANTOM = "synapse", "phantom"
SEEDED = ("seed", "fewshot.seed")  # a seed is a model, an order of data and a few-shot list
PHANTOM_NOTE = (
    "Generated phantoms, 400 steps of 4 slices, gradients clipped to norm 1, weight decay 0.01 "
    "where a recipe has none of its own; every row starts from the same small SAM, trained on "
    "other phantoms with organs of the same kinds (experiments.pretrain), not Meta's: shows what "
    "differs in this setting only."
)
_PHANTOM = {
    "model.base": "weights/sam_vit_t",
    "model.train_encoder": "lora",
    "fewshot.fraction": 0.10,
    "optim.learning_rate": 3e-3,  # the paper's again: nothing is trained from scratch
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
