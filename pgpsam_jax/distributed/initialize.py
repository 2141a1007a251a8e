"""The time that a process is one of several: it joins the others, and all end together."""

import contextlib
import os
import socket
import threading
import time

import jax

from pgpsam_jax.distributed import multihost
from pgpsam_jax.distributed.cluster_env import START_SECONDS, Place
from pgpsam_jax.distributed.heartbeat import Peers, Relay, leave
from pgpsam_jax.errors import Interrupted, UserError


@contextlib.contextmanager
def joined(place: Place | None):
    """Be one of the processes of a run inside the block; None: the only one.

    An error inside ends this process and, with what it says, the others.
    """
    if place is None:
        yield
        return
    peers, stopped = _join(place), None
    try:
        multihost.agree({"number of processes": place.processes})
        yield
        multihost.barrier("end")
    except BaseException as error:
        if not (isinstance(error, Interrupted) and error.agreed):
            peers.fail(error)
        stopped = error
    peers.close()
    with contextlib.suppress(RuntimeError):  # all is done, whoever is killed now
        jax.distributed.shutdown()
    if stopped is not None:
        raise stopped


def _join(place: Place) -> Peers:
    """Connect to the others; a mistake ends the process, for JAX's own exit would wait for them."""
    count, process, address = place.processes, place.process, place.coordinator
    host, port = address.rpartition(":")[0].strip("[]"), int(address.rpartition(":")[2])
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from us
    if any(name in os.environ for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        os.environ.setdefault("no_grpc_proxy", f"127.0.0.1,{host}")

    def give_up(reason="they did not come"):
        leave(
            2,
            f"process {process} of {count} did not meet the others at {address} within "
            f"{START_SECONDS} s ({reason}); all need the same --coordinator and --processes, and "
            "each a --process of its own",
        )

    # JAX itself aborts where it waits too long, with pages of log: it is given more time than we.
    too_long = threading.Timer(START_SECONDS, give_up)
    too_long.daemon = True
    try:
        if process:
            _await_coordinator(host, port, process)
            relay = Relay(host, port)
        else:
            _check_free(port)
        too_long.start()
        jax.distributed.initialize(
            relay.address if process else address,
            count,
            process,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * START_SECONDS,
        )
    except UserError as error:
        leave(2, str(error))
    except Exception as error:
        give_up((str(error).splitlines() or [type(error).__name__])[0])
    too_long.cancel()
    peers = Peers(multihost.client(), process, count, address)
    if process:
        relay.lost = lambda: peers.lost(0)
    return peers


def _check_free(port: int) -> None:
    """Refuse a port of this machine that is taken; JAX would crash."""
    both = socket.has_dualstack_ipv6()  # as the coordinator listens
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror or error}); choose another "
            "for --coordinator, or end the run that has it"
        ) from None


def _await_coordinator(host: str, port: int, process: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=START_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {process} cannot reach process 0 at {host}:{port} "
                    f"({error.strerror or error}); start process 0 there, or correct --coordinator"
                ) from None
            time.sleep(0.5)
