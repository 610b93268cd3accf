"""A web server on loopback that behaves, and misbehaves, as the data sets' hosts do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Host:
    """What it serves and how.

    Attributes:
        files: content by path.
        ranges: answer 206 to ranges.
        etag: the tag of every file.
        break_after: close the connection after so many bytes of an answer, `breaks` times.
        busy: answer 503 so many times.
        delay: seconds before each 16 kB.
        redirects: path to path, as the Hub sends one to its storage.
        served: bytes of bodies sent.
        requests: (path, Range header) of each request.
        authorised: paths that were asked for with an Authorization header.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: str = '"one"'
    break_after: int | None = None
    breaks: int = 0
    busy: int = 0
    delay: float = 0.0
    redirects: dict[str, str] = field(default_factory=dict)
    served: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    authorised: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(host: Host) -> Iterator[Host]:
    """Runs until the block ends; `host.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            wanted = self.headers.get("Range")
            with host.lock:
                host.requests.append((path, wanted))
                host.authorised |= {path} if self.headers.get("Authorization") else set()
                busy, host.busy = host.busy > 0, max(0, host.busy - 1)
            if busy:
                self.reply(503, {})
            elif path in host.redirects:
                place = host.redirects[path]
                self.reply(302, {"Location": f"{'' if '://' in place else host.url}{place}?signed=1"})
            elif path not in host.files:
                self.reply(404, {})
            else:
                self.send(host.files[path], wanted if host.ranges else None)

        def reply(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()

        def send(self, content: bytes, wanted: str | None) -> None:
            begin, end = 0, len(content)
            if wanted is not None:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = int(first), int(last) + 1
            self.send_response(206 if wanted is not None else 200)
            self.send_header("ETag", host.etag)
            self.send_header("Content-Length", str(end - begin))
            if wanted is not None:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.end_headers()
            with host.lock:
                breaking = host.breaks > 0 and end - begin > 1
                host.breaks -= breaking
            if breaking:
                end = min(end, begin + (host.break_after or 0))
            for start in range(begin, end, 1 << 14):
                time.sleep(host.delay)
                piece = content[start : min(end, start + (1 << 14))]
                try:
                    self.wfile.write(piece)
                except OSError:
                    return
                with host.lock:
                    host.served += len(piece)
            if breaking:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that was killed is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    host.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
