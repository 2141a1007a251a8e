"""A web server on localhost with one file, which can fail in the ways that servers fail."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class FileServer:
    """Serves `content` at every path; `/moved` leads to `/file`, `/away` to another scheme.

    cuts: bytes after which each of the next connections is cut; ranges: whether a part can be asked
    for; shift: by how much another part is sent than was asked for; asked: the Range headers of
    the requests.
    """

    content: bytes
    etag: str = '"1"'
    kind: str = "application/octet-stream"
    ranges: bool = True
    status: int = 200
    shift: int = 0
    cuts: list[int] = dataclasses.field(default_factory=list)
    asked: list[str | None] = dataclasses.field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serving(content: bytes, **settings) -> Iterator[FileServer]:
    """Yields a server that runs inside the block."""
    state = FileServer(content, **settings)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            state.asked.append(self.headers.get("Range"))
            if state.status != 200:
                return self.send_error(state.status)
            start, wanted = 0, self.headers.get("Range")
            if wanted and state.ranges and self.headers.get("If-Range") == state.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(state.content) > 0:
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                size = len(state.content)
                self.send_header("Content-Range", f"bytes {start + state.shift}-{size - 1}/{size}")
            self.send_header("Content-Type", state.kind)
            self.send_header("Content-Length", str(len(state.content) - start))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            end = state.cuts.pop(0) if state.cuts else len(state.content)
            self.wfile.write(state.content[start:end])
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
