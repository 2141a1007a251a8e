"""The other processes of a run: when one of them ends, none of the rest waits for it for ever.

Every process says in the key-value store of JAX's coordinator, which is process 0, that it lives,
and looks whether the others do. One that ends with an error leaves the reason there. JAX itself
would tell much later and end the process with pages of log, or, where process 0 is gone, at once:
the connection to it therefore runs through a relay that says so in a sentence first.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback

from pgpsam_jax.errors import AGAIN, Interrupted, UserError, explained
from pgpsam_jax.runtime import preemption

LOST = 69  # exit code: another process has ended without a word (EX_UNAVAILABLE)
BEAT_SECONDS = 3
HURRY_SECONDS = 0.05  # between two looks while all wait for an agreement
SILENT_SECONDS = 60  # without a beat, a process counts as ended; JAX itself waits 100
SUSPECT_SECONDS = 12  # the same, once work that all share has failed here
ADVICE = "start all of them again with the same command to go on from the last checkpoint"
_ALIVE, _ENDED, _SEEN = "pgpsam/alive", "pgpsam/ended", "pgpsam/seen"
_STOP = "pgpsam/stop"

_last_words = threading.Lock()  # of this process: never released


def leave(code: int, message: str) -> None:
    """End this process at once with a sentence on stderr: no exit hook may wait for the others."""
    if _last_words.acquire(blocking=False):
        sys.stdout.flush()
        word = "stopped" if code == AGAIN else "error"
        print(f"\n{word}: {message}", file=sys.stderr, flush=True)
        os._exit(code)
    time.sleep(60)  # another thread is ending the process


class Peers:
    """What this process, number `process` of `count`, tells the others and hears from them.

    client: of `jax.distributed`, connected. address: of process 0.
    """

    def __init__(self, client, process: int, count: int, address: str):
        self._client, self.process, self.count, self.address = client, process, count, address
        self._host, self._closing = socket.gethostname(), threading.Event()
        self._patience, self._stop, self._settled = SILENT_SECONDS, preemption.current(), False
        self._stop.several = True
        self._beats = {i: (None, time.monotonic()) for i in range(count)}
        self._hosts: dict[int, str] = {}
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def close(self) -> None:
        """From here on the others may end."""
        self._closing.set()

    def fail(self, error: BaseException) -> None:
        """End this process because of an error, and tell the others why."""
        if _of_the_runtime(error):
            self._suspect()
        code, message = 1, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500]
        if isinstance(told := explained(error), UserError):
            code, message = 2, str(told)
        elif isinstance(error, Interrupted):
            code, message = AGAIN, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, message = 130, "interrupted"
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exception(error)
        try:
            self._say(_ENDED, json.dumps({"code": code, "message": message}))
            if self.process == 0:  # the others hear it from this process
                self._await_listeners()
        except RuntimeError:  # nobody left to tell
            pass
        leave(code, message)

    def lost(self, process: int) -> None:
        """End this process because another is gone."""
        if not self._closing.is_set():
            leave(
                LOST,
                f"{self._name(process)} has ended without a word (killed, out of memory, or its "
                f"machine is gone), so that process {self.process} cannot go on; {ADVICE}",
            )

    def _name(self, process: int) -> str:
        where = self._hosts.get(process) or (self.address if process == 0 else "")
        return f"process {process} of {self.count}" + (f" on {where}" if where else "")

    def _say(self, what: str, text: str) -> None:
        self._client.key_value_set(f"{what}/{self.process}", text, allow_overwrite=True)

    def _hear(self, what: str) -> dict[int, str]:
        """What each process has said of something; those that said nothing are left out."""
        said = self._client.key_value_dir_get(what)
        return {int(key.rsplit("/", 1)[1]): text for key, text in said}

    def _watch(self) -> None:
        beat, heard = 0, time.monotonic()
        while not self._closing.is_set():
            try:
                self._say(_ALIVE, f"{beat} {self._host}")
                self._look()
                self._agree_to_stop()
                beat, heard = beat + 1, time.monotonic()
            except RuntimeError:  # process 0 does not answer
                if time.monotonic() - heard > self._patience:
                    self.lost(0)
            if not self._stop.asked.is_set():
                self._stop.asked.wait(BEAT_SECONDS)
            else:
                self._closing.wait(BEAT_SECONDS if self._settled else HURRY_SECONDS)

    def _look(self) -> None:
        now = time.monotonic()
        for process, text in self._hear(_ALIVE).items():
            beat, self._hosts[process] = text.split(" ", 1)
            if beat != self._beats[process][0]:
                self._beats[process] = beat, now
        for process, text in self._hear(_ENDED).items():
            if process != self.process:
                self._say(_SEEN, "")
                words = json.loads(text)
                leave(words["code"], f"{self._name(process)} has ended: {words['message']}")
        for process, (_, since) in self._beats.items():
            if process != self.process and now - since > self._patience:
                self.lost(process)

    def _agree_to_stop(self) -> None:
        """Find the last step, once a signal has reached one of us: see `interruption`."""
        said = {process: json.loads(text) for process, text in self._hear(_STOP).items()}
        if self._settled or not (said or self._stop.reason):
            return
        for word in said.values():
            self._stop.ask(word["reason"])
        step = self._stop.hold()
        if step is not None and self.process not in said:
            self._say(_STOP, json.dumps({"reason": self._stop.reason, "step": step}))
        if len(said) == self.count:
            self._stop.settle(max(word["step"] for word in said.values()))
            self._settled = True

    def _suspect(self) -> None:
        """Ends this process if another is gone; returns if all live, so that the fault is ours."""
        self._patience = SUSPECT_SECONDS
        self._closing.wait(SUSPECT_SECONDS + 2 * BEAT_SECONDS)

    def _await_listeners(self) -> None:
        deadline = time.monotonic() + 4 * BEAT_SECONDS
        while len(self._hear(_SEEN).keys() | self._hear(_ENDED).keys()) < self.count:
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)


def _of_the_runtime(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, was raised by XLA: the work of all processes."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Relay:
    """A port of this machine that leads to the coordinator; `lost()` when that hangs up.

    address: the port, "127.0.0.1:N". The coordinator must accept connections already.
    """

    def __init__(self, host: str, port: int):
        self._target, self.lost = (host, port), lambda: None
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._start(self._accept)

    @staticmethod
    def _start(function, *arguments) -> None:
        threading.Thread(target=function, args=arguments, daemon=True, name="relay").start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(self._target, timeout=SUSPECT_SECONDS)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_silence(far)
            self._start(self._carry, near, far, far)
            self._start(self._carry, far, near, far)

    def _carry(self, source, sink, far) -> None:
        """Bytes of one direction until an end closes; `lost()` if that was the coordinator's."""
        gone = None
        while gone is None:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                gone = source
                break
            try:
                sink.sendall(data)
            except OSError:
                gone = sink
        near = sink if source is far else source
        if gone is far and near.fileno() != -1:  # JAX has not hung up itself
            self.lost()
        _hang_up(near)
        _hang_up(far)


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed already
        pass
    end.close()


def _notice_silence(connection: socket.socket) -> None:
    """Break a connection whose other machine does not answer any more, after about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9}
    options |= {"TCP_USER_TIMEOUT": SILENT_SECONDS * 1000}
    for name, value in options.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
