"""Write phantom_anatomy.json anew: where the organs of the 30 phantoms lie, as `describe` has it.

python -m tests.reference.golden.make_phantom_anatomy
"""

from pathlib import Path

import nibabel as nib
import numpy as np

from pgpsam_jax.data.io.nifti import from_nibabel
from pgpsam_jax.data.layouts.label_table import SYNAPSE8
from pgpsam_jax.data.phantom import generate
from pgpsam_jax.data.quality.organ_priors import describe
from pgpsam_jax.utils.files import write_text

FILE = Path(__file__).with_name("phantom_anatomy.json")


def features_of(image, ids, spacing) -> dict:
    """Features of the BTCV ids, of the eight classes, and of these without a grid."""
    eight = SYNAPSE8.remap(ids, "phantom").astype(np.int32)
    window = np.clip((image + 125) / 400, 0, 1)
    return {
        "btcv": describe(image, ids, spacing),
        "eight": describe(image, eight, spacing),
        "no_grid": describe(window, eight, (1.0, 1.0, 1.0), has_grid=False),
    }


def of_phantom(case: int) -> dict:
    """The features of one phantom of seed 0."""
    image, label, affine = generate.make_case(0, case)
    volume, ids = (from_nibabel(nib.Nifti1Image(a, affine)) for a in (image, label))
    return features_of(volume.array, ids.array.astype(np.int32), volume.spacing)


if __name__ == "__main__":
    import json

    lines = [f'"{case}": {json.dumps(of_phantom(case))}' for case in generate.CASES]
    write_text(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
