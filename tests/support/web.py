"""A web server for tests: the files of a folder, with requests that are counted, cut, refused or held up."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Web:
    """A server of a folder on this machine, and what is to go wrong, by path such as /photos/a.jpg.

    cut: after how many bytes of an answer the connection ends, the first times; status: what is answered; held: sends
    half and waits for `released`; size: what HEAD tells, None for no length at all; changed: the content after a cut.
    asked: (path, Range or "") of each GET; queries: what followed a ? in any request, "" for nothing.
    """

    def __init__(self, folder: Path, *, has_ranges: bool = True) -> None:
        self.folder, self.has_ranges = folder, has_ranges
        self.cut: dict[str, list[int]] = {}
        self.status: dict[str, int] = {}
        self.size: dict[str, int | None] = {}
        self.changed: dict[str, bytes] = {}
        self.held: set[str] = set()
        self.released = threading.Event()
        self.asked: list[tuple[str, str]] = []
        self.queries: set[str] = set()
        self.address = ""

    def fetched(self) -> Counter[str]:
        """Count the requests for each file, which has a suffix, since the last time."""
        found = Counter(path for path, _ in self.asked if Path(path).suffix)
        self.asked.clear()
        return found

    @contextmanager
    def serving(self) -> Iterator[Web]:
        """Answer requests within the with-block."""
        web = self

        class Handler(_Handler):
            pass

        Handler.web = web
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.address = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self.released.set()
                server.shutdown()
                thread.join()


class _Handler(SimpleHTTPRequestHandler):
    web: Web

    def translate_path(self, path: str) -> str:
        return str(self.web.folder / unquote(path.partition("?")[0]).lstrip("/")) + "/" * path.endswith("/")

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self.web.asked.append((unquote(self.path.partition("?")[0]), self.headers.get("Range", "")))
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path, _, query = unquote(self.path).partition("?")
        self.web.queries.add(query)
        if path in self.web.status:
            self.send_error(self.web.status[path])
            return
        place = Path(self.translate_path(path))
        if not place.is_file():
            super().do_GET() if has_body else super().do_HEAD()
            return
        data, begin = place.read_bytes(), 0
        date = self.date_time_string(int(place.stat().st_mtime))
        asked = self.headers.get("Range", "")
        if asked and self.web.has_ranges and self.headers.get("If-Range", date) == date:
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Last-Modified", date)
        size = self.web.size.get(path, len(data) - begin) if not has_body else len(data) - begin
        if size is not None and (path not in self.web.size or self.web.size[path] is not None):
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if has_body:
            self._send(path, data[begin:])

    def _send(self, path: str, data: bytes) -> None:
        cuts = self.web.cut.get(path)
        if cuts:
            self.wfile.write(data[: cuts.pop(0)])
            self.close_connection = True
            if path in self.web.changed:
                place = Path(self.translate_path(path))
                place.write_bytes(self.web.changed[path])
                os.utime(place, (1, 1))
            return
        if path in self.web.held:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.web.released.wait()
            data = data[len(data) // 2 :]
        self.wfile.write(data)
