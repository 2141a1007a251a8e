"""The run configuration: every field with its default, and how it is stored and compared.

A config file (`configs/*.py`) calls `default_config()` and changes what differs. The dictionary is
locked: a field that does not exist is an error, in a file and on the command line.
"""

import dataclasses
import json
import math
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from pgpsam_jax.config import exclusive
from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.config.exclusive import SIZES, DataSettings, FewShotSettings, TrainSettings
from pgpsam_jax.errors import UserError
from pgpsam_jax.training.optimizer import OptimConfig
from pgpsam_jax.utils.files import local, write_json
from pgpsam_jax.utils.untrusted_text import read_json, shown

MOST = 2**31 - 1  # of a whole number, a seed too: the step carries them in 32 bits
# Numbers are 0 or more, but for these: 1 or more, -1 or more, any. Optimiser and augmentation look
# after their own (`OptimConfig`, `AugmentConfig`).
_COUNTS = """
    model.image_size model.patch_size model.alpha model.k model.prompt_tokens train.batch_size
    train.microbatches train.epochs fewshot.count fewshot.volumes fewshot.every log.every_steps
    log.checkpoint_steps eval.batch_size
""".split()
_LEAST = dict.fromkeys(_COUNTS, 1)
_LEAST |= dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor", "eval.workers"), -1)
_LEAST |= dict.fromkeys(("model.mix_start", "data.window"), -math.inf)


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
    # What a method adds to SAM starts: auto (docs/paper.md), sam (small), drawn (as any layer).
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


def total_steps(config: ConfigDict, epoch_size: int) -> int:
    """Steps of the whole run: `train.steps`, or as many as cover `train.epochs`."""
    if config.train.steps > 0:
        return config.train.steps
    return max(1, -(-config.train.epochs * epoch_size // config.train.batch_size))


def to_json(config: ConfigDict) -> dict:
    """The configuration as plain JSON values."""
    return json.loads(config.to_json(sort_keys=True))


def from_json(value: dict, where: str = "stored configuration") -> ConfigDict:
    """A stored configuration on top of the defaults; unknown fields are an error.

    `where` starts the error message.
    """
    config = default_config()
    try:
        value = _tuples(_of_today(value))
        _check_kinds(flat(value), flat(config.to_dict()))
        config.update(value)
        check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{where} does not fit this version: {reason}") from None
    return config


def check(config: ConfigDict) -> None:
    """Refuse addresses, numbers that their field cannot be, and few-shot settings at odds."""
    for key, value in flat(config.to_dict()).items():
        least = -math.inf if key.startswith(("optim.", "augment.")) else _LEAST.get(key, 0)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, str):
                local(item, key)
            if type(item) is int and not max(least, -MOST) <= item <= MOST:
                wanted = f"a whole number from {max(least, -MOST)} to {MOST}"
                raise UserError(f"{key} is {shown(str(item), 30)}; give {wanted}")
            if isinstance(item, float) and not (math.isfinite(item) and item >= least):
                wanted = "a finite number" + f", {least} or more" * (least > -math.inf)
                raise UserError(f"{key} is {shown(str(value), 60)}; give {wanted}")
    if len(config.data.window) != 2:
        raise UserError(f"data.window is {config.data.window}; give two numbers, (low, high)")
    exclusive.check(config.fewshot)


def _check_kinds(stored: dict, defaults: dict) -> None:
    """Refuse what `ConfigDict.update` lets through: no value, True for a number, odd lists."""
    for key, default in defaults.items():
        value = stored.get(key, default)
        if default is None:  # a placeholder, which knows its own type
            wrong = isinstance(value, bool)
        elif isinstance(default, tuple):
            kinds = {type(item) for item in default} or {int}
            kinds |= {int} if float in kinds else set()
            wrong = not isinstance(value, tuple) or not {*map(type, value)} <= kinds
        else:
            wrong = value is None or isinstance(value, bool) != isinstance(default, bool)
        if wrong:
            raise ValueError(f"{key} is {value!r:.60}, but by default {default!r:.60}")


def _of_today(value: dict) -> dict:
    """A configuration of an earlier version in the fields of this one, where nothing is lost."""
    value = {part: dict(v) if isinstance(v, dict) else v for part, v in value.items()}
    if isinstance(remat := value.get("model", {}).get("remat"), bool):  # before it had names
        value["model"]["remat"] = "blocks" if remat else "none"
    if isinstance(model := value.get("model"), dict) and "colors" not in model:
        asks_sam = model.get("name") in ("surgicalsam", "fssp", "sam")
        colors = "normalized" if asks_sam else "unit"
        value["model"] = model | {"colors": colors, "start": "drawn", "ppr_norm": False}
    fewshot, data = value.get("fewshot"), value.get("data")
    if isinstance(fewshot, dict) and fewshot.get("file"):  # beside which a rule was not used
        value["fewshot"] = fewshot | dict.fromkeys((*SIZES, "seed")) | {"rule": "random"}
    if isinstance(data, dict):
        value["data"] = data = {"axis": "axial"} | data  # before there was a choice
        if data.get("split", "file") != "file":  # nor a file of another
            value["data"] = data | {"split_file": ""}
    if value.get("optim", {}).get("accumulate_steps") == 1:  # now train.microbatches
        del value["optim"]["accumulate_steps"]
    return value


def load_config(workdir) -> ConfigDict:
    """The configuration a workdir was trained with."""
    path = local(workdir, "workdir") / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} not found, so {workdir} is no training workdir; train one with "
            "python -m pgpsam_jax.main --config CONFIG --workdir WORKDIR"
        )
    return from_json(read_json(path, "configuration"), f"configuration {path}")


def store(config: ConfigDict, workdir) -> None:
    """Write `config.json`: from here on the workdir belongs to this configuration."""
    write_json(Path(workdir) / "config.json", to_json(config))


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flat(value: dict, prefix: str = "") -> dict:
    """Nested sections as one dictionary, its keys as `model.k`."""
    fields = {}
    for key, item in value.items():
        nested = isinstance(item, dict)
        fields |= flat(item, f"{prefix}{key}.") if nested else {prefix + key: item}
    return fields
