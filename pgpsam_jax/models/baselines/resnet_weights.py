"""The ResNet-18 that SAM-LST starts from, as `weights_conversion.convert` writes it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import read_safetensors
from pgpsam_jax.utils.files import file_digest

FORMAT = "pgpsam_jax ResNet-18 weights"
OFFICIAL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
HOW_TO_GET = (
    f"download {OFFICIAL}, then run: pgpsam convert --kind resnet18 "
    f"--source {OFFICIAL.rsplit('/')[-1]} --output weights/resnet18"
)


def cnn_file(path) -> Path:
    """The file of converted weights, from its stem or name."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".safetensors") + ".safetensors")


def load_cnn(path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A tensor for every path of a CNN, `shapes`; `UserError` if the file is not just that."""
    file = cnn_file(path)
    if not file.is_file():
        raise UserError(f"{file} (model.cnn_base) does not exist; {HOW_TO_GET}")
    tensors = read_safetensors(file)
    if _metadata(file).get("format") != FORMAT:
        raise UserError(f"{file} (model.cnn_base) holds no converted ResNet-18; {HOW_TO_GET}")
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != dict(shapes):
        name = next(n for n in sorted({**found, **shapes}) if found.get(n) != shapes.get(n))
        raise UserError(
            f"{file} (model.cnn_base) does not fit the CNN beside this encoder (it has "
            f"{found.get(name, 'no')} {name}, which should be {shapes.get(name, 'absent')}); use a "
            "SAM encoder with a decoder of width 256, or leave model.cnn_base empty"
        )
    return tensors


def digests(path) -> dict[str, str]:
    """The SHA-256 of the file of `config.model.cnn_base` for provenance; {} where none is given."""
    return {"cnn_base": file_digest(cnn_file(path))} if path else {}


def _metadata(file: Path) -> dict:
    try:
        with safe_open(file, "numpy") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); convert it again") from None
