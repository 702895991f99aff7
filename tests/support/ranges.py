"""A web server on loopback that serves byte ranges of a folder and records requests."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Served:
    """The served folder, its address, and the recorded requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.with_ranges = True
        self.fetched: Counter[tuple[str, int, int]] = Counter()
        """(file, first byte, byte after the last) -> times."""

    def bytes_of(self, name: str) -> int:
        return sum((stop - start) * times for (file, start, stop), times in self.fetched.items() if file == name)


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *args):
        return

    def _answer(self) -> None:
        path = self.served.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, tag = path.stat().st_size, f'"{path.stat().st_mtime_ns}"'
        start, stop, status = 0, size, 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and self.served.with_ranges:
            start, stop, status = int(found[1]), min(size, int(found[2] or size - 1) + 1), 206
        self.send_response(status)
        headers = {"Content-Length": str(stop - start), "ETag": tag}
        headers |= {"Accept-Ranges": "bytes"} if self.served.with_ranges else {"Accept-Ranges": "none"}
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if status == 206 else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.served.fetched[path.relative_to(self.served.folder).as_posix(), start, stop] += 1
            with path.open("rb") as handle:
                handle.seek(start)
                self.wfile.write(handle.read(stop - start))

    do_GET = do_HEAD = _answer  # noqa: N815 - as http.server calls them


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Serve an empty folder that the test may fill."""
    from fsspec.implementations.http import HTTPFileSystem

    state = Served(tmp_path / "served")
    state.folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    HTTPFileSystem.clear_instance_cache()
    yield state
    HTTPFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()
