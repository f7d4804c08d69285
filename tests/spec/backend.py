"""testinfra over the project's own way to a host: pinned keys, tailnet first, sudo's password on stdin.

testinfra's SSH backends cannot hand sudo a password and know nothing of the remembered tailnet
address. This one asks `control.reach` like everything else does, so the specs read a host through the
same connection that the converge used.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import testinfra.backend
from testinfra.backend.base import BaseBackend, CommandResult

from control.reach import open_session
from control.session import LinkLost, Result

if TYPE_CHECKING:
    from control.session import Session

NAME = "quietport"
COMMAND_TIMEOUT_S = 120
# Of each command of a snapshot, and of all of it: an emulated host takes its time.
ONE_OF_ALL_S = 60
ALL_S = 300
# Commands at a time. Most of them wait for systemd or a disk.
AT_ONCE = 4
# Runs on the host: each line of standard input's JSON in a shell of its own, as a session would.
_ASK_ALL = """
import base64, json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

def ask(line):
    try:
        done = subprocess.run(
            ["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, timeout=asked["seconds"]
        )
    except subprocess.TimeoutExpired:
        return None
    return [done.returncode, *(base64.b64encode(text).decode() for text in (done.stdout, done.stderr))]

asked = json.load(sys.stdin)
with ThreadPoolExecutor(asked["at_once"]) as pool:
    json.dump(list(pool.map(ask, asked["lines"])), sys.stdout)
"""


class QuietportBackend(BaseBackend):
    """One SSH session a host, opened at the first command and kept until `close_all`."""

    NAME = NAME
    _sessions: ClassVar[dict[str, Session]] = {}
    _snapshots: ClassVar[dict[str, dict[str, Result]]] = {}
    alone: ClassVar[dict[str, list[str]]] = {}
    """What each host was asked for by itself, besides its snapshot."""

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
        """Run `command` as root; `args` fill its %s and are quoted. The snapshot answers what it has."""
        line = self.quote(command, *args)
        done = self._snapshots.get(self.hostname, {}).get(line)
        if done is None:
            self.alone.setdefault(self.hostname, []).append(line)
            done = self._ask(line)
        return self.result(done.exit_code, line.encode(), done.stdout, done.stderr)

    def _ask(self, line: str, *, stdin: bytes | None = None, timeout: float = COMMAND_TIMEOUT_S) -> Result:
        """A lost connection is made anew once: specs only read, so nothing is done twice."""
        try:
            return self.session.run(line, stdin=stdin, timeout=timeout)
        except LinkLost:
            if lost := self._sessions.pop(self.hostname, None):
                lost.close()
            return self.session.run(line, stdin=stdin, timeout=timeout)

    def ask_all(self, lines: Sequence[str]) -> None:
        """Take a snapshot: the answers to all of `lines`, in one round trip.

        A line that fails is not kept, and a host that cannot do it (it has no python3) gets no snapshot: what
        is not in it is asked for by itself.
        """
        asked = list(dict.fromkeys(lines))
        told = {"lines": asked, "at_once": AT_ONCE, "seconds": ONE_OF_ALL_S}
        program = shlex.join(["python3", "-I", "-c", _ASK_ALL])
        with suppress(ValueError, TimeoutError):
            done = self._ask(program, stdin=json.dumps(told).encode(), timeout=ALL_S)
            answers = zip(asked, json.loads(done.stdout), strict=True)
            self._snapshots[self.hostname] = {
                line: Result(0, base64.b64decode(answer[1]), base64.b64decode(answer[2]))
                for line, answer in answers
                if answer is not None and answer[0] == 0
            }

    def decode(self, data: bytes) -> str:
        """Text of a command's output. Bytes that are no UTF-8 are shown, never fatal."""
        return data.decode("utf-8", errors="backslashreplace")

    @classmethod
    def close_all(cls) -> None:
        """Close every session of this test run, and forget what the hosts said."""
        cls._snapshots.clear()
        cls.alone.clear()
        while cls._sessions:
            cls._sessions.popitem()[1].close()


def register() -> None:
    """Make `quietport://NAME` known to testinfra."""
    testinfra.backend.BACKENDS[NAME] = f"{__name__}.{QuietportBackend.__name__}"
