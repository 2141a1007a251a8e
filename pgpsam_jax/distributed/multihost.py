"""What the processes of a run do together; `session` says how they find each other.

Every function works for one process too, where it costs nothing. Process 0 is the *first*: it
writes the files of a run, in a folder that all share, and prints. What depends on the process is
where it looks for its part of the work; never what the run computes.
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
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError

SHARED_SECONDS = 60  # for a file of another machine to be seen; network folders cache names
_WORK_MS = 24 * 3600 * 1000  # that one process may need longer than another, in milliseconds
_used = Counter()  # names of barriers and values: each is one of its own


def client():
    """JAX's connection to process 0; None for a run of one process. Starts no backend."""
    from jax._src import distributed

    return distributed.global_state.client


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print once for all processes."""
    if is_first():
        print(text, flush=True)


def own(items) -> list:
    """This process's share of some work: every n-th item of n processes."""
    return list(items)[jax.process_index() :: jax.process_count()]


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if several():
        _used[name] += 1
        client().wait_at_barrier(f"pgpsam/{name}/{_used[name]}", _WORK_MS)


@contextlib.contextmanager
def first_before_others(name: str):
    """The first process goes through the block alone, the others when it is done.

    What it writes they find; where folders are not shared, each makes its own.
    """
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def gather(value) -> list:
    """What every process has for `value`, in their order, on every process."""
    if not several():
        return [value]
    from jax.experimental import multihost_utils

    barrier("gather")  # its wait has no limit, that of a collective may
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    everyone = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return [pickle.loads(part[:n].tobytes()) for part, n in zip(everyone, sizes, strict=True)]


def agree(values: dict) -> None:
    """Check that `values`, by what they are called, are those of the first process.

    Each is a JSON value. Raises a `UserError` on a process that has others.
    """
    process = _process()
    if process is None:
        return
    key, text = f"pgpsam/agreed/{_used['agreed']}", json.dumps([socket.gethostname(), values])
    _used["agreed"] += 1
    if process == 0:
        client().key_value_set(key, text)
    else:
        there, first = json.loads(client().blocking_key_value_get(key, _WORK_MS))
        here, ours = json.loads(text)
        if ours != first:
            name, ours, first = _difference(ours, first)
            raise UserError(
                f"process {process} on {here} and process 0 on {there} differ in {name}: {ours} "
                f"here, {first} there; all need the same"
            )


def _difference(ours: dict, first: dict) -> tuple:
    """(name, ours, theirs) of a field in which two dictionaries differ."""
    path = []
    while isinstance(ours, dict) and isinstance(first, dict):
        path.append(next(k for k in ours | first if ours.get(k) != first.get(k)))
        ours, first = ours.get(path[-1]), first.get(path[-1])
    return ".".join(path), ours, first


def checksum(tree) -> int:
    """Of all numbers of a tree of arrays."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf), value)
    return value


def _process() -> int | None:
    """This process's number without starting a backend; None for a run of one process."""
    from jax._src import distributed

    state = distributed.global_state
    return None if state.client is None else state.process_id


def check_shared(folder) -> None:
    """Refuse a folder that is not one and the same for all processes; it is made."""
    if not several():
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


def place(tree, shardings):
    """Arrays that every process holds whole, laid over devices of any processes.

    shardings: a tree like that of the arrays, or one for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    return jax.tree.map(_put, tree, shardings)


def place_state(state, shardings) -> None:
    """Moves the arrays of an `nnx.State` to their shardings in place, leaf by leaf.

    At no time are two copies of more than one array held.
    """
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for variable, sharding in zip(variables, jax.tree.leaves(shardings), strict=True):
        variable.set_value(_put(variable[...], sharding))


def _put(leaf, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole(tree):
    """Arrays over devices of any processes, whole in each process. All call it together."""
    from jax.experimental import multihost_utils

    def get(leaf):
        if leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(get, tree)
