"""Multi-process utilities: barriers, gathers, consistency checks, global arrays.

Every function also works in a single-process run, at no cost. Process 0 is the *first*: it writes
the files of a run, in a folder that all processes share, and prints. A process's number determines
its share of the work, never what the run computes.
"""

import contextlib
import json
import os
import pickle
import secrets
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import jax_internals
from pgpsam_jax.utils.files import StrPath

_T = TypeVar("_T")

SHARED_SECONDS = 60  # to see a file of another machine; network folders cache names
WORK_MS = 24 * 3600 * 1000  # limit of waits for the work of another process
_used: Counter[str] = Counter()  # uses of each name: barriers and keys need unique ones


def is_multiprocess() -> bool:
    """Returns whether the run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_first():
        print(text, flush=True)


def shard_for_process(items: Iterable[_T]) -> list[_T]:
    """Returns this process's share of some work: every n-th item of n processes."""
    return list(items)[jax.process_index() :: jax.process_count()]


def barrier(name: str) -> None:
    """Waits until all processes have arrived."""
    if is_multiprocess():
        _used[name] += 1
        jax_internals.client().wait_at_barrier(f"pgpsam/{name}/{_used[name]}", WORK_MS)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Runs the block in the first process, then in the others.

    They find what it wrote; if folders are not shared, each process writes its own.
    """
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def gather(value: _T) -> list[_T]:
    """Returns the `value` of every process, in order, on every process."""
    if not is_multiprocess():
        return [value]
    from jax.experimental import multihost_utils

    barrier("gather")  # waits without limit, unlike some collectives
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    everyone = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return [pickle.loads(part[:n].tobytes()) for part, n in zip(everyone, sizes, strict=True)]


def agree(values: dict[str, Any]) -> None:
    """Checks that `values` (name to JSON value) equal those of the first process.

    Raises:
      UserError: in a process whose values differ.
    """
    client, process = jax_internals.client(), jax_internals.process_id()
    if client is None:
        return
    key, text = f"pgpsam/agreed/{_used['agreed']}", json.dumps([socket.gethostname(), values])
    _used["agreed"] += 1
    if process == 0:
        client.key_value_set(key, text)
    else:
        there, first = json.loads(client.blocking_key_value_get(key, WORK_MS))
        here, ours = json.loads(text)
        if ours != first:
            name, ours, first = _difference(ours, first)
            raise UserError(
                f"process {process} on {here} and process 0 on {there} differ in {name}: {ours} "
                f"here, {first} there; give all processes the same"
            )


def _difference(ours: Any, first: Any) -> tuple[str, Any, Any]:
    """Returns (name, ours, theirs) of a field in which two dictionaries differ."""
    path = []
    while isinstance(ours, dict) and isinstance(first, dict):
        path.append(next(k for k in ours | first if ours.get(k) != first.get(k)))
        ours, first = ours.get(path[-1]), first.get(path[-1])
    return ".".join(path), ours, first


def checksum(tree: Any) -> int:
    """Returns a CRC-32 of all arrays of a tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.asarray(leaf).tobytes(), value)
    return value


def check_shared(folder: StrPath) -> None:
    """Refuses a folder that is not the same one for all processes; creates it if needed."""
    if not is_multiprocess():
        return
    folder = Path(folder)
    [name, *_] = gather(f".shared-{secrets.token_hex(8)}")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    barrier("token")
    deadline, seen = time.monotonic() + SHARED_SECONDS, False
    while not seen and time.monotonic() < deadline:
        seen = folder.is_dir() and name in os.listdir(folder)
        time.sleep(0 if seen else 0.2)
    found = gather((socket.gethostname(), seen))
    if is_first():
        (folder / name).unlink()
    for process, (host, seen) in enumerate(found):
        if not seen:
            raise UserError(
                f"{folder} of process {process} on {host} is not that of process 0 on "
                f"{found[0][0]}; give a --workdir that all processes share"
            )


def put_global(tree: Any, shardings: Any) -> Any:
    """Distributes arrays, which every process holds in full, over the devices of all processes.

    Args:
      tree: arrays.
      shardings: a matching tree of shardings, or one for all arrays.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    return jax.tree.map(_put, tree, shardings)


def put_state_global(state: nnx.State[Any, Any], shardings: Any) -> None:
    """Moves the arrays of an `nnx.State` to their shardings in place, leaf by leaf.

    At no time are two copies of more than one array held.
    """
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for variable, sharding in zip(variables, jax.tree.leaves(shardings), strict=True):
        variable.set_value(_put(variable[...], sharding))


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array with this sharding: `leaf` itself, if it already has it."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def all_gather(tree: Any) -> Any:
    """Returns distributed arrays in full in each process; all processes call it together."""
    from jax.experimental import multihost_utils

    def get(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(get, tree)
