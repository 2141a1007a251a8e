"""Signals that ask a program to end: a run finishes the step, saves, and exits with `errors.AGAIN`.

SIGTERM and SIGUSR1 come from schedulers, SIGINT from Ctrl-C. Where nothing would be lost (reading
data, compiling, evaluating) the program ends at once, and so it does at a further SIGINT. Without
`listening` signals do what they do in any Python program, and nothing here has an effect.
A command that cannot go on where it was ends at once with `errors.SIGNALED` and the number.

The processes of one run stop after the same step. Each asks at the end of every step whether to
`stop_after` it. Once a signal has reached one of them, `peers` has every process hold there and
name the next step that it will ask about; the latest of these is the last step of all.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

from pgpsam_jax.errors import AGAIN, SIGNALED, Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM))
_HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal is closed
GRACE_SECONDS = 20  # to end where nothing is saved; schedulers kill after 30 s
_TOGETHER_SECONDS = 0.5  # a program around this one may pass on what the terminal sent already
_EXPLAINED = "finishing the step and saving; Ctrl-C ends at once"


class Stop:
    """Whether, and after which step, this process has been asked to stop.

    resumes: the same command goes on from what is saved.
    """

    def __init__(self, resumes: bool = True):
        self.resumes, self.code = resumes, AGAIN
        self.reason: str | None = None  # the signal, and the process that it reached
        self.asked = threading.Event()
        self.deferred = self.raised = self.several = self._announced = False
        self._change = threading.Condition()
        self._next: int | None = None  # the step that `due` will be asked about next
        self._held, self._last = False, None

    def ask(self, reason: str) -> None:
        """Stop, for a signal to this process or to another one of the run."""
        if self.reason is None:
            self.reason = reason
            self.asked.set()

    def receive(self, number: int) -> None:
        """Stop, for a signal to this process."""
        if not self.resumes and self.reason is None:
            self.code = SIGNALED + number
        self.ask(signal.Signals(number).name)

    def announce(self) -> None:
        """Say, once, what happens now; the step may end before the thread that watches wakes."""
        with self._change:
            if not self._announced:
                self._announced = True
                print(f"\n{self.reason}: {_EXPLAINED}", file=sys.stderr, flush=True)

    def begin(self, step: int) -> None:
        """Steps up to `step` are done; `due` will be asked about each of those that follow."""
        self._next = step + 1

    def due(self, step: int) -> bool:
        """Whether `step` is the last one; asked once it is on its way, in order."""
        if self._is_last(step):
            self.announce()
            return True
        return False

    def _is_last(self, step: int) -> bool:
        if not self.several:
            return self.reason is not None
        with self._change:
            self._change.wait_for(lambda: not self._held)
            if self._last is not None and step >= self._last:
                return True
            self._next = step + 1
            return False

    def hold(self) -> int | None:
        """Let no further step pass; the one that is held. None before `begin`."""
        with self._change:
            self._held = self._next is not None and self._last is None
            return self._next

    def settle(self, last: int) -> None:
        """All processes stop after the step `last`."""
        with self._change:
            self._held, self._last = False, last
            self._change.notify_all()

    def end(self, saved: int | None = None, *, agreed: bool = False) -> None:
        """Raise what ends the program, once. saved: the step after which the state was saved."""
        if not self.raised:
            self.raised = True
            raise Interrupted(self.told(saved), agreed=agreed, code=self.code)

    def told(self, saved: int | None = None) -> str:
        """Why the program ends, and what to do."""
        if not self.resumes:
            return f"{self.reason} came; every file that was written is complete"
        if saved is None:
            return f"{self.reason} came; the same command goes on from what is saved"
        return f"{self.reason} came, step {saved} is saved; the same command goes on from there"


_stop = Stop()


def current() -> Stop:
    """That of the block of `listening` under way; outside, one that nobody asks."""
    return _stop


@contextlib.contextmanager
def listening(*, resumes: bool = True):
    """Heed the signals inside the block, which belongs to the main thread.

    resumes: as for `Stop`. An error after a signal is taken for its consequence.
    """
    global _stop
    stop = _stop = Stop(resumes)
    heeded = set(SIGNALS)
    if not resumes and signal.getsignal(_HANGUP) is not signal.SIG_IGN:  # as nohup has it
        heeded.add(_HANGUP)
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)

    def heed(number, _):
        stop.receive(number)
        if not stop.deferred:
            stop.end()

    def again():
        if _stop is stop:  # it listens still
            os.kill(os.getpid(), SIGNALS[-1])

    def swallowed(unraisable):
        if not isinstance(unraisable.exc_value, Interrupted):
            unraisablehook(unraisable)
            return
        stop.raised = False
        timer = threading.Timer(0.05, again)
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, heed) for number in heeded}
    # What is raised in a callback of the garbage collector, say, goes nowhere.
    unraisablehook, sys.unraisablehook = sys.unraisablehook, swallowed
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The handler waits for Python code to run, which a compiler or a collective may keep from it
    # for minutes; the thread does not.
    watch = stop, reader, heeded
    thread = threading.Thread(target=_watch, args=watch, daemon=True, name="signals")
    thread.start()
    try:
        yield
    except Exception as error:  # compiled modules make other errors of the interrupt
        if stop.raised and not stop.resumes:
            raise Interrupted(stop.told(), code=stop.code) from error
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
def deferred():
    """A signal does not end the block: what runs inside asks `current().due(step)`."""
    stop = _stop
    stop.deferred = True
    try:
        yield stop
    finally:
        stop.deferred = False
    if stop.reason is not None:  # it came after the last step
        stop.end()


def _watch(stop: Stop, reader: socket.socket, heeded: set) -> None:
    """Read which signals come, until the other end closes."""
    deadline, came, alone = None, False, 0.0
    while True:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], patience)[0]:
            _leave(stop.code, f"stopped: {stop.told()}")
        received = reader.recv(64)
        if not received:
            return
        for number in filter(heeded.__contains__, received):
            if came and number == signal.SIGINT and time.monotonic() > alone:
                _leave(130, "stopped: interrupted twice; what was not saved is lost")
            if not came:
                came = True
                alone = time.monotonic() + (0 if stop.resumes else _TOGETHER_SECONDS)
                stop.receive(number)
                if stop.deferred:
                    stop.announce()
                else:
                    deadline = time.monotonic() + GRACE_SECONDS


def _leave(code: int, text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(code)
