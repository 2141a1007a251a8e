"""`Predictor`: volumes or slices to class ids, for evaluation and prediction."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.letterbox import Letterbox, logits_to_native, to_model, to_model_on_device
from pgpsam_jax.data.preprocessing import Preprocessing, intensity_limits
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.sharding import device_mesh


class Predictor:
    """A model ready to segment volumes: fixed-size batches, resize and argmax on the device.

    The model is compiled once; a new in-plane shape only compiles the resizing. On a mesh over
    several processes, all processes pass the same slices, and each gets all results.

    Args:
      graphdef, params, frozen: the model.
      preprocessing: of the training slices.
      batch_size: slices segmented at a time, rounded up to a multiple of the mesh's batch shards.
      mesh: the devices.
      oracle: whether the method takes prompts from the labels, which only then may be passed.
    """

    def __init__(
        self,
        graphdef,
        params,
        frozen,
        *,
        preprocessing: Preprocessing,
        batch_size: int,
        mesh,
        oracle: bool = False,
    ):
        self._requested_size = batch_size
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // shards) * shards
        self.preprocessing, self.oracle = preprocessing, oracle
        self._sharding = device_mesh.batch_sharding(mesh)
        self._graphdef, self._states = graphdef, (params, frozen)
        self._to_model = jax.jit(to_model_on_device, static_argnums=1, out_shardings=self._sharding)
        self._predict = jax.jit(
            device_mesh.traced_on(mesh)(make_predict_step(graphdef)),
            # Weights where they are.
            in_shardings=(None, None, self._sharding, *[self._sharding] * oracle),
            out_shardings=self._sharding,
        )

    @property
    def model(self) -> nnx.Module:
        """The module with its weights: a new object over the same arrays."""
        return nnx.merge(self._graphdef, *self._states)

    @property
    def params(self):
        """State of the trainable parameters."""
        return self._states[0]

    def on_local_devices(self) -> "Predictor":
        """Returns a copy of the predictor on all devices of this process."""
        mesh = device_mesh.make_mesh(devices=jax.local_devices())
        params, frozen = (
            multihost.put_global(multihost.all_gather(tree), device_mesh.replicated(mesh))
            for tree in self._states
        )
        return Predictor(
            self._graphdef,
            params,
            frozen,
            preprocessing=self.preprocessing,
            batch_size=self._requested_size,
            mesh=mesh,
            oracle=self.oracle,
        )

    def with_params(self, params) -> "Predictor":
        """Returns a predictor with the same compiled program and other trainable parameters."""
        other = copy.copy(self)
        other._states = params, self._states[1]
        return other

    def __call__(self, volume: Volume, truth=None) -> np.ndarray:
        """Returns class ids (D, H, W) uint8 in the volume's display orientation.

        Args:
          volume: to segment.
          truth: its true class ids (D, H, W), for an oracle only.
        """
        limits = intensity_limits(self.preprocessing.window, volume.array)
        normalize = functools.partial(self.preprocessing.normalize, limits=limits)
        return self._segment(volume.array, normalize, truth)

    def slices(self, images) -> np.ndarray:
        """Returns class ids (N, S, S) uint8 of preprocessed slices (N, S, S)."""
        return self._segment(images, lambda part: part)

    def _segment(self, images, prepare, truth=None) -> np.ndarray:
        """Class ids of `images` (N, H, W); `prepare` maps a batch to intensities in [0, 1]."""
        if self.oracle and truth is None:
            raise UserError(
                "this method takes its prompts from labels, and there are none; evaluate it on "
                "labeled cases instead"
            )
        if truth is not None and not self.oracle:
            raise ValueError("labels are for an oracle only")
        out = np.empty(images.shape, np.uint8)
        shape = images.shape[1:]
        letterbox = Letterbox.of(shape, self.preprocessing.image_size)
        pending = None  # one batch in flight: the host prepares while the device computes
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = np.zeros((self.batch_size, *shape), np.float32)
            batch[: len(images[part])] = prepare(images[part])
            inputs = self._to_model(multihost.put_global(batch, self._sharding), letterbox)
            labels = () if truth is None else (self._labels(truth[part], letterbox),)
            ids = _class_ids(self._predict(*self._states, inputs, *labels), letterbox, shape)
            if pending:
                self._collect(out, *pending)
            pending = part, ids
        if pending:
            self._collect(out, *pending)
        return out

    def _labels(self, ids, letterbox: Letterbox):
        """A batch of class ids at the network's size, on the device."""
        batch = np.zeros((self.batch_size, letterbox.size, letterbox.size), np.uint8)
        batch[: len(ids)] = to_model(ids, letterbox, order=0)
        return multihost.put_global(batch, self._sharding)

    @staticmethod
    def _collect(out, part, ids) -> None:
        out[part] = jax.device_get(multihost.all_gather(ids))[: len(out[part])]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _class_ids(logits, letterbox: Letterbox, native: tuple[int, int]):
    return jnp.argmax(logits_to_native(logits, letterbox, native), axis=-1).astype(jnp.uint8)


def make_predict_step(graphdef):
    """Returns the pure function (params, frozen, images (B, S, S)) -> logits (B, h, w, K).

    For an oracle, the function also takes the true class ids (B, S, S).
    """

    def predict_step(params, frozen, images, *labels):
        return nnx.merge(graphdef, params, frozen).predict(to_input(images), *labels)

    return predict_step
