"""The `.pth` reader gives what torch gives, and nothing but tensors gets through it."""

import os
import pickle
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.errors import UserError
from tests.support.optional import torch
from weights_conversion.torch_file import read_torch_file

DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


def raw(array) -> tuple:
    """Type name, shape and bytes of a torch tensor or numpy array."""
    if isinstance(array, torch.Tensor):
        bits = array.detach().contiguous().flatten().view(torch.uint8).numpy()
        return str(array.dtype).removeprefix("torch."), tuple(array.shape), bits.tobytes()
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    assert {n: raw(a) for n, a in found.items()} == {n: raw(t) for n, t in expected.items()}


def number(value) -> bytes:
    """Opcodes that push one Python value."""
    return pickle.dumps(value, 2)[2:-1]


TENSOR_CALL = b"ctorch._utils\n_rebuild_tensor_v2\n"


def state_pickle(*, count=6, offset=0, shape=(2, 3), strides=(3, 1), kind=b"FloatStorage", key="0"):
    """Pickle of {"w": tensor} as torch writes it, with numbers of the caller's choosing."""
    storage = b"(" + number("storage") + b"ctorch\n" + kind + b"\n" + number(key)
    storage += number("cpu") + number(count) + b"tQ"
    arguments = b"(" + storage + number(offset) + number(shape) + number(strides)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}" + number("w") + TENSOR_CALL + arguments + b"Rs."


def write_archive(path, pickled: bytes, data: bytes = bytes(24), method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return path


@st.composite
def state_dicts(draw) -> dict:
    """A few tensors, also transposed, sliced, expanded, empty, scalar and sharing storage."""
    result = {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        values = 50 * torch.randn(shape, generator=torch.manual_seed(index))
        tensor = values.to(getattr(torch, draw(st.sampled_from(DTYPES))))
        view = draw(st.sampled_from(("plain", "transpose", "slice", "expand")))
        if view == "transpose":
            tensor = tensor.permute(tuple(reversed(range(tensor.ndim))))
        elif view == "slice" and tensor.ndim:
            tensor = tensor[1:]
        elif view == "expand":
            tensor = tensor.expand(3, *tensor.shape)
        result[f"t{index}"] = tensor
        if draw(st.booleans()):
            result[f"t{index}.alias"] = tensor
    return result


@settings(max_examples=60, deadline=None)
@given(state_dicts(), st.sampled_from((2, 4)))
def test_equals_what_was_saved(tmp_path_factory, state, protocol):
    path = tmp_path_factory.mktemp("t") / "s.pth"
    torch.save(state, path, pickle_protocol=protocol)
    assert_same(read_torch_file(path).tensors, state)


def test_module_state_dict_and_parameters(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 3, 2))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    assert_same(read_torch_file(tmp_path / "a.pth").tensors, module.state_dict())
    torch.save(dict(module.named_parameters()), tmp_path / "b.pth")
    assert_same(read_torch_file(tmp_path / "b.pth").tensors, dict(module.named_parameters()))


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_training_checkpoint_is_opened_one_level(tmp_path, key):
    state = {"w": torch.arange(3.0)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    beside = {"epoch": 3, "lr": 0.1, "name": "x"}
    torch.save({**beside, key: state, "optimizer": optimizer}, tmp_path / "a.pth")
    found = read_torch_file(tmp_path / "a.pth")
    assert_same(found.tensors, state)
    assert found.beside == beside


def test_file_without_checksums(tmp_path):
    state = {"w": torch.arange(3.0)}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_torch_file(tmp_path / "a.pth").tensors, state)


def test_hand_made_archive_is_read(tmp_path):
    """The helper of the tests below makes a file that is accepted as long as it tells the truth."""
    data = np.arange(6, dtype=np.float32)
    path = write_archive(tmp_path / "a.pth", state_pickle(), data.tobytes())
    np.testing.assert_array_equal(read_torch_file(path).tensors["w"], data.reshape(2, 3))


class Payload:
    """Makes a folder when unpickled by a reader that runs what it is told to."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_payload_does_not_run(tmp_path):
    target = tmp_path / "made"
    torch.save({"w": torch.ones(2), "x": Payload(target)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth asks for (posix|nt)\.mkdir"):
        read_torch_file(tmp_path / "a.pth")
    assert not target.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert target.exists(), "the payload is real: torch's unsafe loader ran it"


ORDERED_DICT = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\n" + number("true") + b"\x85R.",
        b"\x80\x04" + number("os") + number("system") + b"\x93.",  # STACK_GLOBAL
        b"\x80\x04" + number(("os",)) + number(("system",)) + b"\x93.",
        b"\x80\x02cweights_conversion.torch_pickle\ninterpret\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02" + ORDERED_DICT + b"]]\x86R.",  # arguments
        b"\x80\x02" + ORDERED_DICT + b"]R.",
        b"\x80\x02" + ORDERED_DICT + b")\x81.",  # NEWOBJ
        b"\x80\x02" + ORDERED_DICT + b"}" + number("a") + b"K\x01sb.",  # attribute of the class
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02" + TENSOR_CALL + b")R.",
        b"\x80\x02" + number("os.system") + b")R.",  # call of a string
        b"\x80\x02}" + number((1,)) + b"K\x01s.",  # key that is neither name nor number
        b"\x80\x02]" + number("a") + b"K\x01s.",  # item of a list
        b"\x80\x02}K\x01a.",  # append to a dict
        b"\x80\x02)Q.",  # storage without content
        b"\x80\x02h\x07.",  # memo entry never set
        b"\x80\x02r\xff\xff\xff\xff.",  # huge memo index on an empty stack
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02}",
        b"",
        b"\xff\xff",
    ],
)
def test_strange_pickles_are_refused(tmp_path, pickled):
    path = write_archive(tmp_path / "a.pth", pickled)
    with pytest.raises(UserError, match=r"a\.pth "):
        read_torch_file(path)


def test_small_pickle_cannot_take_memory_or_time(tmp_path):
    """A memo index of 2^32 - 1 and 2^60 nested references: CPython's reader would go down."""
    nested = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60
    for tail in (b"r\xff\xff\xff\xff.", b"h\x00h\x00\x93.", b")R.", b"Q.", b"}h\x00K\x01s."):
        start = time.monotonic()
        with pytest.raises(UserError):
            read_torch_file(write_archive(tmp_path / "a.pth", nested + tail))
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "lie",
    [
        {"count": 7},
        {"count": 5},
        {"count": -6},
        {"count": 1 << 62},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 70},
        {"shape": (3, 3)},
        {"shape": (2, -3)},
        {"shape": (2, 3.0)},
        {"shape": (2,)},
        {"shape": "23"},
        {"shape": (0, 1 << 40, 1 << 40), "strides": (1, 1, 1)},
        {"shape": (1,) * 9, "strides": (1,) * 9},
        {"strides": (3, 2)},
        {"strides": (-3, 1)},
        {"strides": (3, 1 << 62)},
        {"shape": (1 << 40,), "strides": (0,)},  # 4 TiB from 24 bytes
        {"kind": b"DoubleStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": 0},
    ],
)
def test_lies_about_sizes_are_refused(tmp_path, lie):
    path = write_archive(tmp_path / "a.pth", state_pickle(**lie))
    with pytest.raises(UserError, match=r"a\.pth "):
        read_torch_file(path)


def test_compressed_archive_is_refused(tmp_path):
    data = bytes(1 << 20)
    path = write_archive(tmp_path / "a.pth", state_pickle(), data, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(path)


def test_huge_description_is_refused(tmp_path):
    path = write_archive(tmp_path / "a.pth", bytes(17 << 20))
    with pytest.raises(UserError, match="to describe its tensors"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: torch.ones(3), "holds no state dict"),
        (dict, "holds no state dict"),
        (lambda: [torch.ones(3)], "holds no state dict"),
        (lambda: {"w": torch.ones(3), "lr": 0.1, 7: torch.ones(1)}, r"2 entries .* \(lr, 7\)"),
        (lambda: {"w": np.float32(1)}, "asks for numpy"),
        (lambda: {"w": torch.ones(2).to_sparse()}, r"asks for torch\._utils\._rebuild_sparse"),
        (
            lambda: {"w": torch.ones(2, dtype=torch.complex64)},
            r"asks for torch\.ComplexFloatStorage",
        ),
    ],
)
def test_other_content_is_explained(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        read_torch_file(tmp_path / "a.pth")


def test_conjugate_flag_is_refused(tmp_path):
    """torch passes such flags as a seventh argument; ignoring one would change the values."""
    pickled = state_pickle().replace(b"Rt", b"R}" + number("neg") + b"\x88st")
    with pytest.raises(UserError, match="_rebuild_tensor_v2"):
        read_torch_file(write_archive(tmp_path / "a.pth", pickled))


def test_other_formats_are_explained(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="bare pickle"):
        read_torch_file(path)
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(UserError, match=r"not a torch checkpoint .*DOCTYPE"):
        read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a torch checkpoint"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.txt", "hello")
    with pytest.raises(UserError, match="zip file but not a torch checkpoint"):
        read_torch_file(path)
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_torch_file(missing)


def test_big_endian_file_is_refused(tmp_path):
    path = write_archive(tmp_path / "a.pth", state_pickle())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    state = {"a.weight": torch.randn(5, 4, generator=torch.manual_seed(0)), "b": torch.ones(3)}
    path = tmp_path_factory.mktemp("saved") / "s.pth"
    torch.save(state, path)
    return state, path.read_bytes(), path


@settings(max_examples=150, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(saved, fraction):
    _, content, path = saved
    cut = path.with_name("cut.pth")
    cut.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=r"cut\.pth"):
        read_torch_file(cut)


@settings(max_examples=500, deadline=None)
@given(position=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_damaged_byte_is_refused_or_harmless(saved, position, mask):
    state, content, path = saved
    damaged = bytearray(content)
    damaged[position % len(content)] ^= mask
    other = path.with_name("damaged.pth")
    other.write_bytes(damaged)
    try:
        found = read_torch_file(other).tensors
    except UserError:
        return
    assert_same(found, state)
