"""Boxes of a table and of labels are the same boxes, however the file stores its axes."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgpsam_jax.data.boxes import (
    COLUMNS,
    SliceBox,
    VoxelBox,
    boxes_around,
    class_names,
    read_boxes,
    slice_boxes,
)
from pgpsam_jax.data.io.voxel_grid import AXES, SourceGrid, to_display
from pgpsam_jax.errors import UserError

SHAPE = (5, 7, 4)
ORIENTATIONS = [
    codes
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]
ranges = st.tuples(
    *(st.tuples(*[st.integers(0, n - 1)] * 2).map(lambda pair: sorted(pair)) for n in SHAPE)
)


def grid_of(codes, axis):
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), SHAPE)
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)
    return SourceGrid.of("volume.nii", image.header, image.affine).along(axis)


@given(st.sampled_from(ORIENTATIONS), st.sampled_from(sorted(AXES)), ranges)
def test_a_box_of_voxels_is_the_box_around_them(codes, axis, box):
    grid = grid_of(codes, axis)
    stored = np.zeros(SHAPE, np.uint8)
    stored[tuple(slice(first, last + 1) for first, last in box)] = 2
    of_table = VoxelBox("liver", *(tuple(end) for end in zip(*box, strict=True)))
    found = slice_boxes([of_table], grid, {"spleen": 1, "liver": 2})
    assert found == boxes_around(to_display(stored, grid))


def test_boxes_around_scattered_labels():
    ids = np.zeros((2, 5, 6), np.uint8)
    ids[1, 0, 2] = ids[1, 3, 4] = 7
    ids[1, 4, 0] = 1
    assert boxes_around(ids) == {1: [SliceBox(1, (0, 4, 1, 5)), SliceBox(7, (2, 0, 5, 4))]}


def test_table(tmp_path):
    table = tmp_path / "boxes.csv"
    table.write_text(
        f"\ufeff{','.join(COLUMNS)}\n"
        "a.nii.gz, liver,0,1,2,3,3,3\n\nb.NII,spleen,4,4,0,6,0,3\na.nii.gz,liver,2,2,0,0,1,1\n"
    )
    found = read_boxes(table)
    assert found == {
        "a": [VoxelBox("liver", (0, 2, 3), (1, 3, 3)), VoxelBox("liver", (2, 0, 1), (2, 0, 1))],
        "b": [VoxelBox("spleen", (4, 0, 0), (4, 6, 3))],
    }
    assert class_names(found) == ("background", "liver", "spleen")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "needs the line file,label,i0"),
        ("file,label,i0,i1,j0,j1,k0,k1", "at least one box"),
        ("file,label,x0,x1,y0,y1,k0,k1\na,b,0,1,0,1,0,1", "needs the line"),
        (f"{','.join(COLUMNS)}\na,b,1,0,0,1,0,1", "the line 'a,b,1,0,0,1,0,1'"),
        (f"{','.join(COLUMNS)}\na,b,0,1,0,1,0", "first and last voxel"),
        (f"{','.join(COLUMNS)}\na,b,0,1.5,0,1,0,1", "first and last voxel"),
        (f"{','.join(COLUMNS)}\na,b,-1,1,0,1,0,1", "first and last voxel"),
        (f"{','.join(COLUMNS)}\na,,0,1,0,1,0,1", "FILE,LABEL"),
    ],
)
def test_tables_that_are_refused(tmp_path, lines, message):
    table = tmp_path / "boxes.csv"
    table.write_text(lines)
    with pytest.raises(UserError, match=message):
        read_boxes(table)


def test_boxes_that_do_not_fit_the_volume():
    grid = grid_of("RAS", "axial")
    with pytest.raises(UserError, match=r"5 x 7 x 4 voxels, .* ends at voxel \(4, 7, 3\)"):
        slice_boxes([VoxelBox("liver", (0, 0, 0), (4, 7, 3))], grid, {"liver": 1})
    with pytest.raises(UserError, match="'lever', which the label table lacks"):
        slice_boxes([VoxelBox("lever", (0, 0, 0), (1, 1, 1))], grid, {"liver": 1})
