"""Batches on the device or from the host, order of reports, no unasked transfers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.train_loop import AHEAD, run_steps

COUNT, SIZE, BATCH = 11, 6, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.random((COUNT, SIZE, SIZE)).astype(np.float16)
LABELS = RNG.integers(0, 9, (COUNT, SIZE, SIZE)).astype(np.uint8)


@pytest.fixture(scope="module")
def mesh():
    return device_mesh.make_mesh(data=2, fsdp=2, tensor=2)


def feed_of(mesh, resident_bytes):
    loader = make_loader(COUNT, batch_size=BATCH, seed=3)
    return DeviceBatches({"image": IMAGES, "label": LABELS}, loader, mesh, resident_bytes)


@pytest.mark.parametrize("resident", [False, True])
def test_batches_and_their_shapes(mesh, resident):
    size = IMAGES.nbytes + LABELS.nbytes
    feed = feed_of(mesh, size if resident else size - 1)
    assert feed.resident is resident
    abstract = feed.abstract(BATCH)
    for _ in range(3):
        batch, rows = next(feed)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), abstract
        )
        chosen = batch.get("rows", slice(None))
        np.testing.assert_array_equal(np.asarray(batch["image"])[chosen], IMAGES[rows])
        np.testing.assert_array_equal(np.asarray(batch["label"])[chosen], LABELS[rows])


def test_a_resident_set_is_sent_once(mesh):
    feed = feed_of(mesh, np.inf)
    (first, _), (second, _) = next(feed), next(feed)
    assert first["image"] is second["image"] and first["label"] is second["label"]


def total_step(state, frozen, batch):
    """A step whose state is the sum of all images it was given."""
    image = batch["image"][batch["rows"]] if "rows" in batch else batch["image"]
    state = state + frozen * image.astype(jnp.float32).sum()
    return state, {"sum": state}


@pytest.mark.parametrize("resident_bytes", [0, np.inf])
@pytest.mark.parametrize("steps", [1, AHEAD, AHEAD + 1, 9])
def test_every_step_is_reported_in_order_but_the_last_is_returned(mesh, steps, resident_bytes):
    loader = make_loader(COUNT, batch_size=BATCH, seed=3)
    order = [next(loader) for _ in range(steps)]
    sums = np.cumsum([2 * IMAGES[rows].astype(np.float32).sum() for rows in order])
    seen = []
    whole = device_mesh.replicated(mesh)
    state, frozen = (jax.device_put(jnp.float32(value), whole) for value in (0, 2))
    step = jax.jit(total_step, out_shardings=whole, donate_argnums=0)
    state, last, metrics, rows = run_steps(
        step,
        state,
        frozen,
        feed_of(mesh, resident_bytes),
        40,
        40 + steps,
        lambda *x: seen.append(x),
    )
    assert last == 40 + steps
    seen.append((last, metrics, rows))
    assert [step for step, *_ in seen] == list(range(41, 41 + steps))
    for (_, metrics, rows), wanted, total in zip(seen, order, sums, strict=True):
        np.testing.assert_array_equal(rows, wanted)
        np.testing.assert_allclose(metrics["sum"], total, rtol=1e-5)
    np.testing.assert_allclose(state, sums[-1], rtol=1e-5)


@pytest.mark.parametrize("stop", [41, 43, 45])
def test_a_stop_comes_after_the_step_that_is_asked_about(mesh, stop):
    """Every step is asked about, once, in order; those before the last are reported."""
    whole = device_mesh.replicated(mesh)
    state, frozen = (jax.device_put(jnp.float32(value), whole) for value in (0, 2))
    step = jax.jit(total_step, out_shardings=whole, donate_argnums=0)
    seen, asked = [], []

    def stop_after(number):
        asked.append(number)
        return number == stop

    _, last, *_ = run_steps(
        step, state, frozen, feed_of(mesh, 0), 40, 45, lambda n, *_: seen.append(n), stop_after
    )
    assert last == stop and asked == [*range(41, stop + 1)] and seen == asked[:-1]


def test_a_transfer_that_nobody_asked_for_is_refused(mesh):
    """A step given a number of the host would send it again at every call."""
    step = jax.jit(lambda state, frozen, batch: (state + frozen, {}))
    state = jax.device_put(jnp.float32(0), device_mesh.replicated(mesh))
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        run_steps(step, state, np.float32(2), feed_of(mesh, 0), 0, 1, lambda *_: None)
