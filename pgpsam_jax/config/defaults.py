"""All configuration fields with their defaults, and presets: small encoder, LiteMedSAM, release."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.config.exclusive_fields import DataSettings, FewShotSettings, TrainSettings
from pgpsam_jax.config.method_recipes import recipe_of
from pgpsam_jax.config.optimizer import OptimConfig


def default_config() -> ConfigDict:
    """Returns all fields with the values of the paper's Synapse run."""
    config = ConfigDict()
    config.name = "run"  # default workdir: runs/<name>
    config.seed = 0  # of initialization, data order and augmentation
    # Bit-reproducible on GPUs, at some cost in speed; CPU and TPU always are.
    config.deterministic = False

    config.model = ConfigDict()
    # Method: pgpsam, samed, hsam, autosam, samlst, surgicalsam, fssp, unet, or sam (an oracle).
    config.model.name = "pgpsam"
    # Of pgpsam: paper (its equations), release (the authors' code), plus (ours: docs/plus.md).
    config.model.preset = "paper"
    config.model.encoder = "vit_b"  # vit_t, vit_b, vit_l, vit_h
    config.model.base = ""  # SAM: a name (pgpsam fetch) or converted weights; empty = random
    # Input colors of the encoder: auto (those the base was trained on; unit without one), unit (0
    # to 1), normalized (by SAM's mean and SD).
    config.model.colors = "auto"
    # How what a method adds to SAM is initialized: auto (docs/paper.md), sam (small), random.
    config.model.start = "auto"
    config.model.start_scale = 0.1  # scale of the small additions, and of the noise below
    # What each class's mask token and hypernetwork start from: random, or sam (a copy, with noise,
    # of the trained ones).
    config.model.class_tokens = "random"
    config.model.train_encoder = "lora"  # lora, full, frozen
    config.model.image_size = 512  # side of the network's input in pixels
    config.model.patch_size = 16  # side of a token in pixels
    config.model.alpha = 8  # inter-class prototypes per class
    config.model.k = 4  # inter-class prototypes matched to each class
    config.model.mix_start = 0.5  # initial alpha and beta of Eq 5: how strongly PPR refines
    config.model.ppr_norm = True  # LayerNorm on P^ and F^ of Eq 5, as the release has it
    config.model.stage_taps = ()  # encoder blocks, one per stage; empty = last, first global
    config.model.cfm = True  # contextual feature modulation; cfm, ppr, ppg: switches of Table 3
    config.model.ppr = True  # progressive prototype refinement
    config.model.ppg = True  # prototype-guided prompt generator
    config.model.dcn = "deformable"  # preset release; or plain: dilated convolutions, no gathers
    config.model.token_order = "released"  # preset release; or transposed: docs/release.md
    # Method hsam; or intended: uses its second decoder's mask attention (docs/methods.md).
    config.model.mask_gate = "released"
    config.model.prompt_tokens = 4  # method surgicalsam: sparse prompts per class
    config.model.prompt = "both"  # methods fssp and sam: prompts are point, box, or both
    config.model.unet_width = 16  # method unet: channels at the image's resolution
    config.model.cnn_base = ""  # method samlst: converted ResNet-18; empty = a random start
    config.model.lora_rank = 4  # of the low-rank updates
    config.model.lora_targets = ("q", "v")  # projections with an update, of q, k and v
    config.model.compute_dtype = "float32"  # or bfloat16; parameters and softmaxes are float32
    # The encoder's kernel: auto, or naive, folded, lean, cudnn (GPU, bfloat16), splash (TPU).
    config.model.attention = "auto"
    # What its backward pass recomputes to save memory: none, attention, dots, blocks.
    config.model.remat = "none"
    config.model.scan_blocks = False  # compile blocks that repeat once; memory for their weights

    config.data = DataSettings()
    config.data.layout = "btcv"  # btcv, nnunet, transunet, pairs, phantom
    config.data.root = ""  # folder of the data set
    config.data.image_glob = ""  # layout pairs: the part matched by * is the case id
    config.data.label_glob = ""  # layout pairs: label files, with the same *
    config.data.label_table = ""  # JSON file; empty = the layout's own (btcv, phantom, nnunet)
    # How a volume's intensities become 0 to 1: window (the same for all volumes), percentile (of
    # each volume, for MR, whose intensities have no unit), or zscore (mean -3 to +3 SD of each).
    config.data.normalize = "window"
    config.data.window = (-125.0, 275.0)  # normalize window: intensities mapped to 0 and 1
    config.data.percentiles = (0.5, 99.5)  # normalize percentile: percents mapped to 0 and 1
    # Orientation of slices: auto (as most training cases were acquired), axial, coronal, sagittal.
    config.data.axis = "auto"
    config.data.levels = 0  # gray levels to round down to; 0 = continuous, 256 = 8 bits
    # Or btcv_18_6_6, given, file, fraction, group, folds, all (no test cases), within_volume.
    config.data.split = "btcv_18_12"
    config.data.split_file = ""  # JSON lists of case ids: train, test, perhaps validation
    # Group of a case, which is never in two parts: a regular expression that is searched in the
    # case id and whose one capture group names it, such as (patient[0-9]+)_scan.
    config.data.group = ""
    config.data.group_file = ""  # or a JSON or CSV file with the group of each case (docs/data.md)
    config.data.test_fraction = 0.4  # of the patients or groups, splits fraction and group
    # Of the patients or groups, splits fraction, group and folds.
    config.data.validation_fraction = 0.0
    config.data.folds = 5  # split folds: equal parts of the cases, or of the groups if there are
    config.data.fold = 0  # split folds: the part that is tested, from 0; the others are trained on
    config.data.split_seed = 0  # of splits fraction, group and folds
    config.data.cache_dir = ""  # empty = <workdir>/cache
    config.data.resident_gib = 2.0  # a few-shot set up to this size stays on each device
    config.data.max_gib = 2.0  # of a volume as float32; a larger one counts as a broken file
    config.data.phantom_seed = 0  # of the generated phantoms
    config.data.verify = True  # checks each file before its first use (pgpsam_jax.verify)

    config.fewshot = FewShotSettings()
    config.fewshot.file = ""  # an existing list, in place of the rule below
    config.fewshot.rule = "random"  # random, area, volumes, every, all
    config.fewshot.pool = "valid"  # valid = slices with an organ of min_pixels; or all
    config.fewshot.min_pixels = 100  # pixels of an organ in the slice, at native resolution
    config.fewshot.fraction = config_dict.placeholder(float)  # of the pool's slices
    config.fewshot.count = config_dict.placeholder(int)  # slices, in place of a fraction
    config.fewshot.volumes = config_dict.placeholder(int)  # rule volumes: whole volumes
    config.fewshot.every = config_dict.placeholder(int)  # rule every: each n-th slice
    config.fewshot.seed = config_dict.placeholder(int)  # None = the rule's own default

    config.augment = ConfigDict(dataclasses.asdict(AugmentConfig()))
    config.optim = ConfigDict(dataclasses.asdict(OptimConfig()))
    config.optim.clip_norm = config_dict.placeholder(float)

    config.train = TrainSettings()
    config.train.batch_size = 12  # global, over all devices
    config.train.microbatches = 1  # parts of a batch, processed in turn: less memory, more time
    config.train.epochs = 300  # passes over the few-shot slices
    config.train.steps = 0  # > 0 overrides epochs
    config.train.ce_weight = 0.2  # of cross-entropy in the loss
    config.train.dice_weight = 0.8  # of Dice in the loss
    # Frozen encoders: number of augmented copies of each slice to encode once, which epochs use in
    # turn; 0 = encode in each step.
    config.train.encoded_copies = 0

    config.validation = ConfigDict()
    # Epochs between validations, which keep the best parameters; 0 = off, keep the last.
    config.validation.every_epochs = 0
    # Epochs after which to warn of a class that validation never predicted; 0 = never.
    config.validation.dead_epochs = 30

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that share a batch; -1 = the remaining ones
    config.mesh.fsdp = 1  # devices that share a batch and the parameters
    config.mesh.tensor = 1  # devices that share the attention heads and MLP widths

    config.log = ConfigDict()
    config.log.every_steps = 10  # steps between lines of metrics
    config.log.checkpoint_steps = 200  # steps between checkpoints
    config.log.tensorboard = False  # also write TensorBoard events; needs tensorboardX
    config.log.report = True  # write report/report.html in the workdir when a command ends

    config.eval = ConfigDict()
    config.eval.batch_size = 8  # slices per prediction step, over all devices
    # Passes over moved images that are averaged: 1, 5 or 9. If this, smooth or components is unset,
    # it is what `pgpsam tune` chose for the run, else plain.
    config.eval.shifts = config_dict.placeholder(int)
    config.eval.smooth = config_dict.placeholder(float)  # mm, SD of a Gaussian across slices
    # Connected components to keep, as a share of an organ's largest: 0 = all, 1 = the largest.
    config.eval.components = config_dict.placeholder(float)
    config.eval.nsd_tolerance_mm = 2.0  # of the normalized surface Dice
    config.eval.overlays = True  # one picture per test case
    # Worker processes that score and write while the device predicts; -1 = one per core, 0 = none.
    config.eval.workers = -1
    return config.lock()


def use_small_encoder(config: ConfigDict) -> None:
    """Sets a four-block encoder at 128 px, trained from scratch in minutes on two CPU cores.

    SAM weights of that size do not exist, hence the lower learning rate and decay, the clipping
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


def use_lite_medsam(config: ConfigDict, image_size: int) -> None:
    """Sets LiteMedSAM as the base, with LoRA, at a size for CPU cores.

    Args:
      config: of `default_config`, changed in place.
      image_size: in pixels, divisible by 4; LiteMedSAM was trained at 256.
    """
    config.model.base = "lite_medsam"
    config.model.encoder = "tiny_vit"
    config.model.train_encoder = "lora"
    config.model.image_size = image_size
    config.model.patch_size = 4
    config.optim.clip_norm = 1.0
    config.train.batch_size = 4
    config.log.every_steps = 10
    config.log.checkpoint_steps = 100
    config.eval.batch_size = 8


def use_release_recipe(config: ConfigDict) -> None:
    """Sets the authors' model, 8-bit slices, list rule, augmentation and best-epoch selection.

    Colors are from 0 to 1 with any weights, as the authors show them to Meta's.
    """
    config.model.preset = "release"
    config.update_from_flattened_dict(recipe_of("pgpsam", "release"))
    config.model.lora_rank = 5
    config.data.levels = 256
    config.fewshot.rule = "area"
    config.augment.update(dataclasses.asdict(RELEASE))
    config.validation.every_epochs = 1


def total_steps(steps: int, epochs: int, batch_size: int, epoch_size: int) -> int:
    """Returns the steps of a run: `steps`, or if that is 0 as many as cover the epochs."""
    return steps or max(1, -(-epochs * epoch_size // batch_size))
