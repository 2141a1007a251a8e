"""One real abdominal CT, eight organs: every third slice with organs trains, the others test.

ONE PATIENT, software labels, slices of the same volume in both splits: this shows that the pipeline
runs from file to table; it is no claim of accuracy or generalization.

Command:  pgpsam train --config abdomen_ct:small --config.data.root=FOLDER
          pgpsam train --config abdomen_ct --config.data.root=FOLDER
Data:     a FOLDER with ct.nii.gz and seg104.nii.gz, the reference case of TotalSegmentator (122 x
          101 x 112 voxels of 3 mm, Apache-2.0).
Variants: default: SAM ViT-b with LoRA at 512 px from sam_vit_b; without the weights,
          --config.model.base= trains on a random frozen backbone, and says so.
          small: a four-block encoder at 128 px trained from scratch.
          lite_medsam: LiteMedSAM with LoRA at 128 px, `pgpsam fetch lite_medsam`.
Expected: lite_medsam: not measured yet.
          small: mean Dice 0.863 on the 34 organ-bearing slices not trained on, 4 minutes on two CPU
          cores. Default: 18 s per step on two busy cores, peak memory 4.9 GiB; without the official
          weights its Dice means nothing. More in docs/results/README.md.
"""

from pgpsam_jax.config import default_config, use_lite_medsam, use_small_encoder


def get_config(variant: str = "vit_b"):
    config = default_config()
    config.name = "abdomen_ct"
    config.model.base = "sam_vit_b"
    config.data.layout = "pairs"
    config.data.image_glob = "ct.nii.gz"
    config.data.label_glob = "seg104.nii.gz"
    config.data.label_table = "configs/labels/abdomen_ct.json"
    config.data.split = "within_volume"
    config.fewshot.rule = "every"
    config.fewshot.every = 3
    config.fewshot.min_pixels = 1
    config.train.batch_size = 2
    config.train.steps = 60
    config.log.every_steps = 5
    config.log.checkpoint_steps = 20
    config.eval.batch_size = 2
    if variant == "small":
        config.name = "abdomen_small"
        config.train.steps = 600
        use_small_encoder(config)
    elif variant == "lite_medsam":
        config.name = "abdomen_lite_medsam"
        config.train.steps = 600
        use_lite_medsam(config, image_size=128)
    elif variant != "vit_b":
        raise ValueError(
            f"configs/abdomen_ct.py knows no variant {variant!r}; vit_b, small or lite_medsam"
        )
    return config
