"""testinfra over the project's own way to a host: pinned keys, tailnet first, sudo's password on stdin.

testinfra's SSH backends cannot hand sudo a password and know nothing of the remembered tailnet
address. This one asks `control.reach` like everything else does, so the specs read a host through the
same connection that the converge used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import testinfra.backend
from testinfra.backend.base import BaseBackend, CommandResult

from control.reach import open_session
from control.session import LinkLost

if TYPE_CHECKING:
    from control.session import Session

NAME = "quietport"
COMMAND_TIMEOUT_S = 120


class QuietportBackend(BaseBackend):
    """One SSH session a host, opened at the first command and kept until `close_all`."""

    NAME = NAME
    _sessions: ClassVar[dict[str, Session]] = {}

    def __init__(self, hostname: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(hostname, *args, **kwargs)
        # testinfra would ask the host for its encoding: a round trip for an answer we do not need.
        self._encoding = "utf-8"

    @property
    def session(self) -> Session:
        """The session to this host. Raises ReachError when it cannot be reached."""
        if self.hostname not in self._sessions:
            self._sessions[self.hostname] = open_session(self.hostname)
        return self._sessions[self.hostname]

    def run(self, command: str, *args: str, **kwargs: Any) -> CommandResult:
        """Run `command` as root; `args` fill its %s and are quoted.

        A lost connection is made anew once: specs only read, so nothing is done twice.
        """
        line = self.quote(command, *args)
        try:
            done = self.session.run(line, timeout=COMMAND_TIMEOUT_S)
        except LinkLost:
            if lost := self._sessions.pop(self.hostname, None):
                lost.close()
            done = self.session.run(line, timeout=COMMAND_TIMEOUT_S)
        return self.result(done.exit_code, line.encode(), done.stdout, done.stderr)

    def decode(self, data: bytes) -> str:
        """Text of a command's output. Bytes that are no UTF-8 are shown, never fatal."""
        return data.decode("utf-8", errors="backslashreplace")

    @classmethod
    def close_all(cls) -> None:
        """Close every session of this test run."""
        while cls._sessions:
            cls._sessions.popitem()[1].close()


def register() -> None:
    """Make `quietport://NAME` known to testinfra."""
    testinfra.backend.BACKENDS[NAME] = f"{__name__}.{QuietportBackend.__name__}"
