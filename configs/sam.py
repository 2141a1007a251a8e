"""SAM as it is, prompted with the true boxes of the scored organs: AN ORACLE, not a method.

Command:  python -m pgpsam_jax.main --config configs/sam.py --workdir runs/sam
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py; nothing trains.
Recipe:   none. For every slice and organ of a test volume the prompt is made of its label, at
          network size: the bounding box, the pixel deepest inside, or both. The scores use the
          labels and bound what a method could reach that finds its prompts; every table and report
          says so, and pgpsam_jax.predict refuses the run.
Expected: not measured: neither data nor weights could be had.
Cost:     that of evaluation.
Variants: --config.model.prompt=point or both.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "sam"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "sam")
    return config
