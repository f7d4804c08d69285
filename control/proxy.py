"""A program that carries an SSH connection, on a socket pair.

paramiko's own ProxyCommand writes to a pipe and believes every write was whole; under pyinfra's gevent the
pipe does not block and the stream would be torn. A socket needs no such belief.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
from typing import IO

from control.errors import ReachError
from control.secret import child_environment

GRACE_S = 2


def expand(command: str, *, address: str, port: int) -> list[str]:
    """The argv of a proxy command, with %h and %p filled in after it was split into words."""
    values = {"%h": address, "%p": str(port), "%%": "%"}
    return [_fill(word, values) for word in shlex.split(command)]


def _fill(word: str, values: dict[str, str]) -> str:
    out, rest = "", word
    while rest:
        head = rest[:2]
        out += values.get(head, rest[0])
        rest = rest[2:] if head in values else rest[1:]
    return out


class Proxy:
    """The running program. `stream` is our end; `close` ends the program and what it started."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.argv = argv
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        ours, theirs = socket.socketpair()
        # Under gevent both ends are non-blocking; the program expects its own to block.
        os.set_blocking(theirs.fileno(), True)
        try:
            self._child = subprocess.Popen(
                argv,
                env=child_environment(),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._errors,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            ours.close()
            self._errors.close()
            why = getattr(error, "strerror", None) or error
            raise ReachError(
                f"{name}: cannot run {argv[0]}, which should carry the connection: {why}.",
                hint="Install it, or correct tailnet_proxy (or ProxyCommand in ~/.ssh/config).",
            ) from error
        finally:
            theirs.close()
        self.stream = ours

    def complaint(self) -> str:
        """The last line the program wrote to standard error, or nothing."""
        if self._errors.closed:
            return ""
        size = os.fstat(self._errors.fileno()).st_size
        text = os.pread(self._errors.fileno(), 4096, max(0, size - 4096)).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(char for char in lines[-1] if char.isprintable()) if lines else ""

    def close(self) -> None:
        """End the program. Harmless when it is gone."""
        self.stream.close()
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGTERM)
            try:
                self._child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()
        self._errors.close()
