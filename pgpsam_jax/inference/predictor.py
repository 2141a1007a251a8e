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
from pgpsam_jax.inference.postprocessing import keep_components, smooth_slices
from pgpsam_jax.inference.settings import MOVES, PLAIN, InferenceSettings
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
      settings: how masks are made of the model's outputs.
      token: side of a token in pixels, by half of which `settings.shifts` move the image.
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
        settings: InferenceSettings = PLAIN,
        token: int = 2,
    ):
        self.settings, self._token = settings, token
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
            settings=self.settings,
            token=self._token,
        )

    def with_settings(self, settings: InferenceSettings) -> "Predictor":
        """Returns a predictor with the same compiled program and other settings."""
        other = copy.copy(self)
        other.settings = settings
        return other

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
        if self.settings.smooth:
            return self.decide(self.probabilities(volume, truth))
        finish = _class_ids if self.settings.shifts == 1 else _mean_class_ids
        ids = self._run(volume.array, self._normalize(volume), finish, truth)
        return keep_components(ids, self.settings.components)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns class ids (D, H, W) uint8 for probabilities (D, H, W, K), components dropped."""
        ids = probabilities.argmax(axis=-1).astype(np.uint8)
        return keep_components(ids, self.settings.components)

    def probabilities(self, volume: Volume, truth=None) -> np.ndarray:
        """Returns class probabilities (D, H, W, K) float16: 2 K bytes per voxel.

        As `settings` has it, averaged over shifted passes and smoothed along the slice axis.
        """
        found = self._run(volume.array, self._normalize(volume), _mean_probabilities, truth)
        smooth = self.settings.smooth
        return smooth_slices(found, smooth / volume.spacing[0]) if smooth else found

    def slices(self, images) -> np.ndarray:
        """Returns class ids (N, S, S) uint8 of preprocessed slices (N, S, S), of one pass."""
        return self.with_settings(PLAIN)._run(images, lambda part: part, _class_ids)

    def _normalize(self, volume: Volume):
        limits = intensity_limits(self.preprocessing.window, volume.array)
        return functools.partial(self.preprocessing.normalize, limits=limits)

    def _run(self, images, prepare, finish, truth=None) -> np.ndarray:
        """What `finish` makes of the logits of `images` (N, H, W), (N, H, W, ...).

        prepare: maps a batch to intensities in [0, 1].
        """
        if self.oracle and truth is None:
            raise UserError(
                "this method takes its prompts from labels, and there are none; evaluate it on "
                "labeled cases instead"
            )
        if truth is not None and not self.oracle:
            raise ValueError("labels are for an oracle only")
        shape = images.shape[1:]
        out = np.empty((0, *shape), np.uint8)
        letterbox = Letterbox.of(shape, self.preprocessing.image_size)
        pending = None  # one batch in flight: the host prepares while the device computes
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = np.zeros((self.batch_size, *shape), np.float32)
            batch[: len(images[part])] = prepare(images[part])
            inputs = self._to_model(multihost.put_global(batch, self._sharding), letterbox)
            labels = () if truth is None else (self._labels(truth[part], letterbox),)
            passes = [self._moved_pass(move, inputs, *labels) for move in self._moves]
            found = finish(passes, self._moves, letterbox, shape)
            if not len(out):
                out = np.empty((len(images), *found.shape[1:]), found.dtype)
            if pending:
                self._collect(out, *pending)
            pending = part, found
        if pending:
            self._collect(out, *pending)
        return out

    @property
    def _moves(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns by which each pass moves the image, in pixels of the input."""
        half = self._token // 2
        return tuple((half * y, half * x) for y, x in MOVES[: self.settings.shifts])

    def _moved_pass(self, move: tuple[int, int], *inputs):
        if any(move):
            inputs = tuple(_moved(each, *move) for each in inputs)
        return self._predict(*self._states, *inputs)

    def _labels(self, ids, letterbox: Letterbox):
        """A batch of class ids at the network's size, on the device."""
        batch = np.zeros((self.batch_size, letterbox.size, letterbox.size), np.uint8)
        batch[: len(ids)] = to_model(ids, letterbox, order=0)
        return multihost.put_global(batch, self._sharding)

    @staticmethod
    def _collect(out, part, found) -> None:
        out[part] = jax.device_get(multihost.all_gather(found))[: len(out[part])]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moved(x, down: int, right: int):
    """(B, h, w, ...) moved by rows and columns; zeros come in."""
    h, w = x.shape[1:3]
    margins = [(0, 0), (abs(down),) * 2, (abs(right),) * 2, *[(0, 0)] * (x.ndim - 3)]
    top, left = abs(down) - down, abs(right) - right
    return jnp.pad(x, margins)[:, top : top + h, left : left + w]


_ON_DEVICE = functools.partial(jax.jit, static_argnums=(1, 2, 3))


@_ON_DEVICE
def _class_ids(passes, moves, letterbox: Letterbox, native: tuple[int, int]):
    """Class ids (B, H, W) uint8 of the one pass there is."""
    (logits,) = passes
    return jnp.argmax(logits_to_native(logits, letterbox, native), axis=-1).astype(jnp.uint8)


@_ON_DEVICE
def _mean_class_ids(passes, moves, letterbox: Letterbox, native: tuple[int, int]):
    mean = _mean_probabilities(passes, moves, letterbox, native)
    return jnp.argmax(mean, axis=-1).astype(jnp.uint8)


@_ON_DEVICE
def _mean_probabilities(passes, moves, letterbox: Letterbox, native: tuple[int, int]):
    """Probabilities (B, H, W, K) float16 averaged over passes (B, h, w, K) of moved images.

    Where a move pushed the image out of sight, the unmoved pass counts in its place.
    """
    total = jnp.zeros((), jnp.float32)
    for logits, move in zip(passes, moves, strict=True):
        if any(move):
            h, w = logits.shape[1:3]
            down, right = (-m * n // letterbox.size for m, n in zip(move, (h, w), strict=True))
            if (down * letterbox.size, right * letterbox.size) != (-move[0] * h, -move[1] * w):
                raise UserError(
                    f"eval.shifts moves images by half a token, which is no whole number of the "
                    f"{h} x {w} outputs of this method; set it to 1"
                )
            seen = _moved(jnp.ones((1, h, w, 1), bool), down, right)
            logits = jnp.where(seen, _moved(logits, down, right), passes[0])
        total += jax.nn.softmax(logits_to_native(logits, letterbox, native))
    return (total / len(passes)).astype(jnp.float16)


def make_predict_step(graphdef):
    """Returns the pure function (params, frozen, images (B, S, S)) -> logits (B, h, w, K).

    For an oracle, the function also takes the true class ids (B, S, S).
    """

    def predict_step(params, frozen, images, *labels):
        return nnx.merge(graphdef, params, frozen).predict(to_input(images), *labels)

    return predict_step
