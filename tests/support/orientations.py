"""All ways in which an array can be stored: axis orders and directions, and what loses them."""

import itertools

import nibabel as nib
import numpy as np

AXIS_CODES = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]


def stored_as(image: nib.Nifti1Image, codes: str, shift=(0.0, 0.0, 0.0)) -> nib.Nifti1Image:
    """The same volume with its axes in the directions `codes`, its origin moved by `shift` mm."""
    moves = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(moves)
    affine = turned.affine.copy()
    affine[:3, 3] += shift
    return nib.Nifti1Image(np.asarray(turned.dataobj), affine)


def without_forms(array) -> nib.Nifti1Image:
    """An array saved without any orientation: both form codes are 0."""
    image = nib.Nifti1Image(array, None)
    assert image.header["qform_code"] == image.header["sform_code"] == 0
    return image


def as_arrays_are_saved(array) -> nib.Nifti1Image:
    """An array saved with the identity for an affine, and a code that vouches for it."""
    return nib.Nifti1Image(array, np.eye(4))


def as_simpleitk_saves(array) -> nib.Nifti1Image:
    """An array that SimpleITK wrote without copying origin, spacing and direction."""
    return nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]))


LOST = {"no forms": without_forms, "identity": as_arrays_are_saved, "itk": as_simpleitk_saves}
