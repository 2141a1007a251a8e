"""Fuzz the `.pth` reader: any bytes give named arrays within the file's own size, or a sentence.

An input that starts as a zip archive is the file; any other is the pickle of an archive with two
storages, so that the search need not find checksums.
"""

import functools
import io
import os
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support.fuzz.program import Target, main

MODULES = ("weights_conversion.torch_file", "weights_conversion.torch_pickle")
GUIDES = ("pickletools", "zipfile")


def tensor(key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), kind="FloatStorage") -> bytes:
    """Opcodes of one tensor as torch writes it."""
    number = functools.partial(lambda value: pickle.dumps(value, 2)[2:-1])
    storage = b"(" + number("storage") + f"ctorch\n{kind}\n".encode() + number(key)
    storage += number("cpu") + number(count) + b"tQ"
    view = number(offset) + number(shape) + number(strides)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view
    return call + b"\x89ccollections\nOrderedDict\n)RtR"


def state(**tensors: bytes) -> bytes:
    """Pickle of a state dict."""
    items = b"".join(pickle.dumps(name, 2)[2:-1] + value for name, value in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def archive(pickled: bytes, method=zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """The bytes of a checkpoint with this pickle and two storages of 24 bytes."""
    file = io.BytesIO()
    records = {"data.pkl": pickled, "data/0": bytes(24), "data/1": bytes(24)} | more
    with zipfile.ZipFile(file, "w") as opened:
        for name, data in records.items():
            opened.writestr(zipfile.ZipInfo(f"a/{name}"), data, method)
    return file.getvalue()


def target() -> Target:
    """Fuzz the .pth reader (see the module)."""
    from pgpsam_jax.errors import UserError
    from weights_conversion.torch_file import ZIP_MAGIC, read_torch_file

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    path = folder / "input.pth"

    def run(data: bytes) -> None:
        content = data if data.startswith(ZIP_MAGIC) else archive(data)
        path.write_bytes(content)
        try:
            found = read_torch_file(path).tensors
            size = sum(array.copy().nbytes for array in found.values())
            assert size <= 2 * len(content) + (1 << 20), f"{size} bytes of {len(content)}"
            assert all(type(name) is str for name in found)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), str(error)
        finally:
            path.unlink()

    both = state(a=tensor(), b=tensor("1", 3, 1, (2,), (1,), "LongStorage"))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x89tR"
    beside = b"\x80\x04}(\x8c\x05epochK\x03\x8c\x05model" + both[2:-1] + b"u."
    seeds = [both, state(a=parameter), beside, state(a=tensor(shape=(), strides=()))]
    small, wide = state(a=tensor()), state(a=tensor(shape=(1 << 19,), strides=(0,)))
    seeds += [archive(small), archive(small, byteorder=b"little"), archive(small, byteorder=b"big")]
    seeds += [archive(small, zipfile.ZIP_DEFLATED), archive(wide), archive(b""), wide]
    seeds += [
        state(a=tensor(shape=(0, 3))),
        archive(small).replace(b"a/", b"b/", 1),
        pickle.dumps({"a": [1, 2.5, None, True, (1, "x")]}, 4),
    ]
    words = [b"ctorch\nHalfStorage\n", b"ccollections\nOrderedDict\n", tensor(), b"K\x01", b"\x8a"]
    words += [bytes([code]) for code in b"}])(tueasbQRq2h0.NXG\x85\x86\x87\x88\x93\x94\x95"]
    return Target(run, seeds, words, longest=4096)


if __name__ == "__main__":
    sys.exit(main(target, "tests.support.fuzz.torch_file", MODULES, GUIDES))
