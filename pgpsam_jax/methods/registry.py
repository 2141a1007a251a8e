"""The registered methods: what `config.model.name` builds, trains with, and takes from SAM."""

import dataclasses
import enum
from collections.abc import Callable

from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import losses
from pgpsam_jax.models import segmenter
from pgpsam_jax.models.baselines import (
    autosam,
    fssp_sam,
    hsam,
    prompted_sam,
    sam_lst,
    sam_oracle,
    samed,
    surgicalsam,
)
from pgpsam_jax.models.pgpsam import model as paper
from pgpsam_jax.models.pgpsam_release import model as release
from pgpsam_jax.models.sam.lora import TARGETS, LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.sam.weights import colors_of_base

STARTS = ("auto", "sam", "drawn")  # what a method's additions to SAM start as
RELEASE = ("pgpsam", "release")


class Training(enum.Enum):
    """How the parameters of a method are found."""

    SGD = "training"  # steps over batches, by the optimizer of `config.optim`
    LBFGS = "fit"  # one full-batch fit to the whole few-shot list
    NONE = "none"  # there are none


@dataclasses.dataclass(frozen=True)
class Method:
    """A segmentation method: its module, what it takes from a converted SAM, how it trains.

    label: in tables. make: (settings, num_classes, dtype, rngs) -> `Segmenter`. base_tensors: path
    prefix here -> prefix in the converted SAM; base_unused: tensors of SAM that have no place here.
    loss: see `losses`. frozen: path prefixes outside the encoder that never train.
    base_rows: prefix in the converted SAM -> so many rows of its first axis are taken. cnn: prefix
    of a ResNet-18 that `config.model.cnn_base` may give its start. training: how its parameters
    are found. start: "sam" or "drawn", what `model.start=auto` is. sam_start: what "sam" takes from
    SAM besides, pattern of paths here -> path there. oracle: it is given the labels of the volumes
    that it is scored on; its label and `notice` say so.
    """

    label: str
    make: Callable[..., nnx.Module]
    base_tensors: dict[str, str]
    base_unused: tuple[str, ...]
    loss: Callable = losses.deep_supervision
    frozen: tuple[str, ...] = ()
    base_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    cnn: str = ""
    training: Training = Training.SGD
    start: str = "drawn"
    sam_start: dict[str, str] = dataclasses.field(default_factory=dict)
    oracle: bool = False


def _sam(settings: ConfigDict) -> SamConfig:
    return SamConfig.preset(
        settings.encoder,
        settings.image_size,
        settings.patch_size,
        attention=settings.attention,
        remat=settings.remat,
        scan_blocks=settings.scan_blocks,
        colors=colors_of(settings),
    )


def colors_of(settings: ConfigDict) -> str:
    """What `model.colors` says; `auto`: what the base was trained on, or the released code does.

    Without a base the encoder is trained from scratch, on images as they are.
    """
    if settings.colors != "auto":
        return settings.colors
    if key_of(settings) == RELEASE or not settings.base:
        return "unit"
    return colors_of_base(settings.base)


def start_of(settings: ConfigDict) -> str:
    """What `model.start` says, `sam` or `drawn`; `auto`: the method's, where there is a SAM."""
    if settings.start not in STARTS:
        raise UserError(f"model.start is {settings.start!r}; choose from {', '.join(STARTS)}")
    if settings.start != "auto":
        return settings.start
    return method_of(settings).start if settings.base else "drawn"


def _start_small(settings: ConfigDict) -> float | None:
    return settings.start_scale if start_of(settings) == "sam" else None


def _lora(settings: ConfigDict) -> LoraConfig:
    """The adapters of the encoder; of rank 0 where all of it, or nothing, trains."""
    if unknown := set(settings.lora_targets) - set(TARGETS):
        raise UserError(f"model.lora_targets {sorted(unknown)} unknown; choose from {TARGETS}")
    adapted = settings.train_encoder == "lora"
    return LoraConfig(settings.lora_rank if adapted else 0, tuple(settings.lora_targets))


def _prototype_settings(settings: ConfigDict, num_classes: int) -> dict:
    """The arguments of `PrototypeConfig`: what both presets of PGP-SAM are told."""
    return dict(
        sam=_sam(settings),
        num_classes=num_classes,
        stage_taps=tuple(settings.stage_taps),
        alpha=settings.alpha,
        k=settings.k,
        lora=_lora(settings),
        start_small=_start_small(settings),
    )


def _make_paper(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    config = paper.PgpSamConfig(
        **_prototype_settings(settings, num_classes),
        mix_start=settings.mix_start,
        ppr_norm=settings.ppr_norm,
        cfm=settings.cfm,
        ppr=settings.ppr,
        ppg=settings.ppg,
    )
    return paper.PgpSam(config, dtype=dtype, rngs=rngs)


def _make_release(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    if not (settings.cfm and settings.ppr and settings.ppg):
        raise UserError(
            "model.cfm, model.ppr and model.ppg switch off parts of preset paper, release has no "
            "such switches; set model.preset=paper or all three to True"
        )
    config = release.ReleaseConfig(
        **_prototype_settings(settings, num_classes),
        dcn=settings.dcn,
        token_order=settings.token_order,
    )
    return release.ReleasePgpSam(config, dtype=dtype, rngs=rngs)


def _make_samed(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    return samed.Samed(_sam(settings), num_classes, lora=_lora(settings), dtype=dtype, rngs=rngs)


def _make_hsam(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    return hsam.Hsam(
        _sam(settings),
        num_classes,
        mask_gate=settings.mask_gate,
        lora=_lora(settings),
        dtype=dtype,
        rngs=rngs,
    )


def _make_autosam(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    return autosam.AutoSam(
        _sam(settings), num_classes, lora=_lora(settings), dtype=dtype, rngs=rngs
    )


def _make_samlst(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    return sam_lst.SamLst(_sam(settings), num_classes, lora=_lora(settings), dtype=dtype, rngs=rngs)


def _make_surgicalsam(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    if settings.prompt_tokens < 1:
        raise UserError(f"model.prompt_tokens is {settings.prompt_tokens}; give 1 or more")
    return surgicalsam.SurgicalSam(
        _sam(settings),
        num_classes,
        prompt_tokens=settings.prompt_tokens,
        start_small=_start_small(settings),
        lora=_lora(settings),
        dtype=dtype,
        rngs=rngs,
    )


def _by_masks(model: Callable):
    """Maker of a method that prompts SAM as it is."""

    def make(settings, num_classes: int, dtype, rngs: nnx.Rngs):
        if settings.train_encoder == "full":
            raise UserError(
                f"method {settings.name} takes SAM's encoder as it is; set "
                "model.train_encoder=frozen"
            )
        return model(_sam(settings), num_classes, prompt=settings.prompt, dtype=dtype, rngs=rngs)

    return make


# (config.model.name, config.model.preset) -> method; a method with one preset has "" there.
METHODS = {
    ("pgpsam", "paper"): Method(
        "PGP-SAM, paper",
        _make_paper,
        paper.BASE_TENSORS,
        paper.BASE_UNUSED,
        start="sam",
        sam_start=paper.SAM_START,
    ),
    RELEASE: Method(
        "PGP-SAM, release",
        _make_release,
        release.BASE_TENSORS,
        release.BASE_UNUSED,
        losses.released_deep_supervision,
        sam_start=release.SAM_START,
    ),
    ("samed", ""): Method(
        "SAMed", _make_samed, segmenter.BASE_TENSORS, segmenter.BASE_UNUSED, losses.final_only
    ),
    ("hsam", ""): Method(
        "H-SAM",
        _make_hsam,
        segmenter.BASE_TENSORS,
        segmenter.BASE_UNUSED,
        sam_start=hsam.SAM_START,
    ),
    ("autosam", ""): Method(
        "AutoSAM",
        _make_autosam,
        autosam.BASE_TENSORS,
        autosam.BASE_UNUSED,
        losses.entropy_and_foreground_dice,
        autosam.FROZEN,
        autosam.BASE_ROWS,
    ),
    ("samlst", ""): Method(
        "SAM-LST",
        _make_samlst,
        segmenter.BASE_TENSORS,
        segmenter.BASE_UNUSED,
        losses.final_only,
        sam_lst.FROZEN,
        cnn=sam_lst.CNN,
    ),
    ("surgicalsam", ""): Method(
        "SurgicalSAM",
        _make_surgicalsam,
        prompted_sam.BASE_TENSORS,
        (),
        losses.prototype_prompts,
        frozen=("prompt_encoder",),
        sam_start=surgicalsam.SAM_START,
    ),
    ("fssp", ""): Method(
        "FSSP-SAM",
        _by_masks(fssp_sam.Fssp),
        prompted_sam.BASE_TENSORS,
        (),
        losses.one_against_rest,
        frozen=("prompt_encoder", "mask_decoder"),
        training=Training.LBFGS,
    ),
    ("sam", ""): Method(
        "SAM, true boxes (ORACLE)",
        _by_masks(sam_oracle.OracleSam),
        prompted_sam.BASE_TENSORS,
        (),
        frozen=("prompt_encoder", "mask_decoder"),
        training=Training.NONE,
        oracle=True,
    ),
}


def key_of(settings: ConfigDict) -> tuple[str, str]:
    """Which of `METHODS` `config.model` names: how tables by method are found."""
    single = settings.name, ""
    key = single if single in METHODS else (settings.name, settings.preset)
    if key not in METHODS:
        known = ", ".join(name_of(key) for key in METHODS)
        raise UserError(
            f"unknown method {'/'.join(key)} (model.name/model.preset); choose from {known}"
        )
    return key


def name_of(key: tuple[str, str]) -> str:
    """A key in words: `pgpsam/paper`, `samed`."""
    return "/".join(filter(None, key))


def method_of(settings: ConfigDict) -> Method:
    """The method that `config.model` names."""
    return METHODS[key_of(settings)]


_TRUE = {"point": "points", "box": "boxes", "both": "points and boxes"}


def notice(settings: ConfigDict) -> str | None:
    """What every print and report of a run of `config.model` must say of its method."""
    if not method_of(settings).oracle:
        return None
    return (
        f"ORACLE: SAM is prompted with the true {_TRUE[settings.prompt]}, made of the labels of "
        "the volumes that are scored: no prediction, but a bound for methods that find their "
        "prompts."
    )


def refuse_without_labels(settings: ConfigDict) -> None:
    """A `UserError` for a method that cannot segment what has no labels yet."""
    if method_of(settings).oracle:
        raise UserError(
            f"method {settings.name} takes its prompts from the labels of a volume, so that it "
            "segments none without (model.name); use a run of another method"
        )
