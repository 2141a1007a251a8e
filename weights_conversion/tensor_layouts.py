"""Row and transform types of name tables.

`{i}` in a name is a block or layer number, the same on both sides; we stack `{m}` on a new first
axis.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """Converts a torch tensor to ours and back, without arithmetic."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(*axes: int) -> Transform:
    return Transform(lambda a: a.transpose(axes), lambda a: a.transpose(np.argsort(axes)))


SAME = Transform(lambda a: a, lambda a: a)
ROW = Transform(lambda a: a[0], lambda a: a[None])  # (1, E) <-> (E,)
DENSE = _permute(1, 0)  # (out, in) <-> (in, out)
CONV = _permute(2, 3, 1, 0)  # (out, in, h, w) <-> (h, w, in, out)
DECONV = _permute(0, 2, 3, 1)  # (in, out, h, w) <-> (in, h, w, out)
POINTWISE = Transform(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])  # 1 x 1 <-> dense
DEPTHWISE = Transform(  # (C, 1, h, w) <-> (h, w, C)
    lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]
)
STRIP_ROW = Transform(lambda a: a[:, 0, 0].T, lambda a: a.T[:, None, None])  # (C, 1, 1, k) <-> k C
STRIP_COLUMN = Transform(  # (C, 1, k, 1) <-> (k, C)
    lambda a: a[:, 0, :, 0].T, lambda a: a.T[:, None, :, None]
)


class Row(NamedTuple):
    """One tensor (or stack of tensors): our path, its name in the checkpoint, both layouts.

    shape: sizes of ours, of one slice where `{m}` stacks. stack: what `{m}` stands for, in order;
    None counts from 0 as far as the checkpoint goes.
    """

    ours: str
    theirs: str
    transform: Transform
    shape: str
    stack: tuple[str, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{m}" in self.theirs


def weight(ours: str, theirs: str, transform: Transform, shape: str) -> Row:
    return Row(ours, f"{theirs}.weight", transform, shape)


def layer(ours: str, theirs: str, transform: Transform, shape: str) -> list[Row]:
    """Returns kernel (norms: scale) and bias; the bias has the last size of the kernel."""
    leaf = "scale" if transform is SAME else "kernel"
    return [
        weight(f"{ours}/{leaf}", theirs, transform, shape),
        Row(f"{ours}/bias", f"{theirs}.bias", SAME, shape.split()[-1]),
    ]


def attention(ours: str, theirs: str, outer: str, inner: str) -> list[Row]:
    """Returns the four projections, from the size `outer` to `inner` and back."""
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), f"{outer} {inner}")
    shapes["out_proj"] = f"{inner} {outer}"
    named = ((f"{ours}/{name}", f"{theirs}.{name}", shape) for name, shape in shapes.items())
    return [row for a, b, shape in named for row in layer(a, b, DENSE, shape)]


class Layout(NamedTuple):
    """The names of one kind of checkpoint: `name` of `family` in messages, and its table.

    duplicates: ignored names of copies, with the name of the tensor that each must equal.
    unused: regular expression of names that have no part in the model; they are dropped.
    """

    name: str
    family: str
    rows: tuple[Row, ...]
    duplicates: Mapping[str, str] = {}
    unused: str = ""
