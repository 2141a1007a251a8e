"""Pins and restores the frozen weights of a workdir.

A converted SAM is pinned by path and SHA-256 and stays where it is. Randomly initialized frozen
weights (a random backbone; leaves that SAM does not provide) are written to the workdir once, as
`frozen.safetensors`. `base.json` records the origin and the SHA-256 of that file.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from pgpsam_jax.checkpointing import checkpoint
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods.registry import method_of
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.weights import read_safetensors
from pgpsam_jax.utils.files import StrPath, atomic_path, file_digest, read_record, write_json

FROZEN = "frozen.safetensors"
_RECORD = "base.json"


def pinned(workdir: StrPath) -> dict[str, Any] | None:
    """Returns the record of a workdir's frozen weights, or None if nothing is pinned yet.

    `base` is the path of a converted SAM, the name of a converted checkpoint, or "" for a random
    backbone; `sha256` is that of the converted SAM, or None if the workdir holds all its weights.
    """
    path = Path(workdir) / _RECORD
    return read_record(path, lambda value: {key: value[key] for key in ("base", "sha256")} | value)


def pin_frozen_weights(
    workdir: StrPath,
    base: str,
    digest: str | None,
    frozen: Any,
    random_frozen: dict[str, Any] | None = None,
) -> None:
    """Pins the frozen weights of a workdir on first use; restores or checks them afterwards.

    Randomly initialized weights are read back from the workdir, so a run does not depend on how
    they were sampled.

    Args:
      workdir: of the run.
      base: stem of the converted SAM; "" for a random backbone.
      digest: SHA-256 of the converted SAM; None for a random backbone.
      frozen: frozen parameters, updated in place.
      random_frozen: path -> frozen leaf that the converted SAM does not provide.

    Raises:
      UserError: the weights are not those pinned here, or a file is missing or damaged.
    """
    workdir = Path(workdir)
    path, file = workdir / _RECORD, workdir / FROZEN
    kept = flat_paths(frozen) if digest is None else random_frozen or {}
    with multihost.first_before_others("base"):  # the others read what the first wrote
        record = pinned(workdir)
        if record is None:
            if checkpoint.saved_steps(workdir):
                raise UserError(f"{path} is missing; restore it from a copy or train again")
            record = {"base": base, "sha256": digest}
            if kept:
                arrays = {name: np.asarray(leaf[...]) for name, leaf in kept.items()}
                with atomic_path(file) as temporary:
                    save_file(arrays, temporary)
                record["frozen"] = file_digest(file)
            write_json(path, record)
            return
        if record["sha256"] != digest:
            raise UserError(
                f"{workdir} was trained on SAM weights with SHA-256 {record['sha256']}, but "
                f"model.base ({base or 'empty'}) has {digest}; give the weights of that run"
            )
        if kept:
            _load(file, record.get("frozen"), kept)


def _load(path: Path, digest: str | None, leaves: dict[str, Any]) -> None:
    """digest: None in workdirs of versions that did not record it."""
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it from a copy or train again")
    if digest is not None and file_digest(path) != digest:
        raise UserError(
            f"{path} has changed since it was written; restore it from a copy or train again"
        )
    arrays = read_safetensors(path)
    if {k: v.shape for k, v in arrays.items()} != {k: v.shape for k, v in leaves.items()}:
        raise UserError(f"{path} does not match this workdir's model; restore it or train again")
    for name, leaf in leaves.items():
        leaf.set_value(jax.device_put(arrays[name]))


def base_notice(settings: ConfigDict, workdir: StrPath) -> str | None:
    """Returns the warning shown wherever a run with a random backbone or CNN is reported."""
    notices = [_backbone_notice(settings, workdir)]
    if method_of(settings).cnn_prefix and not settings.cnn_base:
        notices.append(
            "THE CNN BESIDE THE ENCODER STARTED AT RANDOM (model.cnn_base is empty), not from "
            f"ImageNet as the method's authors have it; {resnet_weights.HOW_TO_GET}"
        )
    return " ".join(filter(None, notices)) or None


def _backbone_notice(settings: ConfigDict, workdir: StrPath) -> str | None:
    if settings.base or (pinned(workdir) or {}).get("base"):
        return None
    if settings.train_encoder == "full":
        return "The backbone was initialized at random and trained from scratch: no SAM weights."
    official = weights.OFFICIAL.get(settings.encoder)
    where = f" Official weights: {official.address}" if official else ""
    return (
        "THE BACKBONE IS RANDOM AND FROZEN (model.base is empty): scores say nothing about "
        f"{method_of(settings).label.partition(',')[0]} on SAM weights.{where}"
    )
