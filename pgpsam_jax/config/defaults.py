"""Every configuration field with its default, and the small-encoder and release presets."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.config.exclusive_fields import DataSettings, FewShotSettings, TrainSettings
from pgpsam_jax.config.optimizer import OptimConfig


def default_config() -> ConfigDict:
    """All fields; the values are the paper's Synapse run."""
    config = ConfigDict()
    config.name = "run"  # default workdir: runs/<name>
    config.seed = 0
    # The same bits again on a GPU as well, at some speed; CPU and TPU need no switch for that.
    config.deterministic = False

    config.model = ConfigDict()
    config.model.name = "pgpsam"
    config.model.preset = "paper"  # its equations; release: what the authors' code computes
    config.model.encoder = "vit_b"  # vit_t, vit_b, vit_l, vit_h
    config.model.base = ""  # converted SAM weights; empty = random backbone
    # What the encoder sees of a slice: auto (what the base was trained on), unit (0 to 1, as the
    # authors' code), normalized (by SAM's mean and SD).
    config.model.colors = "auto"
    # How what a method adds to SAM is initialized: auto (docs/paper.md), sam (small), random.
    config.model.start = "auto"
    config.model.start_scale = 0.1  # of the small additions
    config.model.train_encoder = "lora"  # lora, full, frozen
    config.model.image_size = 512
    config.model.patch_size = 16
    config.model.alpha = 8  # inter-class prototypes per class
    config.model.k = 4  # of them matched to each class
    config.model.mix_start = 0.5  # alpha and beta of Eq 5 at the start, how strongly PPR refines
    config.model.ppr_norm = True  # LayerNorm on P^ and F^ of Eq 5, as the release has it
    config.model.stage_taps = ()  # encoder blocks, one per stage; empty = last, first global
    config.model.cfm = True  # the three switches of Table 3
    config.model.ppr = True
    config.model.ppg = True
    config.model.dcn = "deformable"  # preset release; or plain: dilated convolutions, no gathers
    config.model.token_order = "released"  # preset release; or transposed: docs/release.md
    # Method hsam; or intended: its second decoder's mask attention takes part (docs/methods.md).
    config.model.mask_gate = "released"
    config.model.prompt_tokens = 4  # method surgicalsam: sparse prompts of a class
    config.model.prompt = "both"  # methods fssp and sam ask with a point, a box, or both
    config.model.cnn_base = ""  # method samlst: converted ResNet-18; empty = a random start
    config.model.lora_rank = 4
    config.model.lora_targets = ("q", "v")
    config.model.compute_dtype = "float32"  # or bfloat16; parameters and softmaxes are float32
    # The encoder's kernel: auto, or naive, folded, lean, cudnn (GPU, bfloat16), splash (TPU).
    config.model.attention = "auto"
    # What its backward pass recomputes to save memory: none, attention, dots, blocks.
    config.model.remat = "none"
    config.model.scan_blocks = False  # compile blocks that repeat once; memory for their weights

    config.data = DataSettings()
    config.data.layout = "btcv"  # btcv, nnunet, transunet, pairs, phantom
    config.data.root = ""
    config.data.image_glob = ""  # layout pairs: the part that * matches is the case id
    config.data.label_glob = ""
    config.data.label_table = ""  # JSON file; empty = the layout's own (btcv, phantom, nnunet)
    config.data.window = (-125.0, 275.0)  # intensities mapped to [0, 1]
    # What the window is in: intensity, or percent of each volume's own voxels, such as (0.5, 99.5)
    # for MR, whose intensities have no unit.
    config.data.window_unit = "intensity"
    # Slices are cut along: auto (as most training cases were taken), axial, coronal, sagittal.
    config.data.axis = "auto"
    config.data.levels = 0  # grey levels they are rounded down to; 0 = continuous, 256 = 8 bits
    config.data.split = "btcv_18_12"  # or btcv_18_6_6, given, file, fraction, within_volume
    config.data.split_file = ""  # JSON lists of case ids: train, test, perhaps validation
    config.data.test_fraction = 0.4  # of the patients, split fraction
    config.data.validation_fraction = 0.0  # of the patients, split fraction
    config.data.split_seed = 0
    config.data.cache_dir = ""  # empty = <workdir>/cache
    config.data.resident_gib = 2.0  # a few-shot set up to this size stays on every device
    config.data.max_gib = 2.0  # of a volume as float32; a larger one is taken for a broken file
    config.data.phantom_seed = 0
    config.data.verify = True  # every file is checked before its first use (pgpsam_jax.verify)

    config.fewshot = FewShotSettings()
    config.fewshot.file = ""  # an existing list; the rule below is then not used
    config.fewshot.rule = "random"  # random, area, volumes, every, all
    config.fewshot.pool = "valid"  # valid = slices with an organ of min_pixels; or all
    config.fewshot.min_pixels = 100
    config.fewshot.fraction = config_dict.placeholder(float)
    config.fewshot.count = config_dict.placeholder(int)
    config.fewshot.volumes = config_dict.placeholder(int)
    config.fewshot.every = config_dict.placeholder(int)
    config.fewshot.seed = config_dict.placeholder(int)  # None = the rule's own default

    config.augment = ConfigDict(dataclasses.asdict(AugmentConfig()))
    config.optim = ConfigDict(dataclasses.asdict(OptimConfig()))
    config.optim.clip_norm = config_dict.placeholder(float)

    config.train = TrainSettings()
    config.train.batch_size = 12  # global, over all devices
    config.train.microbatches = 1  # parts of a batch, one after the other: less memory, more time
    config.train.epochs = 300
    config.train.steps = 0  # > 0 overrides epochs
    config.train.ce_weight = 0.2
    config.train.dice_weight = 0.8
    # Frozen encoders: every slice is encoded once, in so many augmented copies that epochs take in
    # turn; 0 = in every step.
    config.train.encoded_copies = 0

    config.validation = ConfigDict()
    # Score the validation cases after so many epochs and keep the best parameters; 0 = the last.
    config.validation.every_epochs = 0
    # Warn of a class of the validation cases that no pixel got for so many epochs; 0 = never.
    config.validation.dead_epochs = 30

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1 = the rest

    config.log = ConfigDict()
    config.log.every_steps = 10
    config.log.checkpoint_steps = 200
    config.log.tensorboard = False

    config.eval = ConfigDict()
    config.eval.batch_size = 8
    config.eval.nsd_tolerance_mm = 2.0
    config.eval.overlays = True
    # Processes that score and write while the device predicts; -1 = one per core, 0 = none.
    config.eval.workers = -1
    return config.lock()


def use_small_encoder(config: ConfigDict) -> None:
    """A four-block encoder at 128 px, trained from scratch: minutes on two CPU cores.

    There are no SAM weights of that size, hence the lower learning rate and decay, the clipping
    and the small batch.
    """
    config.model.base = ""
    config.model.encoder = "vit_t"
    config.model.train_encoder = "full"
    config.model.image_size = 128
    config.model.patch_size = 8
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0
    config.train.batch_size = 4
    config.log.every_steps = 10
    config.log.checkpoint_steps = 200
    config.eval.batch_size = 8


def use_release_recipe(config: ConfigDict) -> None:
    """The authors' model, 8-bit slices, list rule, augmentation and choice of the best epoch."""
    config.model.preset = "release"
    config.model.lora_rank = 5
    config.data.levels = 256
    config.fewshot.rule = "area"
    config.augment.update(dataclasses.asdict(RELEASE))
    config.validation.every_epochs = 1


def total_steps(steps: int, epochs: int, batch_size: int, epoch_size: int) -> int:
    """Returns the steps of a run: `steps`, or if that is 0 as many as cover the epochs."""
    return steps or max(1, -(-epochs * epoch_size // batch_size))
