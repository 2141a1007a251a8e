"""The registered methods: what `config.model.name` builds, trains with, and takes from SAM."""

import dataclasses
from collections.abc import Callable

from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax import losses
from pgpsam_jax.errors import UserError
from pgpsam_jax.models import hsam, pgpsam, samed, segmenter
from pgpsam_jax.models.lora import TARGETS, LoraConfig
from pgpsam_jax.models.release import model as release
from pgpsam_jax.models.sam import SamConfig


@dataclasses.dataclass(frozen=True)
class Method:
    """A segmentation method: its module, what it takes from a converted SAM, how it trains.

    label: in tables. make: (settings, num_classes, dtype, rngs) -> `Segmenter`. base_tensors: path
    prefix here -> prefix in the converted SAM; base_unused: tensors of SAM that have no place here.
    loss: see `losses`. frozen: path prefixes outside the encoder that never train.
    """

    label: str
    make: Callable[..., nnx.Module]
    base_tensors: dict[str, str]
    base_unused: tuple[str, ...]
    loss: Callable = losses.deep_supervision
    frozen: tuple[str, ...] = ()


def _sam(settings: ConfigDict) -> SamConfig:
    return SamConfig.preset(
        settings.encoder,
        settings.image_size,
        settings.patch_size,
        attention=settings.attention,
        remat=settings.remat,
        scan_blocks=settings.scan_blocks,
    )


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
    )


def _make_paper(settings, num_classes: int, dtype, rngs: nnx.Rngs):
    config = pgpsam.PgpSamConfig(
        **_prototype_settings(settings, num_classes),
        mix_start=settings.mix_start,
        cfm=settings.cfm,
        ppr=settings.ppr,
        ppg=settings.ppg,
    )
    return pgpsam.PgpSam(config, dtype=dtype, rngs=rngs)


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


# (config.model.name, config.model.preset) -> method; a method with one preset has "" there.
METHODS = {
    ("pgpsam", "paper"): Method(
        "PGP-SAM, paper", _make_paper, pgpsam.BASE_TENSORS, pgpsam.BASE_UNUSED
    ),
    ("pgpsam", "release"): Method(
        "PGP-SAM, release", _make_release, release.BASE_TENSORS, release.BASE_UNUSED
    ),
    ("samed", ""): Method(
        "SAMed", _make_samed, segmenter.BASE_TENSORS, segmenter.BASE_UNUSED, losses.final_only
    ),
    ("hsam", ""): Method("H-SAM", _make_hsam, segmenter.BASE_TENSORS, segmenter.BASE_UNUSED),
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
