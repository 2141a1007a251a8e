"""Interprets the pickle inside a `.pth` file without running it.

`pickle` is never called. The interpreter supports dicts, lists, tuples, numbers, strings and the
three calls of `_CALLS`; it refuses every other name before anything happens, and allocates no more
than a few times the size of the pickle.
"""

import math
import pickletools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import sanitize

_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_CALLS = (_ORDERED_DICT, _TENSOR, _PARAMETER)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_LIMIT = 1 << 48  # elements; no tensor in memory has more


class Storage(NamedTuple):
    """A block of `size` elements, kept in the archive's record `data/<key>`."""

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides in elements, all numbers in [0, 2^48)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    name: str


def interpret(path, data: bytes):
    """Returns the value of a pickle, with a `Tensor` for every tensor.

    Raises:
      UserError: names the file `path` if its pickle `data` is not plain data, and the global that
        tensors do not need.
    """
    try:
        return _run(path, data)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no well-formed state dict ({sanitize(str(error))}); save it again with "
            "torch.save"
        ) from None


def _run(path, data: bytes):
    stack: list = []
    marks: list[int] = []
    memo: dict = {}

    def pop_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> list:
        if count > len(stack):
            raise IndexError("pickle stack is empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[opcode.name])
            case name if name in _LITERALS:
                stack.append(argument)
            case "GLOBAL":
                stack.append(_global(path, *str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(path, *pop(2)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "APPEND":
                _extend(stack[-2], pop(1))
            case "APPENDS":
                items = pop_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                _update(stack[-3], pop(2))
            case "SETITEMS":
                items = pop_mark()
                _update(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":  # attributes of an OrderedDict: torch's `_metadata`, not needed
                pop(1)
            case name:
                raise ValueError(f"pickle opcode {name} is not allowed")
    raise ValueError("the pickle has no end")


def _global(path, module, name) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise TypeError("global without a name")
    full = f"{module}.{name}"
    if full not in _CALLS and full not in _DTYPES:
        raise UserError(
            f"{path} asks for {sanitize(full)}, which plain tensors do not need and could run "
            "code, so nothing was read; use another source, or save only the model's state dict"
        )
    return _Global(full)


def _extend(target, items) -> None:
    if type(target) is not list:
        raise TypeError("append to something that is not a list")
    target.extend(items)


def _update(target, items) -> None:
    keys, values = items[0::2], items[1::2]
    if type(target) is not dict or not all(type(key) in (str, int) for key in keys):
        raise TypeError("only dicts with names or numbers as keys are allowed")
    target.update(zip(keys, values, strict=True))


def _storage(identifier) -> Storage:
    kind, storage_type, key, _, count = identifier
    if kind != "storage" or type(storage_type) is not _Global or type(key) is not str:
        raise ValueError("malformed storage")
    if storage_type.name not in _DTYPES or not _is_size(count):
        raise ValueError("malformed storage")
    return Storage(_DTYPES[storage_type.name], key, count)


def _call(function, arguments):
    name = function.name if type(function) is _Global else type(function).__name__
    if type(arguments) is not tuple:
        raise TypeError("call without a tuple of arguments")
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _PARAMETER and arguments and type(arguments[0]) is Tensor:
        return arguments[0]
    if name == _TENSOR and len(arguments) >= 6 and not any(arguments[6:]):
        return _tensor(*arguments[:4])
    raise ValueError(f"a call of {name} with these arguments is not allowed")


def _tensor(storage, offset, shape, strides) -> Tensor:
    if type(storage) is not Storage or not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("malformed tensor")
    # A zero in the shape must not hide a product that no array library accepts.
    if len(shape) != len(strides) or len(shape) > 8 or math.prod(n or 1 for n in shape) >= _LIMIT:
        raise ValueError("tensor of a malformed shape")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < _LIMIT
