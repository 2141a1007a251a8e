"""Intensities become colors: whatever the unit of a volume, once a normalization is chosen."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgpsam_jax.config import default_config, serialization
from pgpsam_jax.data import cache
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.preprocessing import (
    Deviations,
    Percentiles,
    Preprocessing,
    intensity_limits,
    window_of,
)
from pgpsam_jax.errors import UserError
from tests.support.small_run import TABLE

RELATIVE = (Percentiles(0.5, 99.5), Percentiles(0, 90), Deviations())


def volume(seed, padding=0):
    """A volume of two tissues, with an empty border as cropped and stripped scans have it."""
    rng = np.random.default_rng(seed)
    array = np.where(rng.random((6, 9, 8)) < 0.3, 90, 40) + rng.normal(0, 5, (6, 9, 8))
    return np.pad(array, padding, constant_values=array.min())


def colors(array, window, levels=0):
    array = np.asarray(array, np.float32)
    made = Preprocessing(16, window, levels)
    return made.to_model(array, intensity_limits(window, array))


@pytest.mark.parametrize("window", RELATIVE)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(-3, 5).map(lambda power: 10**power), st.floats(-1e3, 1e3))
@example(0, 1.0, -1e3)
def test_unit_and_offset_of_a_volume_do_not_matter(window, seed, scale, offset):
    """a x + b with a > 0 gives the slices of x, up to float32 of intensities that far from 0."""
    array = volume(seed)
    offset *= scale
    other = scale * array + offset
    rounding = np.spacing(np.float32(np.abs(other).max())) / (scale * array.std())
    np.testing.assert_allclose(
        colors(other, window), colors(array, window), atol=1e-5 + 2 * float(rounding)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6))
def test_zscore_leaves_out_the_padding_around_a_body(seed, padding):
    array, window = volume(seed), Deviations()
    low, high = intensity_limits(window, array)
    body = np.sort(array.ravel())[1:]  # all but the minimum
    np.testing.assert_allclose((low + high) / 2, body.mean(), rtol=1e-9)
    np.testing.assert_allclose(high - low, 6 * body.std(), rtol=1e-9)
    assert intensity_limits(window, volume(seed, padding)) == pytest.approx((low, high))


def test_mean_and_three_sds_are_gray_black_and_white():
    window, array = Deviations(), np.linspace(0, 1, 1001, dtype=np.float32).reshape(7, 11, 13)
    low, high = intensity_limits(window, array)
    made = Preprocessing(16, window).normalize(
        np.array([[[low - 1, low, (low + high) / 2, high, high + 1]]]), (low, high)
    )
    np.testing.assert_allclose(made, [[[0, 0, 0.5, 1, 1]]], atol=1e-6)


@pytest.mark.parametrize("window", RELATIVE)
def test_a_constant_volume_is_no_fault(window):
    made = colors(np.full((2, 4, 4), 7.0), window)
    assert np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1


def test_each_setting_has_cache_files_of_its_own():
    """In the hash is what the slices depend on; files of former versions keep theirs."""
    table = LabelTable.from_json(TABLE)

    def key(**fields):
        data = default_config().data
        data.axis = "axial"
        data.update(fields)
        return json.dumps(cache._recipe(table, Preprocessing.from_config(data, 32)))

    keys = [
        key(),
        key(window=(0.5, 99.5)),
        key(normalize="percentile"),
        key(normalize="percentile", percentiles=(1.0, 99.0)),
        key(normalize="zscore"),
        key(normalize="window", window=(-3.0, 3.0)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(normalize="zscore", window=(1.0, 2.0)) == keys[4]
    assert key(percentiles=(1.0, 99.0)) == keys[3]  # percentiles that are given are used
    assert json.loads(keys[2]) == json.loads(keys[1]) | {"percentiles": True}  # as before
    assert not {"percentiles", "deviations", "normalize"} & json.loads(keys[0]).keys()


@pytest.mark.parametrize("unit", ["intensity", "percent"])
def test_configurations_with_a_unit_of_the_window_still_load(unit):
    stored = serialization.to_json(default_config())
    for field in ("normalize", "percentiles"):
        del stored["data"][field]
    stored["data"] |= {"window_unit": unit, "window": [2.0, 98.0]}
    found = serialization.from_json(stored)
    wanted = Percentiles(2.0, 98.0) if unit == "percent" else (2.0, 98.0)
    assert window_of(found.data) == wanted and type(window_of(found.data)) is type(wanted)
    assert "window_unit" not in found.data
    again = serialization.from_json(serialization.to_json(found))
    assert serialization.to_json(again) == serialization.to_json(found)
    stored["data"]["window_unit"] = "x"
    with pytest.raises(UserError, match="window_unit"):
        serialization.from_json(stored)
