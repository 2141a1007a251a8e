"""The fuzz targets (`tests/support/fuzz`) pass on their seeds, and on what fuzzing has found."""

import pytest

from pgpsam_jax.data.io import volumes
from pgpsam_jax.data.io.volumes import read_image
from tests.support.fuzz import nifti as nifti_target
from tests.support.fuzz import torch_file as torch_target
from tests.support.fuzz.nifti import file_of
from tests.support.refusal import refuse
from weights_conversion import torch_file


@pytest.mark.parametrize("module", [nifti_target, torch_target])
def test_the_targets_of_fuzzing_hold_for_their_seeds(module):
    target = module.target()
    for data in target.seeds:
        target.run(data)
        target.run(data[:-1])


def test_a_reader_that_breaks_its_promise_is_noticed(monkeypatch):
    def broken(path):
        raise ValueError("a traceback")

    monkeypatch.setattr(volumes, "read_label", broken)
    monkeypatch.setattr(torch_file, "read_torch_file", broken)
    for module in (nifti_target, torch_target):
        with pytest.raises(ValueError, match="a traceback"):
            module.target().run(b"x")


def test_what_fuzzing_found(tmp_path):
    """Voxel sizes whose squares vanish in double precision: nibabel found no axis and raised."""
    size = (1, 1e-312, 1e28, 1e28, 1, 1, 1, 1)
    data = file_of("u1", kind=2, sform_code=0, qform_code=0, pixdim=size)
    (tmp_path / "a.nii").write_bytes(data)
    refuse(read_image, tmp_path / "a.nii", "which is impossible|singular")
