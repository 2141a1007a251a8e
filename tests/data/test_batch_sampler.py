"""Batches: rows of the whole batch, every slice once an epoch, exact resume."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.errors import UserError


def take(iterator, steps):
    return [next(iterator) for _ in range(steps)]


def indices(count, batch, seed, steps):
    return np.stack(take(make_loader(count, batch_size=batch, seed=seed), steps))


def test_batches_are_rows():
    for rows in take(make_loader(11, batch_size=4, seed=0), 9):
        assert rows.shape == (4,) and rows.dtype == np.int32
        assert rows.min() >= 0 and rows.max() < 11


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_slice_once_an_epoch(count, batch, seed):
    steps = -(-3 * count // batch)
    epochs = indices(count, batch, seed, steps).ravel()[: 3 * count].reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (3, 1)))


def test_order_is_pinned():
    """A change of the order would silently change every run and break their resumption."""
    assert indices(6, 4, 3, 3).tolist() == [[2, 5, 4, 1], [3, 0, 1, 2], [0, 4, 5, 3]]
    assert indices(1, 3, 0, 2).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_small_sets_do_not_wait():
    """grain's shuffle needs 10 ms of processor time an index here."""
    loader = make_loader(3, batch_size=100, seed=0)
    start = time.process_time()
    take(loader, 10)
    assert time.process_time() - start < 1


def test_seed_and_epoch_decide_the_order():
    first = indices(50, 10, 1, 15)
    np.testing.assert_array_equal(first, indices(50, 10, 1, 15))
    assert (first != indices(50, 10, 2, 15)).any()
    epochs = first.reshape(3, 50)
    assert all((epochs[i] != epochs[j]).any() for i, j in [(0, 1), (0, 2), (1, 2)])
    assert (epochs[0] != np.arange(50)).any()


@pytest.mark.parametrize("position", [0, 1, 4, 13])
def test_resume_from_state(position):
    """Through JSON, as a checkpoint stores it; batch 4 of 11 slices crosses epochs."""
    loader = make_loader(11, batch_size=4, seed=9)
    take(loader, position)
    state = json.dumps(loader.get_state())
    expected = take(loader, 6)
    fresh = make_loader(11, batch_size=4, seed=9)
    take(fresh, 2)
    fresh.set_state(json.loads(state))
    np.testing.assert_array_equal(take(fresh, 6), expected)


def test_bad_sizes():
    with pytest.raises(UserError, match=r"train\.batch_size is 0; give 1 or more"):
        make_loader(6, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="a set of 0 slices"):
        make_loader(0, batch_size=2, seed=0)
