"""A small server of files that gives parts of them, says when they were changed, and fails, denies
or dawdles when it is told to."""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """address: of the folder that is served; requests: the files, and parts of them, that were
    asked for. What goes wrong: failures: how many of the next requests for contents; status: the
    answer to all, in place of files; pause: seconds of waiting between the pieces of an answer, of
    `piece` bytes; stops_after: bytes of an answer after which nothing comes any more;
    short_answers: how many of the next parts are half as long; denied: paths that are; page: the
    answer for what is not there. A file may also be named in a query, /get?file=NAME."""

    def __init__(self, folder: Path):
        self.requests: list[tuple[str, str]] = []
        self.failures = 0
        self.whole_files = False  # does not know of parts
        self.status: int | None = None
        self.pause, self.piece = 0.0, 2**16
        self.stops_after: int | None = None
        self.stopping = threading.Event()
        self.short_answers = 0
        self.denied: set[str] = set()
        self.page: bytes | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(contents=False)

            def do_GET(self) -> None:
                self._answer(contents=True)

            def _answer(self, contents: bool) -> None:
                path, _, query = self.path.partition("?")
                named = re.match(r"file=([^&]+)", query)
                file = folder / (named[1] if named else path.lstrip("/"))
                if path in owner.denied:
                    return self._send(403, b"no", contents)
                if owner.status is not None:
                    return self._send(owner.status, b"no", contents)
                if not file.is_file():
                    if owner.page is not None:
                        self.modified, self.tag = self.date_time_string(), "page"
                        return self._send(200, owner.page, contents)
                    return self._send(404, b"")
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if contents:
                    owner.requests.append((self.path, self.headers.get("Range", "all")))
                    if owner.failures:
                        owner.failures -= 1
                        return self._send(503, b"")
                data = file.read_bytes()
                status = file.stat()
                self.modified = self.date_time_string(status.st_mtime)
                self.tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
                if part is None or owner.whole_files:
                    return self._send(200, data, contents)
                first, last = int(part[1]), int(part[2])
                if owner.short_answers and contents:
                    owner.short_answers -= 1
                    last = (first + last) // 2
                headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                return self._send(206, data[first : last + 1], contents, headers)

            def _send(self, code: int, data: bytes, contents: bool = True, headers=None) -> None:
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                if code in (200, 206):
                    self.send_header("Last-Modified", self.modified)
                    self.send_header("ETag", self.tag)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for start in range(0, len(data) if contents else 0, owner.piece):
                    if owner.stops_after is not None and start >= owner.stops_after:
                        owner.stopping.wait(20)
                        return
                    self.wfile.write(data[start : start + owner.piece])
                    time.sleep(owner.pause)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serve(folder: Path):
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
