"""Reads and writes `.pth` and `.safetensors` checkpoints; only writing a `.pth` needs torch."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import read_safetensors
from pgpsam_jax.utils.files import atomic_path, file_digest
from weights_conversion.torch_file import ZIP_MAGIC, TorchFile, read_torch_file


def read_checkpoint(file: Path) -> TorchFile:
    """Reads a checkpoint; its content, not its name, decides the format."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path") from None
    # safetensors: the header's length in eight bytes, then its JSON.
    if head[8:] == b"{" and not head.startswith(ZIP_MAGIC):
        return TorchFile(read_safetensors(file), {})
    return read_torch_file(file)


def report_source(source: Path, log) -> str:
    """Logs path, size and digest of a checkpoint and returns its SHA-256."""
    digest = file_digest(source)
    log(f"source   {source}, {source.stat().st_size / 2**20:.0f} MiB, SHA-256 {digest}")
    return digest


def refuse_overwriting(source: Path, output: Path) -> None:
    if output.exists() and output.samefile(source):
        raise UserError(f"{output} would overwrite the source {source}; choose another --output")


def check_suffix(output: Path) -> None:
    """Raises `UserError` unless `write_checkpoint` can write this format."""
    if output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{output} should end in .pth or .safetensors; change --output")


def write_checkpoint(
    output: Path, tensors: dict[str, np.ndarray], *, overwrite: bool = False
) -> None:
    """Writes tensors by name in the format of the suffix: `.pth` (needs torch) or `.safetensors`.

    overwrite: as in `write_weights`.
    """
    if output.suffix == ".pth":
        _write(output, overwrite, _save_torch, tensors)
    else:  # transformers asks for the metadata
        write_weights(output, tensors, {"format": "pt"}, overwrite=overwrite)


@contextlib.contextmanager
def writing(path: Path):
    """Turns a failure to write `path` into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); choose another --output or make room"
        ) from None


def write_weights(
    file: Path, tensors: dict[str, np.ndarray], metadata=None, *, overwrite: bool = False
) -> str:
    """Writes converted weights to a safetensors file and returns the SHA-256 of the file.

    Raises:
      UserError: the file is there with other content and `overwrite` is not given.
    """
    return _write(file, overwrite, save_file, tensors, metadata=metadata)


def _write(path: Path, overwrite: bool, save: Callable, tensors, **given) -> str:
    with writing(path), atomic_path(path) as temporary:
        save(tensors, temporary, **given)
        digest = file_digest(temporary)
        if path.exists() and not overwrite and file_digest(path) != digest:
            raise UserError(
                f"{path} exists with other content; choose another --output, or replace it "
                "with --overwrite"
            )
        return digest


def _save_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(
            "a .pth file is written by PyTorch, which is not installed; run "
            "pip install '.[convert]' or let --output end in .safetensors"
        ) from None
    # Through an open file, so that the name of the temporary file does not enter the archive.
    with open(path, "wb") as file:
        torch.save(OrderedDict((n, torch.from_numpy(t)) for n, t in tensors.items()), file)
