"""The web server of the lab's apt repositories: read-only, one directory, one address.

A program of its own (`python -I aptserver.py DIRECTORY ADDRESS PORT FAULTS`), standard library only, so
that it runs with whatever Python started the lab. FAULTS is a JSON file that is read at every request:
`[{"path": "/tailscale/*/InRelease", "kind": "404"}]`; without it all is well.
"""

from __future__ import annotations

import fnmatch
import http.server
import json
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

HANG_S = 3600
KINDS = ("404", "500", "hang", "corrupt")
"""What a fault does: no such file, server error, no answer, the right length with a wrong content."""


def fault_for(path: str, faults: list[dict[str, str]]) -> str | None:
    """Kind of the first fault whose pattern matches the request's path, or None."""
    for fault in faults:
        if fault["kind"] in KINDS and fnmatch.fnmatchcase(path, fault["path"]):
            return fault["kind"]
    return None


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the directory; no listings, nothing but GET and HEAD."""

    protocol_version = "HTTP/1.1"
    # A client that says nothing for so long is let go; in seconds.
    timeout = 60
    faults: Path

    def send_head(self) -> Any:
        """Answer with the file, or as the faults say."""
        kind = fault_for(self.path.partition("?")[0], read_faults(self.faults))
        if kind == "404":
            return self._refuse(HTTPStatus.NOT_FOUND)
        if kind == "500":
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
        if kind == "hang":
            time.sleep(HANG_S)
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        if kind == "corrupt":
            # "Not modified" would have no content to be wrong.
            del self.headers["If-Modified-Since"]
        answer = super().send_head()
        return Corrupt(answer) if kind == "corrupt" and answer is not None else answer

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_error(status)

    def list_directory(self, path: Any) -> None:
        """A directory is not there."""
        self.send_error(HTTPStatus.NOT_FOUND)


class Corrupt:
    """A file whose bytes are all turned round, so that no hash fits."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """The next bytes, each inverted."""
        return bytes(byte ^ 0xFF for byte in self._file.read(size))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_faults(path: Path) -> list[dict[str, str]]:
    """The faults that are on now; none when the file is not there."""
    try:
        faults: list[dict[str, str]] = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    return faults


def serve(directory: Path, address: str, port: int, faults: Path) -> None:
    """Serve until killed."""
    handler = type("BoundHandler", (Handler,), {"faults": faults})

    def factory(*arguments: Any) -> Handler:
        bound: Handler = handler(*arguments, directory=str(directory))
        return bound

    with http.server.ThreadingHTTPServer((address, port), factory) as server:
        server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
