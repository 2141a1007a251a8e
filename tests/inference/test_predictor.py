"""Whole volumes through the network: resizing on the device, padding, programs compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.letterbox import Letterbox, to_model, to_model_on_device
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.postprocessing import keep_components, smooth_slices
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.settings import InferenceSettings
from pgpsam_jax.models.segmenter import Segmenter
from pgpsam_jax.sharding import device_mesh

WINDOW, SIZE = (-100.0, 300.0), 32
LEVELS = (0.1, 0.4, 0.8)


class Bands(Segmenter):
    """Stands for a network: a pixel's class is the level nearest to its intensity."""

    def __init__(self):
        self.levels = nnx.Param(jnp.array(LEVELS))

    def __call__(self, images, keys=None):
        return {"final": -jnp.abs(images[..., :1] - self.levels[...])}


class Place(Bands):
    """The nearest level, but scores depend on the place in the image."""

    def __call__(self, images, keys=None):
        weights = np.random.default_rng(3).random(images.shape[1:3], np.float32)
        return {"final": super().__call__(images)["final"] * weights[..., None] * 9}


def predictor_of(batch_size=3, devices=1, levels=0, kind=Bands, **more):
    graphdef, params, frozen = nnx.split(kind(), nnx.Param, ...)
    mesh = device_mesh.make_mesh(devices=jax.devices()[:devices])
    preprocessing = Preprocessing(SIZE, WINDOW, levels)
    options = dict(preprocessing=preprocessing, batch_size=batch_size, mesh=mesh)
    return Predictor(graphdef, params, frozen, **options, **more)


def volume_of(shape, seed=0):
    array = np.random.default_rng(seed).uniform(-300, 500, shape).astype(np.float32)
    return Volume(array, (3.0, 1.0, 1.0), None)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((20, 31), 64), ((64, 64), 64), ((90, 40), 64), ((200, 130), 64), ((7, 300), 48)],
)
def test_the_device_resizes_as_the_host(shape, size):
    images = np.random.default_rng(0).random((3, *shape), np.float32)
    letterbox = Letterbox.of(shape, size)
    ours = jax.jit(to_model_on_device, static_argnums=1)(images, letterbox)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, to_model(images, letterbox, order=1), atol=5e-7)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("depth", [1, 4, 8, 11])
def test_every_slice_has_its_class_at_any_depth(depth, devices):
    """At the network's own size nothing is interpolated: classes are those of the intensities."""
    predictor = predictor_of(devices=devices)
    assert predictor.batch_size == (4 if devices == 4 else 3)
    volume = volume_of((depth, SIZE, SIZE))
    seen = Preprocessing(SIZE, WINDOW).to_model(volume.array, WINDOW)
    wanted = np.abs(seen[..., None] - np.float32(LEVELS)).argmin(-1)
    found = predictor(volume)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(predictor.slices(seen.astype(np.float16)).shape, wanted.shape)


@pytest.mark.parametrize("levels", [0, 4])
def test_a_volume_of_another_size_comes_back_on_its_grid(levels):
    """Bands of 10 pixels, twice as fine as the network sees them: only their edges may differ."""
    predictor = predictor_of(levels=levels)
    volume = volume_of((5, 64, 48))
    ids = np.broadcast_to(np.arange(64)[:, None] // 10 % 3, volume.array.shape)
    volume.array[:] = np.float32(LEVELS)[ids] * 400 - 100
    off = np.abs((np.arange(64) + 5) % 10 - 5) > 1
    steps = np.floor(np.float32(LEVELS) * 3) / 3 if levels else np.float32(LEVELS)
    wanted = np.abs(steps[:, None] - np.float32(LEVELS)).argmin(-1)[ids]
    inside = off & (np.arange(64) > 1) & (np.arange(64) < 62)
    np.testing.assert_array_equal(predictor(volume)[:, inside], wanted[:, inside])


def test_the_last_batch_and_other_depths_compile_nothing():
    predictor = predictor_of()
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    predictor(volume_of((3, 40, 20)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.transfer_guard("disallow"):
            for depth in (1, 2, 3, 7):
                predictor(volume_of((depth, 40, 20)))
        assert not compiled
        predictor(volume_of((3, 20, 50)))
        assert compiled  # else the count above would mean nothing
    finally:
        jax.monitoring.clear_event_listeners()
    assert predictor._predict._cache_size() == 1  # a new shape leaves the network's program alone


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def shifted_mean(images, moves):
    """What shifted passes of `Place` average to, at the network's own size."""
    weights = np.random.default_rng(3).random(images.shape[1:], np.float32)[..., None] * 9
    levels, total = np.float32(LEVELS), 0
    for down, right in moves:
        y, x = (np.arange(n) for n in images.shape[1:])
        # Where a pixel is in the moved image, or in the unmoved one if it is pushed out.
        rows, columns = np.meshgrid(y + down, x + right, indexing="ij")
        gone = (rows < 0) | (rows >= len(y)) | (columns < 0) | (columns >= len(x))
        own_rows, own_columns = np.meshgrid(y, x, indexing="ij")
        place = weights[np.where(gone, own_rows, rows), np.where(gone, own_columns, columns)]
        total = total + softmax(-np.abs(images[..., None] - levels) * place)
    return total / len(moves)


@pytest.mark.parametrize("devices", [1, 4])
def test_shifted_passes_are_averaged_where_each_pixel_went(devices):
    settings = InferenceSettings(shifts=5)
    predictor = predictor_of(devices=devices, kind=Place, settings=settings, token=6)
    volume = volume_of((7, SIZE, SIZE))
    seen = Preprocessing(SIZE, WINDOW).to_model(volume.array, WINDOW)
    wanted = shifted_mean(seen, [(0, 0), (3, 0), (-3, 0), (0, 3), (0, -3)])
    found = predictor.probabilities(volume)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    close = np.sort(wanted, -1)[..., -2] > np.sort(wanted, -1)[..., -1] - 1e-3
    np.testing.assert_array_equal(predictor(volume)[~close], wanted.argmax(-1)[~close])
    single = predictor.with_settings(InferenceSettings()).probabilities(volume)
    np.testing.assert_allclose(single, shifted_mean(seen, [(0, 0)]), atol=1e-3)


def test_probabilities_of_a_volume_of_another_size_sum_to_one():
    predictor = predictor_of(settings=InferenceSettings(shifts=9), token=8)
    volume = volume_of((4, 50, 37))
    found = predictor.probabilities(volume)
    assert found.shape == (4, 50, 37, 3)
    np.testing.assert_allclose(found.astype(np.float32).sum(-1), 1, atol=2e-3)


def test_smoothing_and_components_are_applied_to_the_volume():
    volume = volume_of((6, SIZE, SIZE))
    plain = predictor_of()
    smooth = plain.with_settings(InferenceSettings(smooth=1.5))
    wanted = smooth_slices(plain.probabilities(volume), 1.5 / 3.0)  # slices are 3 mm apart
    np.testing.assert_array_equal(smooth.probabilities(volume), wanted)
    np.testing.assert_array_equal(smooth(volume), wanted.argmax(-1))
    largest = plain.with_settings(InferenceSettings(components=(1.0, 0.2)))
    np.testing.assert_array_equal(largest(volume), keep_components(plain(volume), (1.0, 0.2)))
    slices = np.random.default_rng(0).random((2, SIZE, SIZE), np.float32)
    np.testing.assert_array_equal(largest.slices(slices), plain.slices(slices))


def test_moves_that_are_no_whole_number_of_outputs_are_refused():
    class Coarse(Bands):
        def __call__(self, images, keys=None):
            return {"final": super().__call__(images[:, ::4, ::4])["final"]}

    predictor = predictor_of(kind=Coarse, settings=InferenceSettings(shifts=5), token=6)
    with pytest.raises(UserError, match="half a token, which is no whole number of the"):
        predictor(volume_of((1, SIZE, SIZE)))
