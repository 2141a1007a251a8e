"""Converts torchvision's ResNet-18 to the CNN beside SAM's encoder (SAM-LST).

Only the layers before the fourth group of blocks are used.
"""

import functools
import itertools
import re
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.baselines.resnet_weights import FORMAT, HOW_TO_GET, cnn_file
from weights_conversion.checkpoint_files import (
    read_checkpoint,
    refuse_overwriting,
    report_source,
    write_weights,
)
from weights_conversion.remap import read
from weights_conversion.tensor_layouts import CONV, SAME, Layout, Row

_UNUSED = r"(layer4\.|fc\.).*|.*\.num_batches_tracked"
_PUBLISHED = re.compile(r"resnet18-([0-9a-f]{8})\.pth")  # the digits begin the file's SHA-256


def _convolution(ours: str, norm: str, theirs: str, their_norm: str, shape: str) -> list[Row]:
    leaves = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", CONV, shape),
        *(
            Row(f"{norm}/{leaf}", f"{their_norm}.{name}", SAME, shape.split()[-1])
            for leaf, name in leaves.items()
        ),
    ]


def _rows() -> list[Row]:
    rows = _convolution("conv1", "norm1", "conv1", "bn1", "7 7 3 C")
    sizes = ("C", "C", "2C", "4C")
    for group, (dim, out) in enumerate(itertools.pairwise(sizes)):
        for block in range(2):
            ours, theirs = f"groups/{group}/{block}", f"layer{group + 1}.{block}"
            for n, inputs in ((1, out if block else dim), (2, out)):
                shape = f"3 3 {inputs} {out}"
                names = f"{ours}/conv{n}", f"{ours}/norm{n}", f"{theirs}.conv{n}", f"{theirs}.bn{n}"
                rows += _convolution(*names, shape)
            if dim != out and not block:
                names = (f"{ours}/shortcut", f"{ours}/shortcut_norm")
                theirs = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
                rows += _convolution(*names, *theirs, f"1 1 {dim} {out}")
    return rows


TORCHVISION = Layout("torchvision", "ResNet-18", tuple(_rows()), unused=_UNUSED)
# Our float32 tensors, without counters and unused layers.
from_torchvision = functools.partial(read, TORCHVISION)


def convert(source, output, *, overwrite: bool = False, log=print) -> None:
    """Writes `<output>.safetensors`, for `config.model.cnn_base`, from a checkpoint file."""
    source, output = Path(source), cnn_file(output)
    if not source.is_file():
        raise UserError(f"{source} does not exist; {HOW_TO_GET}")
    refuse_overwriting(source, output)
    digest = report_source(source, log)
    published = _PUBLISHED.fullmatch(source.name)
    if published and not digest.startswith(published[1]):
        raise UserError(
            f"{source} has SHA-256 {digest[:8]}... instead of {published[1]}...: the download is "
            "damaged or it is another file; download it again, or rename it if you mean this file"
        )
    tensors = read_checkpoint(source).tensors
    ours = from_torchvision(tensors, str(source))
    metadata = {"format": FORMAT, "source_sha256": digest}
    write_weights(output, ours, metadata, overwrite=overwrite)
    log(f"wrote    {output}, {len(ours)} of {len(tensors)} tensors")
