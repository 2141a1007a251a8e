"""Whole volumes to class ids on their own grid; evaluation and prediction share it."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax import sharding
from pgpsam_jax.data.geometry import Fit, logits_to_native, model_slices
from pgpsam_jax.data.nifti import Volume
from pgpsam_jax.step import make_predict_step


class Predictor:
    """A model ready to segment volumes: fixed-size slice batches, argmax on the device.

    The model is compiled once; a new in-plane shape compiles only the resize to it.
    """

    def __init__(
        self, graphdef, params, frozen, *, image_size, window, levels: int, batch_size: int, mesh
    ):
        lanes = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // lanes) * lanes
        self.image_size, self.window, self.levels = image_size, tuple(window), levels
        self._sharding = sharding.batch_sharding(mesh)
        self._graphdef, self._states = graphdef, (params, frozen)
        self._predict = jax.jit(
            make_predict_step(graphdef),
            in_shardings=(
                sharding.state_shardings(params, mesh),
                sharding.state_shardings(frozen, mesh),
                self._sharding,
            ),
            out_shardings=self._sharding,
        )

    @property
    def model(self) -> nnx.Module:
        """The module with its weights: a new object over the same arrays."""
        return nnx.merge(self._graphdef, *self._states)

    @property
    def params(self):
        """State of the trained weights."""
        return self._states[0]

    def with_params(self, params) -> "Predictor":
        """The same compiled program with other trained weights."""
        other = copy.copy(self)
        other._states = params, self._states[1]
        return other

    def __call__(self, volume: Volume) -> np.ndarray:
        """Class ids (D, H, W) uint8 in the volume's display orientation."""
        depth, *native = volume.array.shape
        fit = Fit.of(tuple(native), self.image_size)

        def prepare(part: slice) -> np.ndarray:
            return model_slices(volume.array[part], self.window, fit, self.levels)

        return self._segment(prepare, depth, fit, tuple(native))

    def slices(self, images) -> np.ndarray:
        """Class ids (N, S, S) uint8 of slices (N, S, S) that are as the network sees them."""
        shape = (self.image_size, self.image_size)
        return self._segment(images.__getitem__, len(images), Fit.of(shape, shape[0]), shape)

    def _segment(self, prepare, count: int, fit: Fit, shape: tuple[int, int]) -> np.ndarray:
        """Class ids (count, *shape); `prepare(slice)` gives a part of the network's input."""
        out = np.empty((count, *shape), np.uint8)
        pending = None  # one batch in flight: the host prepares while the device computes
        for start in range(0, count, self.batch_size):
            part = slice(start, min(start + self.batch_size, count))
            images = np.zeros((self.batch_size, self.image_size, self.image_size), np.float32)
            images[: part.stop - part.start] = prepare(part)
            logits = self._predict(*self._states, jax.device_put(images, self._sharding))
            if pending:
                self._collect(out, *pending)
            pending = part, _class_ids(logits, fit, shape)
        self._collect(out, *pending)
        return out

    @staticmethod
    def _collect(out, part, ids) -> None:
        out[part] = np.asarray(ids)[: part.stop - part.start]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _class_ids(logits, fit: Fit, native: tuple[int, int]):
    return jnp.argmax(logits_to_native(logits, fit, native), axis=-1).astype(jnp.uint8)
