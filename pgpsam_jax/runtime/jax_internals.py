"""JAX internals without a public equivalent, and the signal handlers that JAX needs from C.

Exercised by `tests/distributed/test_processes.py`, `test_launch.py` and `test_deterministic.py`.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator
from typing import Any

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_abort_handler = _HANDLER()  # null; keeps the C function alive


def client() -> Any:
    """Returns JAX's connection to process 0; None in a single-process run. Starts no backend."""
    from jax._src import distributed

    return distributed.global_state.client


def process_id() -> int:
    """Returns this process's number, as `jax.process_index()`, without starting a backend."""
    from jax._src import distributed

    return distributed.global_state.process_id


def backends_are_initialized() -> bool:
    """Returns whether JAX has a backend, without starting one."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def cluster_types() -> list[Any]:
    """Returns the schedulers that `jax.distributed.initialize` detects, in its order."""
    from jax._src import clusters

    return clusters.ClusterEnv._cluster_types


def on_abort(handler: Callable[[], None] | None) -> None:
    """Calls `handler` when C++ code aborts this process; None restores the default.

    JAX aborts the process when another one is gone, and offers no usable callback: its client's
    `missed_heartbeat_callback` cannot convert its argument to Python. The handler must not call
    JAX, whose locks the aborting thread holds. If it returns, the process ends with SIGABRT.
    """
    global _abort_handler
    _abort_handler = _HANDLER() if handler is None else _HANDLER(lambda _: handler())
    _set_handler(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


@contextlib.contextmanager
def keep_sigterm_handler() -> Iterator[list[Callable[[], object]]]:
    """Restores Python's SIGTERM handler after the block, in which JAX replaces it.

    Yields a list. Afterwards it holds one function: JAX's handler, which starts the agreement
    behind `multihost_utils.reached_preemption_sync_point`.
    """
    ours = signal.getsignal(signal.SIGTERM)
    theirs: list[Callable[[], object]] = []
    try:
        yield theirs
    finally:
        address = _set_handler(signal.SIGTERM, None)
        signal.signal(signal.SIGTERM, ours)
        theirs.append(lambda: address and _HANDLER(address)(signal.SIGTERM))


def _set_handler(number: int, address: ctypes.c_void_p | None) -> int | None:
    """Installs a C signal handler (None: the default one) and returns the previous one."""
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return install(number, address)
