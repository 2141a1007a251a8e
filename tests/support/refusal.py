"""How tests see that a file is refused as users should be told."""

from pathlib import Path

import pytest

from pgpsam_jax.data.io import volumes
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.errors import UserError


def refuse(read, path, match=None):
    """The one sentence with which a reader refuses a file."""
    with pytest.raises(UserError, match=match) as caught:
        read(Path(path))
    said = str(caught.value)
    assert str(path) in said and said.isprintable() and len(said) < 1000, said
    return said


def image_of(path):
    return volumes.read_image(ArrayFiles((Path(path),), "image"))
