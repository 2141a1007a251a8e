"""Joins this process to the others of a run; when one of them fails, all end.

JAX detects a lost process by its heartbeats and then aborts the rest. What is added here: the
sentence and exit code of such an end, and errors of one process reported by all.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax

from pgpsam_jax.distributed import multihost
from pgpsam_jax.distributed.cluster_env import START_SECONDS, ProcessInfo
from pgpsam_jax.errors import AGAIN, Interrupted, UserError, as_user_error, first_line
from pgpsam_jax.runtime import jax_internals, preemption
from pgpsam_jax.utils.files import StrPath

PEER_LOST = 69  # exit code (EX_UNAVAILABLE): another process ended without reporting an error
HEARTBEAT_SECONDS = 60  # without a heartbeat, JAX considers a process lost
_MARGIN_SECONDS = 10  # for JAX to notice and report it
_FAILED, _STOP, _HEARD = "pgpsam/failed", "pgpsam/stop", "pgpsam/heard"

_last_words = threading.Lock()  # never released


def leave(code: int, message: str, finish: Callable[[], object] = lambda: None) -> None:
    """Ends this process with one sentence on stderr; exit hooks would wait for the others.

    finish: called after the sentence was printed.
    """
    if _last_words.acquire(blocking=False):
        sys.stdout.flush()
        kind = "stopped" if code == AGAIN else "error"
        print(f"\n{kind}: {message}", file=sys.stderr, flush=True)
        jax_internals.on_abort(lambda: os._exit(code))  # as the others are ending, too
        finish()
        os._exit(code)
    time.sleep(2 * _MARGIN_SECONDS)  # another thread is ending the process


@contextlib.contextmanager
def joined(
    info: ProcessInfo | None,
    workdir: StrPath | None = None,
    *,
    start_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> Iterator[None]:
    """Joins the processes of a run for the block; an error inside ends all of them.

    Args:
      info: this process among the others; None for a single-process run.
      workdir: folder of the run, for messages.
      start_seconds: time within which all processes must have joined.
      heartbeat_seconds: time after which a silent process counts as lost.
    """
    if info is None:
        yield
        return
    group = ProcessGroup(info, workdir, start_seconds, heartbeat_seconds)
    stopped = None
    try:
        multihost.agree({"number of processes": info.processes})
        yield
        multihost.barrier("end")
    except BaseException as error:
        if not (isinstance(error, Interrupted) and error.agreed):
            group.fail(error)
        stopped = error
    group.close(AGAIN if stopped else 0)
    if stopped is not None:
        raise stopped


class ProcessGroup:
    """The processes of a run, as one of them sees them; arguments as for `joined`."""

    def __init__(
        self,
        info: ProcessInfo,
        workdir: StrPath | None,
        start_seconds: int,
        heartbeat_seconds: int,
    ) -> None:
        self.info, self._workdir = info, workdir
        self._heartbeat_seconds = heartbeat_seconds
        self._connect(start_seconds)
        self._client = jax_internals.client()
        jax_internals.on_abort(self._on_abort)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="peer errors")
        self._listener.start()
        preemption.current().group = self

    def _connect(self, seconds: int) -> None:
        info = self.info
        jax.config.update("jax_enable_preemption_service", True)
        if any(name in os.environ for name in ("grpc_proxy", "https_proxy", "http_proxy")):
            host = info.coordinator.rpartition(":")[0].strip("[]")
            os.environ.setdefault("no_grpc_proxy", host)

        def give_up(reason: str = "JAX's report above says why") -> None:
            leave(
                2,
                f"process {info.process} of {info.processes} did not meet the others at "
                f"{info.coordinator} within {seconds} s ({reason}); start process 0 there, and "
                "give all the same --coordinator and --processes and each its own --process",
            )

        jax_internals.on_abort(give_up)
        try:
            if info.process == 0:
                _check_free(int(info.coordinator.rpartition(":")[2]))
            with jax_internals.keep_sigterm_handler() as found:
                jax.distributed.initialize(
                    info.coordinator,
                    info.processes,
                    info.process,
                    local_device_ids=info.local_devices,
                    cluster_detection_method="deactivate",
                    initialization_timeout=seconds,
                    heartbeat_timeout_seconds=self._heartbeat_seconds,
                )
            [self._notify_jax] = found
        except UserError as error:
            leave(2, str(error))
        except Exception as error:
            give_up(first_line(error))

    def close(self, code: int) -> None:
        """Disconnects after the last common step; a process lost from here on is no error.

        code: exit code where JAX aborts the process nevertheless.
        """
        preemption.current().group = None
        jax_internals.on_abort(lambda: os._exit(code))
        with contextlib.suppress(RuntimeError), jax_internals.keep_sigterm_handler():
            if self.info.process == 0:
                self._client.key_value_set(_FAILED, "")  # ends the listeners
            self._listener.join()
            jax.distributed.shutdown()
        jax_internals.on_abort(None)

    def fail(self, error: BaseException) -> None:
        """Ends this process because of an error, which the others then report too."""
        if _raised_by_runtime(error):  # JAX aborts this process if another one is gone
            seconds = self._heartbeat_seconds + _MARGIN_SECONDS
            waits = f"waiting {seconds} s for word of the others"
            print(f"\n{first_line(error)[:200]}: {waits}", file=sys.stderr)
            time.sleep(seconds)
        code, message = _exit_code_and_message(error)
        words = [self.info.process, socket.gethostname(), code, message]
        with contextlib.suppress(RuntimeError):  # another one failed first, or process 0 is gone
            self._client.key_value_set(_FAILED, json.dumps(words))
        leave(code, message, self._await_listeners)

    def request_stop(self, reason: str) -> None:
        """Asks all processes to agree on a last step and to stop after it."""
        with contextlib.suppress(RuntimeError):  # process 0 is gone, or another one asked first
            self._client.key_value_set(_STOP, reason)
        self._notify_jax()

    def reached_last_step(self, step: int) -> bool:
        """Returns whether `step` is the agreed last one; each process asks about each step."""
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def stop_reason(self) -> str:
        """Returns what `request_stop` was given, in whichever process."""
        return self._client.blocking_key_value_get(_STOP, 10_000)

    def _listen(self) -> None:
        try:
            words = self._client.blocking_key_value_get(_FAILED, multihost.WORK_MS)
        except RuntimeError:  # process 0 is gone: JAX aborts this process
            return
        if words and (report := json.loads(words))[0] != self.info.process:
            process, host, code, message = report
            who = f"process {process} of {self.info.processes} on {host}"
            leave(code, f"{who} has ended: {message}", self._await_listeners)

    def _await_listeners(self) -> None:
        """Keeps process 0, where the others hear of an error, until all have."""
        with contextlib.suppress(RuntimeError):
            self._client.wait_at_barrier(_HEARD, 1000 * _MARGIN_SECONDS)

    def _on_abort(self) -> None:
        if threading.get_ident() == threading.main_thread().ident:  # a crash of this process
            return
        process, count = self.info.process, self.info.processes
        lost = f"process {1 - process} of 2" if count == 2 else f"another of the {count} processes"
        resume = f"resume {self._workdir}" if self._workdir else "resume"
        leave(
            PEER_LOST,
            f"{lost} has ended without a word (killed, out of memory, or its machine or network is "
            f"down; JAX's report above has the details), so process {process} cannot continue; "
            f"start all of them again with the same command to {resume} from the last checkpoint",
        )


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    if isinstance(converted := as_user_error(error), UserError):
        return 2, str(converted)
    if isinstance(error, Interrupted):
        return AGAIN, str(error)
    message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500]
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, message
    traceback.print_exception(error)
    return 1, message


def _raised_by_runtime(error: BaseException | None) -> bool:
    """Returns whether XLA, which runs the work of all processes, raised the error or its cause."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_free(port: int) -> None:
    """Refuses a port that is already taken, with which JAX would crash."""
    both = socket.has_dualstack_ipv6()  # as the coordinator listens
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror or error}); choose another "
            "for --coordinator, or end the run that uses it"
        ) from None
