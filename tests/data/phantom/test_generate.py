"""The abdominal phantom: anatomy as in a textbook, files that survive kills and damage."""

import functools
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from pgpsam_jax.data.phantom import generate
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import file_digest

SAMPLE = (1, 2, 6, 9)
ANY = [*SAMPLE, *(pytest.param(number, marks=pytest.mark.slow) for number in (23, 40))]
ORGANS = dict(
    spleen=1, right_kidney=2, left_kidney=3, gallbladder=4, liver=6, stomach=7, aorta=8, ivc=9,
    pancreas=11,
)  # fmt: skip
# Adult ranges in ml; for the tubes (aorta, vena cava) of a scan of 20 to 22 cm.
VOLUMES = dict(
    spleen=(90, 320), right_kidney=(90, 260), left_kidney=(90, 260), gallbladder=(15, 70),
    liver=(900, 2000), stomach=(150, 600), aorta=(50, 140), ivc=(40, 120), pancreas=(45, 130),
)  # fmt: skip
# Median HU: portal-venous phase; the stomach is mostly fluid and gas and has its own test.
MEDIAN_HU = dict(
    spleen=(112, 150), right_kidney=(140, 215), left_kidney=(140, 215), gallbladder=(0, 25),
    liver=(90, 122), aorta=(150, 195), ivc=(125, 190), pancreas=(85, 120),
)  # fmt: skip


@functools.cache
def case(number, seed=0):
    return generate.make_case(seed, number)


@functools.cache
def canonical(number):
    """(image, label) with axes to the patient's right..left = 0, back..front = 1, feet..head = 2.

    RAS+: index 0 grows toward the patient's right.
    """
    image, label, affine = case(number)
    pair = [nib.as_closest_canonical(nib.Nifti1Image(a, affine)) for a in (image, label)]
    assert nib.aff2axcodes(pair[0].affine) == ("R", "A", "S")
    return (*(np.asarray(p.dataobj) for p in pair), np.array(pair[0].header.get_zooms()))


def center(mask):
    return np.array(ndimage.center_of_mass(mask))


def test_a_case_is_a_pure_function_of_seed_and_number():
    image, label, affine = generate.make_case(0, 2)
    for again, first in zip(case(2), (image, label, affine), strict=True):
        np.testing.assert_array_equal(again, first)
    assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == label.shape
    for other in (generate.make_case(1, 2)[0], case(1)[0]):
        assert other.shape != image.shape or np.mean(other != image) > 0.5


@pytest.mark.parametrize("number", ANY)
def test_organ_volumes(number):
    _, label, zooms = canonical(number)
    volume = {name: (label == i).sum() * zooms.prod() / 1000 for name, i in ORGANS.items()}
    for name, (low, high) in VOLUMES.items():
        assert low < volume[name] < high, (name, volume[name])
    assert max(volume, key=volume.get) == "liver"
    assert set(np.unique(label)) <= set(range(14))


@pytest.mark.parametrize("number", ANY)
def test_organs_lie_where_they_belong(number):
    _, label, zooms = canonical(number)
    at = {name: center(label == i) * zooms for name, i in ORGANS.items()}
    right, front, up = range(3)
    spine = at["aorta"][right]
    for name in ("liver", "right_kidney", "gallbladder", "ivc"):
        assert at[name][right] > spine + 10, name
    for name in ("spleen", "left_kidney", "stomach"):
        assert at[name][right] < spine - 10, name
    assert at["left_kidney"][up] > at["right_kidney"][up]
    assert at["spleen"][up] > at["left_kidney"][up]
    assert at["gallbladder"][up] < at["liver"][up]
    for name in ("stomach", "pancreas", "gallbladder"):
        assert at[name][front] > at["left_kidney"][front], name
    assert at["pancreas"][front] > at["aorta"][front]
    across = np.argwhere(label == ORGANS["pancreas"])[:, right] * zooms[right]
    assert across.min() < spine - 40 and across.max() > at["ivc"][right]


@pytest.mark.parametrize("number", ANY)
def test_organs_are_whole_and_thick_enough_to_learn(number):
    _, label, zooms = canonical(number)
    for name, i in ORGANS.items():
        parts, _ = ndimage.label(label == i)
        assert np.bincount(parts.ravel())[1:].max() > 0.95 * (label == i).sum(), name
    for name, least in dict(gallbladder=20, aorta=18, pancreas=18).items():
        widest = 0.0
        for plane in np.moveaxis(label == ORGANS[name], 2, 0):
            inscribed = ndimage.distance_transform_edt(np.pad(plane, 1), sampling=zooms[:2])
            widest = max(widest, 2 * inscribed.max())
        assert widest >= least, (name, widest)
    aorta = (label == ORGANS["aorta"]).any((0, 1))
    assert aorta.mean() > 0.9


@pytest.mark.parametrize("number", ANY)
def test_labels_match_the_visible_intensities(number):
    image, label, zooms = canonical(number)
    median = {}
    for name, (low, high) in MEDIAN_HU.items():
        median[name] = np.median(image[label == ORGANS[name]])
        assert low <= median[name] <= high, (name, median[name])
    assert median["gallbladder"] < median["pancreas"] < median["spleen"] < median["left_kidney"]
    assert median["liver"] < median["spleen"] - 6
    # One voxel outside, an organ's own intensity has gone for the most part: fat, wall, gas.
    for name in ("left_kidney", "right_kidney", "aorta"):
        organ = label == ORGANS[name]
        rim = ndimage.binary_dilation(organ, iterations=2) & ~ndimage.binary_dilation(organ)
        assert np.median(image[rim & (label == 0)]) < median[name] - 60, name
    stomach = label == ORGANS["stomach"]
    gas = stomach & (image < -600)
    assert 0.05 < gas.sum() / stomach.sum() < 0.5
    fluid = ndimage.binary_erosion(stomach, iterations=2) & (image > -50)
    assert center(gas)[1] * zooms[1] > center(fluid)[1] * zooms[1] + 10  # gas rises: supine


def test_the_body_around_the_organs():
    image, label, zooms = canonical(1)
    assert np.median(image[:4, -4:]) == pytest.approx(-1000, abs=10)
    outside = label == 0
    liters = {
        "fat": ((image > -140) & (image < -60) & outside).sum() * zooms.prod() / 1e6,
        "bone": ((image > 220) & outside).sum() * zooms.prod() / 1e6,
        "muscle": ((image > 30) & (image < 85) & outside).sum() * zooms.prod() / 1e6,
        "lung": (image[:, :, -3:] < -700)[20:-20, 40:-40].sum() * zooms.prod() / 1e6,
    }
    assert liters["fat"] > 2 and 0.15 < liters["bone"] < 1 and liters["muscle"] > 1.5
    assert liters["lung"] > 0.05


def test_grids_vary_and_are_anisotropic():
    grids = [case(n) for n in SAMPLE]
    codes = {nib.aff2axcodes(affine) for *_, affine in grids}
    assert {"LPS", "RAS", "LAS", "PSR"} & {"".join(c) for c in codes} and len(codes) >= 4
    assert any(code[0] not in "RL" for code in codes)  # axes permuted, not only flipped
    spacings = []
    for number in SAMPLE:
        image, _, zooms = canonical(number)
        zooms = zooms.round(3)
        assert image.shape[:2] == (160, 160) and 36 <= image.shape[2] <= 52
        assert 2.2 <= zooms[0] == zooms[1] <= 2.6 and 4 <= zooms[2] <= 6
        spacings.append(tuple(zooms))
    assert len(set(spacings)) == len(SAMPLE)
    for *_, affine in grids:
        assert np.abs(affine[:3, 3]).min() > 1e-3
    oblique = [np.sum(np.abs(affine[:3, :3]) > 1e-6) > 3 for *_, affine in grids]
    assert any(oblique) and not all(oblique)


@pytest.fixture
def toy(monkeypatch):
    """Cases of a few voxels, to test the files at no cost."""

    def make_case(seed, number):
        rng = np.random.default_rng([seed, number])
        image = rng.integers(-1000, 1000, (4, 5, 3)).astype(np.int16)
        return image, rng.integers(0, 9, image.shape).astype(np.uint8), np.diag([-2.0, 3, 4, 1])

    monkeypatch.setattr(generate, "make_case", make_case)


def tree(root):
    return {
        str(p.relative_to(root)): file_digest(p)
        for p in root.rglob("*")
        if p.is_file() and p.name != ".phantom.lock"
    }


def test_files_hold_the_case(tmp_path, monkeypatch):
    made = case(2)
    monkeypatch.setattr(generate, "make_case", lambda seed, number: made)
    root = generate.generate(tmp_path / "data", cases=[2], workers=1)
    for kind, expected in zip(("img", "label"), case(2), strict=False):
        file = nib.load(root / f"RawData/Training/{kind}/{kind}0002.nii.gz")
        np.testing.assert_array_equal(np.asarray(file.dataobj), expected)
        assert file.get_data_dtype() == expected.dtype
        np.testing.assert_allclose(file.affine, case(2)[2], atol=1e-4)
        assert file.header.get_xyzt_units()[0] == "mm"


def test_layout_is_btcv_and_workers_change_nothing(tmp_path, toy):
    root = generate.generate(tmp_path / "one", workers=1)
    ids = [*range(1, 11), *range(21, 41)]
    names = {f"RawData/Training/{k}/{k}{i:04d}.nii.gz" for i in ids for k in ("img", "label")}
    assert tree(root).keys() == names | {"phantom.json"}
    assert tree(generate.generate(tmp_path / "three", workers=3)) == tree(root)
    manifest = json.loads((root / "phantom.json").read_text())
    assert manifest["version"] == generate.VERSION and manifest["seed"] == 0
    image = "RawData/Training/img/img0021.nii.gz"
    assert manifest["sha256"]["0021"][0] == tree(root)[image]
    codes = set()
    for i in ids:
        header = nib.load(root / f"RawData/Training/img/img{i:04d}.nii.gz").header
        codes.add((int(header["qform_code"]), int(header["sform_code"])))
    assert codes == set(generate.FORM_CODES)


def test_a_complete_data_set_is_not_touched(tmp_path, toy, monkeypatch):
    root = generate.generate(tmp_path, cases=[1, 2, 3])
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    monkeypatch.setattr(generate, "make_case", None)
    generate.generate(tmp_path, cases=[1, 3])
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


@pytest.mark.parametrize("survived", range(5))
def test_an_interrupted_run_is_completed(tmp_path, toy, monkeypatch, survived):
    """Killed at each move in turn; 0 is before anything is in place."""
    expected = tree(generate.generate(tmp_path / "whole", cases=[1, 2]))
    moves = iter(range(survived))
    move = generate.os.replace

    def killed(source, target):
        if next(moves, None) is None:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate.os, "replace", killed)
        generate.generate(tmp_path / "half", cases=[1, 2])
    (tmp_path / "half/.tmp-phantom-left/RawData").mkdir(parents=True)  # as SIGKILL leaves it
    assert tree(tmp_path / "half") != expected
    assert tree(generate.generate(tmp_path / "half", cases=[1, 2])) == expected
    assert not list((tmp_path / "half").glob(".tmp-*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_and_repaired(tmp_path, toy, damage):
    root = generate.generate(tmp_path, cases=[1, 2, 3])
    expected = tree(root)
    victim = root / "RawData/Training/label/label0002.nii.gz"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:40])
    elif damage == "remove":
        victim.unlink()
    else:
        (root / "phantom.json").write_text('{"version": 1, "se')
    generate.generate(tmp_path, cases=[1])  # a listed case is repaired even if not asked for
    generate.generate(tmp_path, cases=[1, 2, 3])
    assert tree(root) == expected


def test_another_seed_replaces_and_more_cases_add(tmp_path, toy):
    generate.generate(tmp_path / "a", seed=5, cases=[1, 2, 3])
    assert tree(generate.generate(tmp_path / "a", cases=[1])) == tree(
        generate.generate(tmp_path / "b", cases=[1])
    )
    generate.generate(tmp_path / "a", cases=[4])
    assert tree(tmp_path / "a") == tree(generate.generate(tmp_path / "c", cases=[1, 4]))


def test_other_data_is_never_overwritten(tmp_path, toy):
    image = tmp_path / "RawData/Training/img/img0001.nii.gz"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"a patient")
    with pytest.raises(UserError, match="not written by the phantom generator"):
        generate.generate(tmp_path, cases=[1])
    assert image.read_bytes() == b"a patient" and len(list(tmp_path.rglob("*"))) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the phantom"):
        generate.generate(tmp_path / "file", cases=[1])
