"""NIfTI files: every orientation, every way of being damaged, and writing on the source grid."""

import gzip
import itertools
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.io.nifti import write_label
from pgpsam_jax.data.io.volumes import read_grid, read_image, read_label
from pgpsam_jax.data.io.voxel_grid import SourceGrid, to_display, to_source
from pgpsam_jax.errors import UserError
from tests.support.places import shared

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), *[(1, -1)] * 3))
SPACING = (0.8, 1.7, 3.1)  # along R, A, S
GEOMETRY = (
    *("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def oriented_affine(order, signs, shape, tilt=0.0):
    """Affine whose file axis i runs along world axis order[i] with the given sign."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * SPACING[world]
        affine[world, 3] = -sign * SPACING[world] * (shape[axis] - 1) / 2 + 7.3 * (world + 1)
    c, s = np.cos(tilt), np.sin(tilt)
    return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]) @ affine


def save(path, array, affine=None, codes=(1, 2), slope=None):
    affine = np.diag([1.5, 1.5, 4, 1]) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


def save_raw(path, raw, slope, inter):
    """Stored values and scale exactly as given; nibabel would rescale the data itself."""
    header = nib.Nifti1Header()
    header.set_data_shape(raw.shape)
    header.set_data_dtype(raw.dtype)
    header.set_sform(np.diag([2.0, 2, 2, 1]), 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, inter, 352
    header["magic"] = b"n+1"
    path.write_bytes(header.binaryblock + bytes(4) + raw.tobytes("F"))
    return path


@pytest.mark.parametrize("order,sx,sy,sz", ORIENTATIONS)
def test_all_orientations_round_trip(tmp_path, order, sx, sy, sz):
    shape = (4, 5, 6)
    affine = oriented_affine(order, (sx, sy, sz), shape, tilt=0.2)
    code = np.arange(120, dtype=np.uint8).reshape(shape)
    path = save(tmp_path / "in.nii.gz", code, affine, codes=(1, 4))
    volume = read_label(path)

    # Independent oracle: the world position of each display voxel, by axis code.
    canonical = nib.as_closest_canonical(nib.load(path)).get_fdata()
    np.testing.assert_array_equal(volume.array, canonical[::-1, ::-1].transpose(2, 1, 0))
    assert volume.spacing == pytest.approx(SPACING[::-1], rel=1e-6)

    out = tmp_path / "out.nii.gz"
    write_label(out, volume.array.astype(np.uint8), volume.source)
    before, after = nib.load(path), nib.load(out)
    np.testing.assert_array_equal(np.asarray(after.dataobj), code)
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == np.uint8
    for field in GEOMETRY:
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    np.testing.assert_array_equal(after.get_qform(), before.get_qform())
    np.testing.assert_array_equal(after.get_sform(), before.get_sform())


def test_display_directions(tmp_path):
    """Row 0 is anterior, column 0 the patient's right, slice 0 inferior."""
    array = np.zeros((4, 5, 6), np.int16)  # identity-like affine: axes run right, anterior, up
    array[3, :, :] += 1  # patient's right
    array[:, 4, :] += 10  # anterior
    array[:, :, 5] += 100  # superior
    shown = read_image(save(tmp_path / "a.nii", array)).array
    assert shown.shape == (6, 5, 4) and shown.dtype == np.float32 and shown.flags.c_contiguous
    assert (shown[:, :, 0] % 10 == 1).all() and (shown[:, :, 1:] % 10 == 0).all()
    assert (shown[:, 0] // 10 % 10 == 1).all() and (shown[:, 1:] // 10 % 10 == 0).all()
    assert (shown[5] >= 100).all() and (shown[:5] < 100).all()


@given(st.sampled_from(ORIENTATIONS), st.tuples(*[st.integers(1, 7)] * 3), st.floats(-0.6, 0.6))
@settings(max_examples=60, deadline=None)
def test_display_affine_agrees_with_the_voxel_map(orientation, shape, tilt):
    order, *signs = orientation
    affine = oriented_affine(order, signs, shape, tilt)
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    grid = SourceGrid.of("x", header, affine)
    index = np.moveaxis(np.indices(shape), 0, -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    shown = np.stack([to_display(world[..., k], grid) for k in range(3)], -1)
    display = np.moveaxis(np.indices(grid.display_shape), 0, -1)
    expected = display @ grid.display_affine[:3, :3].T + grid.display_affine[:3, 3]
    np.testing.assert_allclose(shown, expected, atol=1e-9)
    for k in range(3):
        back = to_source(to_display(index[..., k], grid), grid)
        np.testing.assert_array_equal(back, index[..., k])


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (3, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_codes_and_suffix_survive(tmp_path, codes, suffix):
    affine = oriented_affine((0, 1, 2), (-1, -1, 1), (3, 4, 5))
    path = save(tmp_path / f"in{suffix}", np.ones((3, 4, 5), np.float32), affine, codes)
    volume = read_image(path)
    write_label(tmp_path / f"o{suffix}", np.ones((5, 4, 3), np.uint8), volume.source)
    before, after = nib.load(path), nib.load(tmp_path / f"o{suffix}")
    header = volume.source.header
    assert (header["qform_code"], header["sform_code"]) == tuple(codes)
    for field in GEOMETRY:
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    assert after.header.get_slope_inter() in [(1, 0), (None, None)]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def test_trailing_axis_nifti2_and_big_endian(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    four = save(tmp_path / "four.nii.gz", array[..., None])
    grid = read_grid(four)
    assert grid.shape == (3, 4, 5, 1) and grid.display_shape == (5, 4, 3)
    write_label(tmp_path / "o.nii.gz", read_label(four).array.astype(np.uint8), grid)
    np.testing.assert_array_equal(
        np.asarray(nib.load(tmp_path / "o.nii.gz").dataobj)[..., 0], array
    )

    nib.save(nib.Nifti2Image(array, np.eye(4)), tmp_path / "two.nii")
    two = read_image(tmp_path / "two.nii")
    write_label(tmp_path / "o2.nii", two.array.astype(np.uint8), two.source)
    assert isinstance(nib.load(tmp_path / "o2.nii"), nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "o2.nii").dataobj), array)

    big = nib.Nifti1Image(array, np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "big.nii").array, two.array)


def test_units_become_millimeters(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.diag([500.0, 500, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "u.nii")
    assert read_grid(tmp_path / "u.nii").spacing == pytest.approx((2.0, 0.5, 0.5))


def test_label_values(tmp_path):
    ids = np.array([0, 1, 7, 104], np.int16).repeat(6).reshape(4, 3, 2)
    shown = ids[::-1, ::-1].transpose(2, 1, 0)
    for path in (
        save(tmp_path / "f64.nii.gz", ids.astype(np.float64)),
        save(tmp_path / "near.nii.gz", ids + 5e-4),
        save_raw(tmp_path / "slope.nii", ids, 1.0000001, 0),
        save_raw(tmp_path / "half.nii", ids * 2, 0.5, 0),
    ):
        label = read_label(path).array
        assert label.dtype == np.int32
        np.testing.assert_array_equal(label, shown)
    with pytest.raises(UserError, match=r"holds 104\.002, not a label id"):
        read_label(save(tmp_path / "soft.nii", ids + np.where(ids == 104, 2e-3, 0)))
    with pytest.raises(UserError, match="beyond 32 bits"):
        read_label(save_raw(tmp_path / "wide.nii", np.full((1, 1, 1), 2**40), 0, 0))


@given(
    st.sets(st.integers(1, 200), min_size=1, max_size=9),
    st.sampled_from([np.uint8, np.int16, np.uint16]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_labels_saved_with_a_scale_factor(tmp_path_factory, ids, dtype, negative):
    """nibabel stores floats in integers by a factor, so that 1 becomes 0.9999."""
    path = tmp_path_factory.mktemp("scaled") / "l.nii"
    array = np.array([0, *sorted(ids)]).reshape(-1, 1, 1)
    image = nib.Nifti1Image(array.astype(np.float64), np.diag([-1.0, -1, 1, 1]))
    image.header.set_data_dtype(dtype)
    nib.save(image, path)
    np.testing.assert_array_equal(read_label(path).array[0, 0], array[:, 0, 0])


@pytest.mark.parametrize("codes, slope", [([0, 1, 100], 1 / 255), ([0, 3], 1.5), ([0, 1, 2], 0.7)])
def test_scaled_values_that_are_no_ids(tmp_path, codes, slope):
    raw = np.array(codes, np.uint8).reshape(-1, 1, 1)
    with pytest.raises(UserError, match=r"not a label id, by the scale factor"):
        read_label(save_raw(tmp_path / "soft.nii", raw, slope, 0))


def test_two_codes_of_one_id(tmp_path):
    raw = np.array([0, 999, 1001], np.int16).reshape(-1, 1, 1)
    with pytest.raises(UserError, match=r"scale factor 0\.001 "):
        read_label(save_raw(tmp_path / "l.nii", raw, 0.001, 0))


def test_image_scale(tmp_path):
    raw = np.array([-3, 0, 5, 1000], np.int16).reshape(4, 1, 1)
    image = read_image(save_raw(tmp_path / "s.nii", raw, 2.5, -1024)).array
    np.testing.assert_array_equal(image[0, 0], (raw[::-1, 0, 0] * 2.5 - 1024).astype(np.float32))


BAD = {
    "missing": (lambda p: None, "is not a file"),
    "text": (lambda p: p.write_text("hello, this is no image"), "named .gz but is not gzip"),
    "plain NIfTI": (lambda p: p.write_bytes(plain()), "named .gz but is not gzip"),
    "zipped text": (lambda p: p.write_bytes(gzip.compress(b"x" * 500)), "not a NIfTI"),
    "4-D": (lambda p: save(p, np.zeros((4, 5, 6, 2), np.int16)), "one 3-D volume"),
    "NaN": (lambda p: save(p, np.full((2, 2, 2), np.nan, np.float32)), "NaN or infinite"),
    "Inf": (lambda p: save(p, np.full((2, 2, 2), -np.inf)), "NaN or infinite"),
    "overflow": (lambda p: save(p, np.full((2, 2, 2), 1e300)), "NaN or infinite"),
    "complex": (lambda p: save(p, np.zeros((2, 2, 2), np.complex64)), "plain integers or floats"),
}


def plain(shape=(20, 21, 22)):
    noise = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    return nib.Nifti1Image(noise, np.eye(4)).to_bytes()


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reader", [read_image, read_label])
def test_bad_files_get_one_sentence(tmp_path, kind, reader):
    make, message = BAD[kind]
    path = tmp_path / "bad.nii.gz"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", ["srow_x", "srow_z"])
def test_singular_affine(tmp_path, rows):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header[rows] = 0 if rows == "srow_x" else image.header["srow_y"]
    (tmp_path / "a.nii").write_bytes(header_and(image, b"\0" * 16))
    with pytest.raises(UserError, match="singular affine"):
        read_image(tmp_path / "a.nii")


def header_and(image, data):
    image.header["vox_offset"] = 352
    return image.header.binaryblock + bytes(4) + data


def test_every_truncation_and_checksum_error_is_found(tmp_path):
    whole = gzip.compress(plain(), mtime=0)
    path = tmp_path / "t.nii.gz"
    path.write_bytes(whole)
    read_image(path)
    for cut in (0, 1, 2, 5, 11, 100, len(whole) // 3, len(whole) * 2 // 3, *range(-9, 0)):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"damaged|cut off|not gzip|not a NIfTI"):
            read_image(path)
    for position in (-1, -5, -8, len(whole) // 2):  # length, checksum (twice), data
        broken = bytearray(whole)
        broken[position] ^= 0x10
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged or cut off"):
            read_image(path)
    unzipped = plain()
    for cut in (0, 3, 200, 350, 352, 5000, -1):
        (tmp_path / "t.nii").write_bytes(unzipped[:cut])
        with pytest.raises(UserError, match=r"not a NIfTI|cut off after at most \d+ of 18480 by"):
            read_image(tmp_path / "t.nii")


def test_gzip_under_a_plain_name(tmp_path):
    (tmp_path / "t.nii").write_bytes(gzip.compress(plain()))
    with pytest.raises(UserError, match=r"rename it to t\.nii\.gz"):
        read_image(tmp_path / "t.nii")


def claimed(shape, dtype=np.int16):
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return header.binaryblock + bytes(4)


def test_no_memory_for_claims_and_bombs(tmp_path):
    """A header of 4 GiB, a short file of 2 GiB, 256 MiB of zeros behind a small volume."""
    (tmp_path / "claim.nii.gz").write_bytes(gzip.compress(claimed((2048, 1024, 1024))))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    small = claimed((4, 4, 4)) + bytes(128)
    bomb = b"".join(
        [squeeze.compress(small), *(squeeze.compress(bytes(1 << 20)) for _ in range(256))]
    )
    (tmp_path / "bomb.nii.gz").write_bytes(bomb + squeeze.flush())
    tracemalloc.start()
    with pytest.raises(UserError, match=r"voxels, 8\.0 GiB in memory, over"):
        read_image(tmp_path / "claim.nii.gz")
    with pytest.raises(UserError, match="inflates past the size"):
        read_image(tmp_path / "bomb.nii.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_padding_after_the_voxels_is_tolerated(tmp_path):
    (tmp_path / "p.nii.gz").write_bytes(gzip.compress(claimed((4, 4, 4)) + bytes(128 + 512)))
    assert read_image(tmp_path / "p.nii.gz").array.shape == (4, 4, 4)


@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_header_damage_is_a_user_error_or_a_volume(tmp_path_factory, changes):
    data = bytearray(plain((3, 4, 5)))
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    path.write_bytes(data)
    with np.errstate(all="ignore"):
        try:
            volume = read_image(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert volume.array.shape == volume.source.display_shape
            assert np.isfinite(volume.array).all() and np.isfinite(volume.spacing).all()
            write_label(
                path.with_name("o.nii"), np.zeros(volume.array.shape, np.uint8), volume.source
            )


def test_write_refuses_other_grids_and_names(tmp_path):
    grid = read_grid(save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16)))
    with pytest.raises(ValueError, match="need uint8"):
        write_label(tmp_path / "o.nii", np.zeros((2, 3, 4), np.uint8), grid)
    with pytest.raises(ValueError, match="need uint8"):
        write_label(tmp_path / "o.nii", np.zeros((4, 3, 2), np.int32), grid)
    with pytest.raises(UserError, match="name the file"):
        write_label(tmp_path / "o.mha", np.zeros((4, 3, 2), np.uint8), grid)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.golden
def test_real_mr_in_another_orientation():
    volume = read_image(shared("data/head_mr/t1.nii.gz"))
    assert volume.source.orientation == "LIA" and volume.array.shape == (256, 256, 256)
    assert volume.spacing == pytest.approx((1, 1, 1), abs=1e-6)
    canonical = nib.as_closest_canonical(nib.load(volume.source.path))
    plane = np.asarray(canonical.dataobj)[::-1, ::-1, 100].T
    np.testing.assert_array_equal(volume.array[100], plane)
