"""Pictures: fixed palette, slices chosen and named right, orientation, aspect, and cheap curves."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pgpsam_jax.data.io.voxel_grid import AXES
from pgpsam_jax.metrics.overlap import slice_dice
from pgpsam_jax.visualization import overlays, training_curve
from pgpsam_jax.visualization.overlays import (
    overlay_slice,
    palette,
    write_overlays,
    write_preview,
)

SYNAPSE = (
    "background",
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "liver",
    "stomach",
    "aorta",
    "pancreas",
)
SPACING = (5.0, 0.8, 0.8)


def test_palette_is_stable():
    """Pinned: readers learn the colors, and pictures of different runs are laid side by side."""
    want = ["#CC79A7", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#F0E442", "#D55E00", "#9933FF"]
    assert list(palette(SYNAPSE).values()) == want
    assert list(palette(SYNAPSE)) == list(SYNAPSE[1:])
    shuffled = palette(("background", "Right Kidney", "liver", "spleen"))
    assert shuffled == {"Right Kidney": want[1], "liver": want[4], "spleen": want[0]}
    plain = palette(("background", "right_ventricle", "left_ventricle"))
    lateral = palette(("background", "left-lateral-ventricle", "right lateral ventricle"))
    assert list(plain.values()) == list(lateral.values())[::-1]


def test_palette_is_distinct_up_to_24_classes_and_then_repeats():
    names = ("background", "tumour", *SYNAPSE[1:], *(f"organ{i}" for i in range(20)))
    colors = palette(names)
    assert {name: colors[name] for name in SYNAPSE[1:]} == palette(SYNAPSE)
    assert len({colors[name] for name in names[1:25]}) == 24
    assert len(colors) == 29 and set(colors.values()) == {colors[n] for n in names[1:25]}


def test_organ_colors_differ_for_dichromats_too():
    """No two organs come close in sRGB, as seen normally and with simulated deuteranopia."""
    linear = np.array([to_rgb(color) for color in palette(SYNAPSE).values()]) ** 2.2
    # Machado et al. 2009, deuteranopia at full severity.
    matrix = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    for seen in (linear, linear @ np.transpose(matrix)):
        seen = np.clip(seen, 0, 1) ** (1 / 2.2)
        nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
        assert nearest > 0.15


def phantom(depth=9):
    """Liver in slices 1..7, spleen in 3..5; the prediction is worse toward the last slice."""
    truth = np.zeros((depth, 30, 40), np.uint8)
    truth[1:8, 5:20, 3:18] = 5
    truth[3:6, 10:20, 28:36] = 1
    prediction = truth.copy()
    for z in range(1, 8):
        prediction[z, 5 : 5 + z, 3:18] = 0
    image = np.linspace(0, 1, truth.size).reshape(truth.shape)
    return image, truth, prediction


def test_slice_dice():
    _, truth, prediction = phantom()
    scores = slice_dice(prediction, truth, len(SYNAPSE))
    assert scores.shape == (9, 8)
    # In slice 4 the liver has lost 4 of its 15 rows: 2 * 11 / (11 + 15).
    assert scores[4, 4] == pytest.approx(22 / 26) and scores[4, 0] == 1.0
    assert np.isnan(scores[0]).all() and np.isnan(scores[4, [1, 2, 3, 5, 6, 7]]).all()
    assert slice_dice(prediction * 0, truth, 9)[4, 0] == 0.0


def unseen(figure, path):
    """A file in the place of a picture at which nobody looks: drawing is what they cost."""
    path.touch()
    return path


def test_overlays_are_named_by_slice_and_dice(tmp_path, monkeypatch):
    image, truth, prediction = phantom()
    arguments = (SPACING, SYNAPSE, "img 0001", tmp_path)
    paths = write_overlays(image, truth, prediction, *arguments, directions="SPL")
    # Mean Dice 1: .966, 2: .929, 3: .944, 4: .923, 5: .9, 6: .75, 7: .696; the median is 4.
    assert sorted(path.name for path in paths) == [
        "img_0001_best_z1_dice0.97.png",
        "img_0001_median_z4_dice0.92.png",
        "img_0001_worst_z7_dice0.70.png",
    ]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    # Other scores, other names: the old pictures go, those of a case with a longer name stay.
    monkeypatch.setattr(overlays, "save_png", unseen)
    (tmp_path / "img_00012_best_z1_dice0.97.png").touch()
    write_overlays(image, truth, truth, *arguments, directions="SPL")
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4 and "img_00012_best_z1_dice0.97.png" in names
    assert all("dice1.00" in name for name in names if name.startswith("img_0001_"))


def test_region_limits_the_choice_and_few_slices_give_few_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(overlays, "save_png", unseen)
    image, truth, prediction = phantom()
    arguments = (image, truth, prediction, SPACING, SYNAPSE, "c", tmp_path)

    def chosen(*slices):
        paths = write_overlays(*arguments, region=np.isin(np.arange(9), slices), directions="SPL")
        return {m[1]: int(m[2]) for p in paths for m in [re.search(r"_(\w+)_z(\d+)_", p.name)]}

    assert chosen(2, 5, 6) == {"best": 2, "median": 5, "worst": 6}
    assert chosen(2, 6) == {"best": 2, "worst": 6}
    assert chosen(0, 4) == {"best": 4}
    assert chosen(0, 8) == {}


def test_among_failures_the_large_organ_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(overlays, "save_png", unseen)
    _, truth, _ = phantom()
    image, prediction = truth / 8.0, truth * 0
    paths = write_overlays(
        image, truth, prediction, SPACING, SYNAPSE, "c", tmp_path, directions="SPL"
    )
    worst = next(path.name for path in paths if "worst" in path.name)
    assert worst == "c_worst_z3_dice0.00.png"  # 3..5 hold the spleen as well


def text_of(figure):
    return {t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title)}


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_overlay_panels_orientation_aspect_and_legend():
    image, truth, prediction = phantom()
    figure = overlay_slice(image[4], truth[4], prediction[4], (2.0, 0.5), SYNAPSE, "a title")
    assert [ax.get_title() for ax in figure.axes] == ["image", "ground truth", "prediction"]
    assert {"R", "L", "A", "P"} <= text_of(figure)
    assert legend_of(figure) == ["spleen  1.00", "liver  0.85"]
    assert figure.texts[0].get_text() == "a title"
    ax = figure.axes[1]
    where = {text.get_text(): text.get_position() for text in ax.texts}
    assert where["R"][0] < 0.1 < 0.9 < where["L"][0] and where["P"][1] < 0.1 < 0.9 < where["A"][1]
    turned = overlay_slice(
        image[4], truth[4], prediction[4], (2.0, 0.5), SYNAPSE, "a title", AXES["sagittal"]
    )
    where = {text.get_text(): text.get_position() for text in turned.axes[1].texts}
    assert where["A"][0] < 0.1 < 0.9 < where["P"][0] and where["I"][1] < 0.1 < 0.9 < where["S"][1]
    # 30 rows of 2 mm by 40 columns of 0.5 mm, row 0 on top.
    assert ax.get_xlim() == (0, 20) and ax.get_ylim() == (60, 0)
    inches = ax.get_position().transformed(figure.dpi_scale_trans.inverted())
    box = figure.get_size_inches() * [inches.width, inches.height]
    assert box[1] / box[0] == pytest.approx(60 / 20)


def test_overlay_draws_an_organ_where_it_is_in_its_color(tmp_path):
    """One organ in the patient's right anterior corner: upper left quarter of its panel."""
    truth = np.zeros((1, 40, 40), np.uint8)
    truth[0, 2:18, 2:18] = 7
    write_overlays(
        np.zeros((1, 40, 40)),
        truth,
        truth,
        (1.0, 1.0, 1.0),
        SYNAPSE,
        "c",
        tmp_path,
        directions="SPL",
    )
    pixels = imread(next(tmp_path.iterdir()))[..., :3]
    color = np.array(to_rgb(palette(SYNAPSE)["aorta"]))
    hits = np.argwhere(np.abs(pixels - 0.3 * color).max(axis=-1) < 0.02)  # the fill on black
    hits = hits[hits[:, 1] < 2 * pixels.shape[1] // 3]  # of the truth panel
    panel = overlay_slice(truth[0] * 0.0, truth[0], truth[0], (1, 1), SYNAPSE, "t").axes[1]
    box = panel.get_position()
    columns = (hits[:, 1] / pixels.shape[1] - box.x0) / box.width
    rows = ((1 - hits[:, 0] / pixels.shape[0]) - box.y0) / box.height
    assert len(hits) > 5000
    assert 0.04 < columns.min() < columns.max() < 0.46
    assert 0.54 < rows.min() < rows.max() < 0.96


@pytest.mark.parametrize(
    ("drop", "titles"),
    [
        ("truth", ["image", "prediction"]),
        ("prediction", ["image", "ground truth"]),
        ("both", ["image"]),
    ],
)
def test_absent_maps_have_no_panel(drop, titles):
    image, truth, prediction = phantom()
    truth = None if drop in ("truth", "both") else truth[4]
    prediction = None if drop in ("prediction", "both") else prediction[4]
    figure = overlay_slice(image[4], truth, prediction, SPACING[1:], SYNAPSE, "t")
    assert [ax.get_title() for ax in figure.axes] == titles
    assert legend_of(figure) == ([] if drop == "both" else ["spleen", "liver"])


def test_preview_shows_slices_with_organs(tmp_path, monkeypatch):
    figures = []
    save = overlays.save_png
    kept = lambda figure, path: figures.append(figure) or save(figure, path)  # noqa: E731
    monkeypatch.setattr(overlays, "save_png", kept)
    image, _, prediction = phantom(depth=40)
    prediction[10:36, 12, 12] = 7
    path = write_preview(
        image, prediction, SPACING, SYNAPSE, tmp_path / "img0001.png", directions="SPL"
    )
    shown = [int(t[4:]) for t in text_of(figures[-1]) if t.startswith("z = ")]
    assert len(shown) == 12 and {1, 35} <= set(shown)
    assert all(prediction[z].any() for z in shown)
    assert legend_of(figures[-1]) == ["spleen", "liver", "aorta"]
    assert imread(path).shape[1] > 1000
    write_preview(image[:5], prediction[:5] * 0, SPACING, SYNAPSE, path, directions="SPL")
    assert "no organ found" in figures[-1].texts[0].get_text()
    assert len([t for t in text_of(figures[-1]) if t.startswith("z = ")]) == 5
    assert sum(ax.get_visible() for ax in figures[-1].axes) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["img0001.png"]  # nothing half-written


@pytest.mark.parametrize("count", [1, 2, 40, 5000])
def test_training_curve_at_any_length(tmp_path, count):
    records = [
        {
            "step": s,
            "loss": 1 / (s + 1),
            "final_dice": 0.5,
            "learning_rate": 1e-3,
            "images_per_second": 9.0,
        }
        for s in range(count)
    ]
    training_curve.write_training_curve(records, tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").shape == (484, 1089, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_training_curve_draws_what_is_there(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(training_curve, "save_png", lambda figure, path: figures.append(figure))
    records = [
        {"step": 1, "loss": 2.0, "final_ce": 1.0, "gradient_norm": 3.0},
        {"step": 2, "loss": float("nan"), "final_ce": 0.8, "final_weight": 0.6},
        {"step": 3, "loss": 1.0, "learning_rate": 1e-3, "final_ce": 0.7},
    ]
    training_curve.write_training_curve(records, tmp_path / "curve.png")
    main, *sides = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in main.lines}
    assert lines == {
        "loss": [[1, 2], [3, 1]],
        "final cross-entropy": [[1, 1], [2, 0.8], [3, 0.7]],
    }
    assert [ax.get_title("left") for ax in sides] == ["learning rate", "gradient norm"]
    assert sides[0].lines[0].get_xydata().tolist() == [[3, 1e-3]]
    training_curve.write_training_curve([], tmp_path / "none.png")
    assert len(figures) == 1  # nothing to draw yet


@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((1, 20, 30), (5, 0.001, 5)),
        ((1, 20, 30), (1, 1, 500)),
        ((1, 20, 30), (1, 100, 1)),
        ((1, 1, 900), (1, 1, 1)),
        ((1, 3000, 20), (1, 0.1, 0.1)),
    ],
)
def test_pictures_of_odd_shapes_are_bounded(shape, spacing, tmp_path):
    labels = np.zeros(shape, np.uint8)
    labels[:, : -(-shape[1] // 2), : shape[2] // 2] = 1
    image = np.full(shape, 0.5, np.float32)
    names = ["background", "organ"]
    given = {"directions": "SPL"}
    paths = [overlays.write_preview(image, labels, spacing, names, tmp_path / "sheet.png", **given)]
    paths += overlays.write_overlays(image, labels, labels, spacing, names, "c", tmp_path, **given)
    for path in paths:
        high, wide, _ = imread(path).shape
        assert 100 < high < 4000 and 300 < wide < 4000
        assert is_colored(imread(path)).mean() > 0.02  # the organ is seen
    assert overlays.scale_note(shape[1:], spacing[1:]) == " (not to scale)"


def is_colored(picture):
    return np.ptp(picture[..., :3], axis=-1) > 0.05


def test_usual_slices_are_to_scale():
    assert overlays.display_spacing((20, 512), (5.0, 0.7)) == pytest.approx((5.0, 0.7))
    assert overlays.scale_note((512, 512), (0.7, 0.7)) == ""
