"""Whatever the program writes has the mode that the user's umask gives; runs: `test_train`."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from pgpsam_jax import predict, verify
from pgpsam_jax.data.io.volume_files import find_inputs
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.utils.files import atomic_folder, atomic_path, write_text
from tests.support.file_modes import modes, umask
from tests.support.small_run import write_data
from weights_conversion.checkpoint_files import write_checkpoint, write_weights


@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077], ids=oct)
def test_files_and_folders(tmp_path, mask):
    arrays = {"a": np.zeros(3, np.float32)}
    with umask(mask):
        write_text(tmp_path / "new" / "a.txt", "text")
        with atomic_path(tmp_path / "b.safetensors") as temporary:
            save_file(arrays, temporary)  # which replaces the file by one of its own
        write_weights(tmp_path / "c.safetensors", arrays)
        write_checkpoint(tmp_path / "d.safetensors", arrays)
        with atomic_folder(tmp_path / "e") as folder:
            write_text(folder / "a.txt", "text")
    assert modes(tmp_path) == {"files": {0o666 & ~mask}, "folders": {0o777 & ~mask}}


def test_masks_and_reports(tmp_path):
    def nothing(volume):
        return np.zeros(volume.array.shape, np.uint8)

    nothing.preprocessing = Preprocessing(32, (0.0, 1.0))
    with umask(0o027):
        root = write_data(tmp_path / "data", ("a",))
        arguments = ["--data", str(root), "--image-glob", "images/*.nii.gz"]
        verify.main([*arguments, "--report", str(tmp_path / "reports" / "found.json")])
        inputs, options = (
            find_inputs(root / "images"),
            dict(run={"workdir": "x", "parameters": "0"}, overlay=True),
        )
        predict.predict(nothing, ["background"], inputs, tmp_path / "masks", **options)
    assert modes(tmp_path) == {"files": {0o640}, "folders": {0o750}}
