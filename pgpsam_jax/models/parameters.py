"""The filter of trainable parameters, and counts of what it selects.

The filter splits the model, hence decides gradients, optimizer state and checkpoint: a leaf outside
it is never differentiated, updated, decayed or saved.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

from flax import nnx

from pgpsam_jax.errors import UserError

ENCODER = "image_encoder"
State = nnx.State[Any, Any]
_Model = TypeVar("_Model", bound=nnx.Module)

# Which parameters of the image encoder are trainable; all others are, unless a method freezes them.
ENCODER_MODES: dict[str, nnx.filterlib.Filter] = {
    "lora": nnx.LoRAParam,
    "full": nnx.Param,
    "frozen": nnx.Nothing(),
}


def trainable(encoder_mode: str, frozen: tuple[str, ...] = ()) -> nnx.filterlib.Filter:
    """Returns the NNX filter of the trainable leaves.

    Running averages of batch statistics have no gradient, but change and are saved with them.

    Args:
      encoder_mode: `lora`, `full` or `frozen`.
      frozen: path prefixes outside the encoder that a method does not train.
    """
    if encoder_mode not in ENCODER_MODES:
        raise UserError(
            f"model.train_encoder is {encoder_mode!r}; choose one of {', '.join(ENCODER_MODES)}"
        )
    in_encoder = nnx.PathContains(ENCODER)

    def kept(path: tuple[Any, ...], value: object) -> bool:
        return under("/".join(map(str, path)), frozen)

    return nnx.Any(
        nnx.All(nnx.Param, nnx.Not(in_encoder), nnx.Not(kept)),
        nnx.All(ENCODER_MODES[encoder_mode], in_encoder),
        nnx.BatchStat,
    )


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Whether a path is one of `prefixes` or below it."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def flat_paths(state: State) -> dict[str, Any]:
    """An NNX state as a dict from 'a/b/0/c' to its variable."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def is_average(leaf: object) -> bool:
    """Whether a leaf is a running average, which no gradient moves."""
    return isinstance(leaf, nnx.BatchStat)


def count(state: State) -> int:
    """Returns the number of scalars in a state, without running averages."""
    return sum(math.prod(leaf.shape) for leaf in flat_paths(state).values() if not is_average(leaf))


def report(params: State, frozen: State) -> str:
    """Returns a table of trained and frozen parameter counts per top-level module."""
    rows: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for column, state in enumerate((params, frozen)):
        for path, leaf in flat_paths(state).items():
            rows[path.split("/")[0]][column or is_average(leaf)] += math.prod(leaf.shape)
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    width = max(map(len, rows))
    lines = [f"{'parameters':<{width}} {'trained':>13} {'frozen':>13}"]
    lines += [f"{name:<{width}} {a:>13,} {b:>13,}" for name, (a, b) in rows.items()]
    return "\n".join(lines)


def split_model(
    model: _Model, encoder_mode: str, frozen: tuple[str, ...] = ()
) -> tuple[nnx.GraphDef[_Model], State, State]:
    """Splits a model into (graphdef, trainable parameters, frozen parameters)."""
    graphdef, params, *rest = nnx.split(model, trainable(encoder_mode, frozen), ...)
    return graphdef, params, rest[0]
