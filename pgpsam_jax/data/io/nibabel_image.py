"""Volumes from nibabel images in memory."""

import io
from pathlib import Path

import nibabel as nib
import numpy as np

from pgpsam_jax.data.io.nifti import Volume, decode
from pgpsam_jax.data.io.nifti_header import parse_header
from pgpsam_jax.data.io.volume_streams import reading_errors
from pgpsam_jax.data.io.voxel_grid import to_display


def from_nibabel(image: nib.Nifti1Image) -> Volume:
    """Returns the `Volume` that `read_image` reads from the image's file, with the same checks.

    An affine that was changed after loading counts, as it does when nibabel saves the image.
    """
    path = Path(image.get_filename() or "the nibabel image")
    # A new image, because nibabel then updates the header to match affine and shape.
    header = type(image)(image.dataobj, image.affine, image.header).header
    header.set_data_dtype(image.dataobj.dtype)
    header.set_slope_inter(1, 0)  # `dataobj` gives scaled values already
    header["vox_offset"] = header.single_vox_offset
    source = parse_header(io.BytesIO(header.binaryblock), path)
    with reading_errors(path):
        voxels = np.asanyarray(image.dataobj).reshape(source.shape[:3])
    array = np.ascontiguousarray(to_display(decode(voxels, source, np.float32), source))
    return Volume(array, source.spacing, source)
