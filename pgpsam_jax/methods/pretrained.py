"""Copies converted SAM and ResNet weights into the parameters of a model."""

import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods.registry import key_of, method_of, name_of
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.parameters import State, flat_paths, under
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.sam import Encoder


def apply_base(settings: ConfigDict, encoder: Encoder, params: State, frozen: State) -> str:
    """Copies the converted SAM `settings.base` into the states; returns its SHA-256."""
    method, base = method_of(settings), weights.load_base(settings.base)
    tensors = weights.fit_base(base.tensors, encoder.grid, global_blocks=encoder.global_blocks)
    tensors |= {
        name: tensor[:rows]
        for prefix, rows in method.base_rows.items()
        for name, tensor in tensors.items()
        if under(name, (prefix,))
    }
    leaves = flat_paths(params) | flat_paths(frozen)
    taken = dict(method.base_tensors)
    if method.resolve_start(settings) == "sam":
        taken |= {
            path: match.expand(source)
            for path in leaves
            for pattern, source in method.sam_start.items()
            if (match := re.fullmatch(pattern, path))
        }
    shapes = {
        path: leaf.shape
        for path, leaf in leaves.items()
        if not isinstance(leaf, nnx.LoRAParam) and under(path, taken)
    }
    chosen = weights.select_base(tensors, shapes, taken, method.base_unused)
    for path, value in chosen.items():
        leaves[path].set_value(jax.device_put(value))
    token = weights.TrainedFor.of(settings.base).mask_tokens[0]
    for prefix, source in method.resolve_class_tokens(settings).items():
        for path in (path for path in leaves if under(path, (prefix,))):
            drawn = leaves[path].get_value()
            if not isinstance(drawn, jax.ShapeDtypeStruct):  # which a workdir fills in
                one = base.tensors[source + path.removeprefix(prefix)][token]
                near = _copies(one, np.asarray(drawn), settings.start_scale)
                leaves[path].set_value(jax.device_put(near))
    return base.digest


def _copies(value: np.ndarray, drawn: np.ndarray, scale: float) -> np.ndarray:
    """Returns copies of a value, (K, *value.shape), with noise of `scale` times its size (rms).

    The noise has the directions of `drawn`, the random initialization in place of the copies.
    """
    size = _rms(drawn)
    return value + drawn * np.float32(scale * _rms(value) / size if size else 0)


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def randomly_initialized_frozen_params(settings: ConfigDict, frozen: State) -> dict[str, Any]:
    """Returns the frozen leaves, by path, that a converted SAM does not provide."""
    given = method_of(settings).base_tensors
    return {path: leaf for path, leaf in flat_paths(frozen).items() if not under(path, given)}


def apply_cnn(settings: ConfigDict, params: State, frozen: State) -> None:
    """Copies the weights in the file `settings.cnn_base` into the CNN of the states."""
    cnn = method_of(settings).cnn_prefix
    if not cnn:
        raise UserError(
            f"model.cnn_base is for a method with a CNN, which {name_of(key_of(settings))} lacks; "
            "leave it empty"
        )
    leaves = flat_paths(params) | flat_paths(frozen)
    ours = {
        path.removeprefix(f"{cnn}/"): leaf for path, leaf in leaves.items() if under(path, (cnn,))
    }
    tensors = resnet_weights.load_cnn(
        settings.cnn_base, {path: leaf.shape for path, leaf in ours.items()}
    )
    for path, leaf in ours.items():
        leaf.set_value(jax.device_put(tensors[path]))
