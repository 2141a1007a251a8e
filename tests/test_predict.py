"""Masks come back on the input's own grid, whatever its axes, flips, spacing and codes."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import masks

RUN = {"workdir": "runs/x", "parameters": "0123abcd"}
BESIDE = {masks.RECORD, masks.LABELS, masks.VOLUMES}
NAMES = ["background", *(f"organ_{i}" for i in range(1, 6))]


class Oracle:
    """Stands for a trained model: each voxel's class is written into its intensity."""

    preprocessing = Preprocessing(32, (0.0, 100.0))

    def __call__(self, volume):
        return np.rint(volume.array / 10).astype(np.uint8)


def volume(order, flips, rng):
    """An image whose storage axes are a permutation `order` of RAS, flipped where `flips`."""
    spacing = np.array([0.7, 1.3, 4.5])
    matrix = np.zeros((4, 4))
    for axis in range(3):
        matrix[order[axis], axis] = spacing[order[axis]] * (-1 if flips[axis] else 1)
    matrix[:, 3] = (12.5, -40, 7, 1)
    code = rng.integers(0, 6, (5, 7, 4))
    image = nib.Nifti1Image((10 * code).astype(np.int16), matrix)
    image.set_qform(matrix, 1)
    image.set_sform(matrix, 2)
    return image, code


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_all_48_orientations(order, tmp_path):
    rng = np.random.default_rng(0)
    wanted = {}
    for flips in itertools.product((False, True), repeat=3):
        name = "".join("-" if f else "p" for f in flips)
        image, code = volume(order, flips, rng)
        nib.save(image, tmp_path / f"{name}.nii.gz")
        wanted[name] = image, code
    inputs = predict.find_inputs(tmp_path)
    options = dict(run=RUN)
    assert predict.predict(Oracle(), NAMES, inputs, tmp_path / "out", **options) == 0
    for name, (image, code) in wanted.items():
        mask = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(mask.dataobj), code)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / f"{name}.nii.gz").affine)
        for form in ("get_qform", "get_sform"):
            ours, theirs = (getattr(i, form)(coded=True) for i in (mask, image))
            np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
            assert ours[1] == theirs[1]


@pytest.mark.slow  # as scores: `test_scoring`
@pytest.mark.parametrize("count", [1, 2])
def test_processes_change_no_file(tmp_path, count):
    """Masks and sheets by other processes, a broken file among the inputs."""
    names = ("a", "b", "c")[: count + 1]
    for name in names:
        nib.save(
            volume((2, 0, 1), (True, False, True), np.random.default_rng(ord(name)))[0],
            tmp_path / f"{name}.nii",
        )
    (tmp_path / "b.nii").write_bytes(b"nothing")
    inputs = predict.find_inputs(tmp_path)
    for number in (0, count):
        options = dict(run=RUN, overlay=True, workers=number)
        assert predict.predict(Oracle(), NAMES, inputs, tmp_path / str(number), **options) == 1
    found = {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()}
    assert set(found) == {f"{n}{end}" for n in names[::2] for end in (".nii.gz", ".png")} | BESIDE
    found.pop(masks.RECORD)  # has the digests of files that have the time in them
    for name, content in found.items():
        other = tmp_path / str(count) / name
        if name.endswith(".gz"):  # whose header holds the time of writing
            content, other = (gzip.decompress(one) for one in (content, other.read_bytes()))
            assert content == other
        else:
            assert content == other.read_bytes()


def test_one_bad_file_does_not_stop_a_folder(tmp_path, capsys):
    image, _ = volume((0, 1, 2), (False,) * 3, np.random.default_rng(0))
    for name in ("a", "b", "c"):
        nib.save(image, tmp_path / f"{name}.nii.gz")
    whole = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    inputs = predict.find_inputs(tmp_path)
    options = dict(run=RUN)
    assert predict.predict(Oracle(), NAMES, inputs, tmp_path / "out", **options) == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"a.nii.gz", "c.nii.gz", *BESIDE}
    assert "b.nii.gz" in capsys.readouterr().out


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="neither a NIfTI file nor a folder"):
        predict.find_inputs(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no \.nii"):
        predict.find_inputs(tmp_path)
    image, _ = volume((0, 1, 2), (False,) * 3, np.random.default_rng(0))
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="would overwrite its input"):
        inputs = predict.find_inputs(tmp_path)
        predict.predict(Oracle(), NAMES, inputs, tmp_path, run=RUN)
    (tmp_path / "link.nii").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="a broken link"):
        predict.find_inputs(tmp_path / "link.nii")
