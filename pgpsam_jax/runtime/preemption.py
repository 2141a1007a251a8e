"""Stop signals: a run finishes the step, saves, and exits with `errors.AGAIN`.

SIGTERM and SIGUSR1 come from schedulers, SIGINT from Ctrl-C. Where nothing would be lost (reading
data, compiling, evaluating) the program ends at once; it also does at a second SIGINT. Outside
`handle_signals`, signals have Python's usual effect and nothing here does anything.
A command that cannot be resumed ends at once with `errors.SIGNALED` plus the signal number.

All processes of a run stop after the same step: see `Stop.should_stop`.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from pgpsam_jax.errors import AGAIN, SIGNALED, Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM))
_HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal was closed
GRACE_SECONDS = 20  # to end outside training steps; schedulers kill after 30 s
_TOGETHER_SECONDS = 0.5  # a parent may forward a signal that the terminal already sent
_ANNOUNCEMENT = "finishing the step and saving; Ctrl-C ends at once"


class Group(Protocol):
    """The processes of a run, which agree on a last step: `distributed.initialize.ProcessGroup`."""

    def request_stop(self, reason: str) -> None: ...
    def reached_last_step(self, step: int) -> bool: ...
    def stop_reason(self) -> str: ...


class Stop:
    """Whether this process has been asked to stop, and after which step it will.

    Args:
      resumes: whether the same command resumes from what is saved.

    Attributes:
      reason: name of the signal; None before it arrives.
      group: None in a run of one process.
    """

    def __init__(self, resumes: bool = True):
        self.resumes, self.code = resumes, AGAIN
        self.reason: str | None = None
        self.requested = threading.Event()
        self.deferred = self.raised = self._announced = False
        self.group: Group | None = None
        self._lock = threading.Lock()

    def receive(self, number: int) -> None:
        """Records a signal to this process; only the first one counts."""
        if self.reason is not None:
            return
        if not self.resumes:
            self.code = SIGNALED + number
        self.reason = signal.Signals(number).name
        if self.deferred and self.group:
            self.group.request_stop(self.reason)
        self.requested.set()

    def announce(self) -> None:
        """Prints, once, what happens now; called by whichever thread is first."""
        with self._lock:
            if not self._announced:
                self._announced = True
                print(f"\n{self.reason}: {_ANNOUNCEMENT}", file=sys.stderr, flush=True)

    def should_stop(self, step: int) -> bool:
        """Returns whether `step` is the last one; called for each step in order, once dispatched.

        Several processes agree on the last step: the one after the latest for which any of
        them had called this when the signal arrived.
        """
        if self.group is None:
            stopping = self.reason is not None
        elif stopping := self.group.reached_last_step(step):
            self.reason = self.reason or self.group.stop_reason()
        if stopping:
            self.announce()
        return stopping

    def interrupt(self, saved: int | None = None, *, agreed: bool = False) -> None:
        """Raises `errors.Interrupted`, once.

        Args:
          saved: the step after which the state was saved.
          agreed: whether all processes of the run stop here.
        """
        if not self.raised:
            self.raised = True
            raise Interrupted(self.message(saved), agreed=agreed, code=self.code)

    def message(self, saved: int | None = None) -> str:
        """Returns why the program ends, and what to do."""
        if not self.resumes:
            return f"{self.reason} received; every file that was written is complete"
        if saved is None:
            return f"{self.reason} received; the same command resumes from what is saved"
        return f"{self.reason} received, step {saved} is saved; the same command resumes from there"


_stop = Stop()


def current() -> Stop:
    """Returns the `Stop` of the enclosing `handle_signals`; outside, one that no signal reaches."""
    return _stop


@contextlib.contextmanager
def handle_signals(*, resumes: bool = True) -> Iterator[None]:
    """Handles stop signals inside the block (main thread only).

    An error after a signal counts as its consequence.

    Args:
      resumes: as for `Stop`.
    """
    global _stop
    stop = _stop = Stop(resumes)
    handled = set(SIGNALS)
    if not resumes and signal.getsignal(_HANGUP) is not signal.SIG_IGN:  # as under nohup
        handled.add(_HANGUP)
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)

    def handle(number: int, _: object) -> None:
        stop.receive(number)
        if not stop.deferred:
            stop.interrupt()

    def resend() -> None:
        if _stop is stop:  # still handles signals
            os.kill(os.getpid(), SIGNALS[-1])

    def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            unraisablehook(unraisable)
            return
        stop.raised = False
        timer = threading.Timer(0.05, resend)
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, handle) for number in handled}
    # An exception raised in a garbage-collector callback, for example, is lost.
    unraisablehook, sys.unraisablehook = sys.unraisablehook, on_unraisable
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The handler runs only between Python bytecodes, which a compiler or a collective may delay
    # for minutes; the thread does not wait.
    watch = stop, reader, handled
    thread = threading.Thread(target=_watch, args=watch, daemon=True, name="signals")
    thread.start()
    try:
        yield
    except Exception as error:  # extension modules convert the interrupt to other errors
        if stop.raised and not stop.resumes:
            raise Interrupted(stop.message(), code=stop.code) from error
        raise
    finally:
        signal.set_wakeup_fd(fd)
        sys.unraisablehook = unraisablehook
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()
        _stop = Stop()


@contextlib.contextmanager
def defer_to_step(start: int) -> Iterator[Stop]:
    """Lets the block finish its step at a signal, by asking `should_stop(step)` after each.

    Args:
      start: number of steps already done; the first question is about the one after it.
    """
    stop = _stop
    if stop.group:  # before any process can be asked to stop: the agreement starts from here
        stop.group.reached_last_step(start)
    stop.deferred = True
    try:
        if stop.reason is not None:
            stop.interrupt()
        yield stop
    finally:
        stop.deferred = False
    if stop.reason is not None:  # after the last step
        stop.interrupt()


def _watch(stop: Stop, reader: socket.socket, handled: set[int]) -> None:
    """Reads the signals that arrive, until the other end closes."""
    deadline, received, forwarded_until = None, False, 0.0
    while True:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], patience)[0]:
            _exit(stop.code, f"stopped: {stop.message()}")
        numbers = reader.recv(64)
        if not numbers:
            return
        for number in filter(handled.__contains__, numbers):
            if received and number == signal.SIGINT and time.monotonic() > forwarded_until:
                _exit(130, "stopped: interrupted twice; unsaved progress is lost")
            if not received:
                received = True
                forwarded_until = time.monotonic() + (0 if stop.resumes else _TOGETHER_SECONDS)
                stop.receive(number)
                if stop.deferred:
                    stop.announce()
                else:
                    deadline = time.monotonic() + GRACE_SECONDS


def _exit(code: int, text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(code)
