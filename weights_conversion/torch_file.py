"""Reads a torch `.pth` file without torch and without running its content.

A `.pth` (torch >= 1.6) is a zip archive: `*/data.pkl`, a pickle that describes the tensors (see
`torch_pickle`), and one raw record per storage, `*/data/<key>`. Records are mapped, not copied.
"""

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import sanitize
from weights_conversion.torch_pickle import Tensor, interpret

ZIP_MAGIC = b"PK\x03\x04"
_MAX_PICKLE = 16 << 20  # bytes; that of vit_h is 0.1 MiB
_SLACK = 1 << 20  # bytes


class TorchFile(NamedTuple):
    """Tensors by name, as read-only views of the memory-mapped file.

    beside: numbers and strings of the dict around the state dict, such as the epoch.
    """

    tensors: dict[str, np.ndarray]
    beside: dict


def read_torch_file(path) -> TorchFile:
    """Reads the state dict of a `.pth` file, at the top or under `state_dict` or `model`.

    Raises:
      UserError: another format, a damaged file, or a pickle that asks for more than tensors.
    """
    path = Path(path)
    try:
        _check_format(path)
        return _read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged or incomplete ({sanitize(str(error), 200)}); download or copy it "
            "again"
        ) from None


def _read(path: Path) -> TorchFile:
    records = _Records(path)
    pickled = records.read("data.pkl")
    if pickled.size > _MAX_PICKLE:
        raise UserError(
            f"{path} needs {pickled.size} bytes to describe its tensors, more than the "
            f"{_MAX_PICKLE} allowed; save only the model's state dict"
        )
    tensors, beside = _state_dict(path, interpret(path, pickled.tobytes()))
    # Strides of zero can blow up a small file: allow no more than shared weights explain.
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    if total > 2 * records.size + _SLACK:
        raise UserError(
            f"{path} of {records.size} bytes would unpack to {total}, which no ordinary checkpoint "
            "does; use a source that you trust"
        )
    return TorchFile({name: _array(records, name, t) for name, t in tensors.items()}, beside)


def _check_format(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(ZIP_MAGIC):
        return
    if head.startswith(b"\x80"):
        raise UserError(
            f"{path} is a bare pickle (torch's format before 1.6), which is not read because it "
            "could run code; load it in torch with weights_only=True and torch.save it again"
        )
    raise UserError(
        f"{path} is not a torch checkpoint (it starts with {head!r}); download it again"
    )


class _Records:
    """Records of the archive as slices of one read-only memory map."""

    def __init__(self, path: Path):
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        self.path = path
        self.bytes = np.memmap(path, np.uint8, mode="r")
        self.size = self.bytes.size
        name = next((i.filename for i in infos if i.filename.endswith("/data.pkl")), None)
        if name is None:
            raise UserError(f"{path} is a zip file but not a torch checkpoint; check the path")
        self.infos = {i.filename.removeprefix(name.removesuffix("data.pkl")): i for i in infos}
        if "byteorder" in self.infos and self.read("byteorder").tobytes() != b"little":
            raise UserError(f"{path} is big-endian; save it again on a little-endian machine")

    def read(self, name: str) -> np.ndarray:
        """Returns the bytes of a record: uncompressed, in bounds, with the recorded CRC-32."""
        info, name = self.infos.get(name), sanitize(name)
        if info is None:
            raise zipfile.BadZipFile(f"record {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(
                f"{self.path} holds the compressed or encrypted record {name}, which torch never "
                "writes; download the checkpoint from its publisher"
            )
        header = self.bytes[info.header_offset :][:30].tobytes()
        if len(header) < 30 or not header.startswith(ZIP_MAGIC):
            raise zipfile.BadZipFile(f"record {name} has no header")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        data = self.bytes[start : start + info.file_size]
        if data.size != info.file_size:
            raise zipfile.BadZipFile(f"record {name} is cut off")
        # torch records 0 when checksums are off.
        if info.CRC and zlib.crc32(data.data) != info.CRC:
            raise zipfile.BadZipFile(f"record {name} has a wrong checksum")
        return data


def _state_dict(path: Path, value) -> tuple[dict[str, Tensor], dict]:
    """Returns the state dict, and the numbers and strings beside it."""
    beside = {}
    for key in ("state_dict", "model"):
        if type(value) is dict and type(value.get(key)) is dict:
            beside = {k: v for k, v in value.items() if type(v) in (bool, int, float, str)}
            value = value[key]
            break
    if type(value) is not dict or not value:
        raise UserError(f"{path} holds no state dict; save it as torch.save(model.state_dict(), …)")
    wrong = [str(k) for k, v in value.items() if type(k) is not str or type(v) is not Tensor]
    if wrong:
        raise UserError(
            f"{path} holds {len(wrong)} entries that are not named tensors "
            f"({', '.join(sanitize(name) for name in wrong[:10])}); save only the model's state "
            "dict"
        )
    return value, beside


def _array(records: _Records, name: str, tensor: Tensor) -> np.ndarray:
    dtype, key, count = tensor.storage
    data = records.read(f"data/{key}")
    if data.size != count * dtype.itemsize:
        raise zipfile.BadZipFile(
            f"{sanitize(name)} needs {count * dtype.itemsize} bytes, its record has {data.size}"
        )
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    strides = [s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.strides, strict=True)]
    last = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    if tensor.offset + last >= count:
        raise zipfile.BadZipFile(f"{sanitize(name)} reaches beyond its record")
    return np.lib.stride_tricks.as_strided(
        data.view(dtype)[tensor.offset :],
        tensor.shape,
        [s * dtype.itemsize for s in strides],
        writeable=False,
    )
