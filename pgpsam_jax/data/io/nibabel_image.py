"""An image that is already open in nibabel, read like the file it would be saved as."""

import io
from pathlib import Path

import nibabel as nib
import numpy as np

from pgpsam_jax.data.io.nifti import Volume, decode
from pgpsam_jax.data.io.nifti_header import parse_header
from pgpsam_jax.data.io.volume_streams import told
from pgpsam_jax.data.io.voxel_grid import to_display


def from_nibabel(image: nib.Nifti1Image) -> Volume:
    """The same `Volume` that `read_image` gives for the image's file, and the same refusals.

    The image's affine counts where it was changed after reading, as it does when nibabel saves.
    """
    path = Path(image.get_filename() or "the nibabel image")
    # A copy: nibabel brings a header up to date with affine and shape when it makes an image.
    header = type(image)(image.dataobj, image.affine, image.header).header
    header.set_data_dtype(image.dataobj.dtype)
    header.set_slope_inter(1, 0)  # `dataobj` gives scaled values already
    header["vox_offset"] = header.single_vox_offset
    source = parse_header(io.BytesIO(header.binaryblock), path)
    with told(path):
        voxels = np.asanyarray(image.dataobj).reshape(source.shape[:3])
    array = np.ascontiguousarray(to_display(decode(voxels, source, np.float32), source))
    return Volume(array, source.spacing, source)
