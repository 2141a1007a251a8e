"""Along which axis a volume is cut: thick slices as they were taken, single slices as they are."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.config import default_config, from_json, to_json
from pgpsam_jax.data import cache, dataset
from pgpsam_jax.data.io.nifti import from_nibabel, write_label
from pgpsam_jax.data.io.volumes import read_grid, read_image, read_label
from pgpsam_jax.data.io.voxel_grid import AXES, AXIAL, SourceGrid
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from tests.support.orientations import AXIS_CODES, stored_as
from tests.support.refusal import refuse
from tests.support.small_run import cached_cases, config_for, write_data

THICK = {AXIAL: (1, 1, 5), "coronal": (1, 5, 1), "sagittal": (5, 1, 1)}  # mm, right, front, up
ASIDE = {AXIAL: (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}  # RAS axes of D, H, W
DOWN = {AXIAL: (1, -1, -1), "coronal": (-1, -1, -1), "sagittal": (-1, -1, -1)}


def ras(spacing, shape=(5, 6, 7), dtype=np.int16):
    """Voxels that count up, stored R A S."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-20, 10, 300)
    return nib.Nifti1Image(np.arange(np.prod(shape)).reshape(shape).astype(dtype), affine)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("codes", AXIS_CODES)
def test_views_of_every_orientation(tmp_path, codes, axis):
    """D, H and W as documented, however the file stores them, and the way back."""
    image = ras(THICK[axis])
    path = tmp_path / "v.nii"
    nib.save(stored_as(image, codes), path)
    volume = read_image(path, axis)
    expected = np.asarray(image.dataobj).transpose(ASIDE[axis])
    expected = expected[tuple(slice(None, None, step) for step in DOWN[axis])]
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.spacing == pytest.approx((5, 1, 1)) and volume.source.thick_axis == axis
    np.testing.assert_array_equal(read_image(path).along(axis).array, expected)
    ids = (volume.array % 7).astype(np.uint8)
    write_label(tmp_path / "m.nii.gz", ids, volume.source)
    mask = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(mask.dataobj, np.asarray(nib.load(path).dataobj) % 7)
    np.testing.assert_array_equal(mask.affine, nib.load(path).affine)
    np.testing.assert_array_equal(read_label(tmp_path / "m.nii.gz", axis).array, ids)


def test_even_voxels_have_no_axis():
    for spacing in ((1, 1, 1), (1, 1.2, 1), (0.7, 0.7, 1)):
        image = ras(spacing)
        assert SourceGrid.of("x", image.header, image.affine).thick_axis is None


@pytest.mark.parametrize("spacing, wanted", [(THICK[a], a) for a in AXES] + [((1, 1, 1), AXIAL)])
def test_auto_is_what_most_training_cases_are(tmp_path, spacing, wanted):
    root = write_data(tmp_path, ("a", "b", "c", "d"))
    for case in "abc":
        change_spacing(root, case, spacing)
    change_spacing(root, "d", (5, 1, 1) if wanted == AXIAL else (1, 1, 5))
    config = config_for(root)
    split = dataset.find_split(config.data)
    assert config.data.axis == "auto"
    config.data.axis = dataset.axis_of(config.data, split.train)
    assert config.data.axis == wanted
    images, _ = cached_cases(config, split, tmp_path / "run")[0].load()
    depth = dict(zip(("sagittal", "coronal", AXIAL), (24, 20, 10), strict=True))[wanted]
    assert len(images) == depth
    fixed = config_for(root, data__axis="coronal")
    assert dataset.axis_of(fixed.data, split.train) == "coronal"
    with pytest.raises(UserError, match=r"data\.axis is 'across'; give auto, axial"):
        dataset.axis_of(config_for(root, data__axis="across").data, split.train)


def change_spacing(root, case, spacing):
    for kind in ("images", "labels"):
        path = root / kind / f"{case}.nii.gz"
        image = nib.load(path)
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


def test_the_axis_is_part_of_a_cache_and_old_runs_stay_axial(tmp_path):
    root = write_data(tmp_path)
    config = config_for(root, data__axis=AXIAL)
    split = dataset.find_split(config.data)
    files = []
    for axis in AXES:
        config.data.axis = axis
        files += [cached.file for cached in cached_cases(config, split, tmp_path)]
    assert len(set(files)) == len(files)
    stored = to_json(default_config())
    del stored["data"]["axis"]
    assert from_json(stored).data.axis == AXIAL


def flat(array, affine, code):
    """A NIfTI file of two dimensions."""
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    if code == "sform":
        header.set_sform(affine, 1)
    if code == "qform":
        header.set_qform(affine, 1)
    header["scl_slope"], header["vox_offset"] = 1, header.single_vox_offset
    return header.binaryblock + bytes(4) + array.tobytes(order="F")


@pytest.mark.parametrize("code", ["sform", "qform", "none", "no third column"])
def test_a_single_slice_stays_one_slice(tmp_path, code):
    array = np.arange(30, dtype=np.int16).reshape(5, 6)
    affine = np.diag([-1.5, -2.0, 4.0, 1.0])
    if code == "no third column":
        affine[2, 2] = 0
    code = "sform" if code == "no third column" else code
    (tmp_path / "s.nii").write_bytes(flat(array, affine, code))
    volume = read_image(tmp_path / "s.nii")
    assert volume.array.shape == (1, 6, 5)
    if code != "none":
        np.testing.assert_array_equal(volume.array[0], array.T)
        assert volume.spacing[1:] == pytest.approx((2, 1.5))
    for axis in AXES:
        assert read_image(tmp_path / "s.nii", axis).array.shape == (1, 6, 5)
    write_label(tmp_path / "m.nii", (volume.array % 3).astype(np.uint8), volume.source)
    mask = nib.load(tmp_path / "m.nii")
    assert mask.shape == (5, 6)
    np.testing.assert_array_equal(mask.dataobj, array % 3)
    np.testing.assert_array_equal(from_nibabel(nib.load(tmp_path / "s.nii")).array, volume.array)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(AXIS_CODES), st.integers(0, 2), st.sampled_from(list(AXES)))
def test_a_volume_of_one_slice_is_that_slice(codes, thin, axis):
    shape = [6, 7, 8]
    shape[thin] = 1
    image = stored_as(ras((1, 1, 1), shape), codes)
    grid = SourceGrid.of("x", image.header, image.affine).along(axis)
    assert grid.display_shape[0] == 1 and sorted(grid.display_shape) == sorted(shape)


@pytest.mark.parametrize("codes", AXIS_CODES)
@pytest.mark.parametrize("axis", AXES)
def test_pictures_name_the_sides_of_the_body_whatever_was_stored(codes, axis):
    image = stored_as(ras((1, 1, 2), (6, 7, 8)), codes)
    grid = SourceGrid.of("x", image.header, image.affine).along(axis)
    assert grid.directions == AXES[axis]


def test_a_slice_with_its_label_is_a_case(tmp_path):
    array = np.zeros((20, 16), np.int16)
    array[4:9, 5:11] = 1
    affine = np.diag([-1.5, -2.0, 4.0, 1.0])
    (tmp_path / "i.nii").write_bytes(flat(100 * array, affine, "sform"))
    (tmp_path / "l.nii").write_bytes(flat(array, affine, "sform"))
    table = LabelTable(("background", "a"), {1: 1})
    case = Case("x", tmp_path / "i.nii", tmp_path / "l.nii")
    (cached,) = cache.build_cache([case], table, Preprocessing(32, (0, 100)), tmp_path / "cache")
    images, labels = cached.load()
    assert images.shape == (1, 32, 32) and cached.areas.tolist() == [[290, 30]]
    assert ((images[0] > 0.6) == (labels[0] == 1)).mean() > 0.98


def test_what_is_no_slice_and_no_volume(tmp_path):
    for shape in ((5,), (5, 6, 7, 2), (5, 6, 1, 3)):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "x.nii")
        refuse(read_grid, tmp_path / "x.nii", "expected one slice or one 3-D volume")
