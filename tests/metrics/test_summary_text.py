"""The table at the end of a run: as many lines for a hundred organs as for fourteen."""

import pytest

from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.metrics.summary_text import format_text
from tests.support.grid_folder import case_rows, slice_rows


def summary(scores, organs):
    return summarize(case_rows(scores, organs), slice_rows(scores, organs))


@pytest.mark.parametrize(("count", "lines"), [(1, 4), (7, 10), (8, 7), (13, 10), (14, 10)])
def test_every_organ_is_shown(count, lines):
    organs = [f"organ_{number}" for number in range(count)]
    text = format_text(summary({"a": [0.5] * count, "b": [0.7] * count}, organs))
    assert text.startswith("class means (strict, 2 case(s)): Dice 0.600, HD95 8.0 mm\n")
    assert len(text.splitlines()) == lines and max(map(len, text.splitlines())) <= 80
    assert all(f" {organ} " in text for organ in organs)
    assert text.count(" 0.600 |") == text.count(" 8.0 |") == count


def test_of_many_organs_the_worst_are_shown():
    """Those without a Dice come last: absent organs are no failures."""
    organs = [f"organ_{number:03d}" for number in range(104)]
    scores = [None, None, *(number / 104 for number in range(2, 104))]
    text = format_text(summary({"a": scores, "b": scores}, organs))
    assert len(text.splitlines()) == 10
    assert "; the 14 of 104 organs with the lowest Dice:" in text.splitlines()[0]
    shown = [organ for organ in organs if organ in text]
    assert shown == organs[2:16]


def test_undefined_means_and_long_names():
    text = format_text(summary({"a": [0], "b": [0]}, ["an organ\nwith a name " * 9]))
    assert "Dice 0.000, HD95 n/a mm" in text
    assert len(text.splitlines()) == 4 and max(map(len, text.splitlines())) <= 80
