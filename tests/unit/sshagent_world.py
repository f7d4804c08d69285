"""What the tests of agent access share: a private root, real keys, and the program as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from quietport.sshagent import audit, sessions
from quietport.sshagent.names import now, stamp
from quietport.sshagent.process import Process, boot_id, boottime
from quietport.sshagent.record import Record, agent_env
from quietport.sshagent.root import Root, open_root

CHECKOUT = Path(__file__).parents[2]
VARIABLE = "OPENCLAW_SSH_PRIVATE_KEY"
# The interpreter alone: the program needs none of the packages that the tests have.
PYTHON = (getattr(sys, "_base_executable", sys.executable), "-S")
# For what takes a moment, on a machine that has other things to do.
PATIENCE_S = 120
# A TTL that a start does not use up there, and that a test can wait for.
SHORT_TTL_S = 6

# Of a run under nohup(1), or in the background of a script, every child ignores them, and a shell then cannot
# trap them (POSIX, 2.11 Signals).
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def short_folder(factory: pytest.TempPathFactory) -> Path:
    """A directory without the name of the test: a socket's path has room for 107 characters (unix(7))."""
    return factory.mktemp("w")


def make_key(path: Path, *, passphrase: str = "", comment: str = "canary") -> Path:
    """A real key; returns its path."""
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", comment, "-f", str(path)]
    subprocess.run(argv, check=True)
    return path


@dataclass
class World:
    """A root of its own, and a key."""

    folder: Path
    key: Path
    path: list[Path] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "r"

    def env(self, **more: str) -> dict[str, str]:
        """The environment of a caller who has the key in the usual variable."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "CODEX_"))
        }
        found = {**inherited, "PYTHONPATH": str(CHECKOUT), VARIABLE: self.key.read_text(), **more}
        found["PATH"] = os.pathsep.join([*map(str, self.path), found["PATH"]])
        return found

    def argv(self, *words: str) -> list[str]:
        return [*PYTHON, "-m", "quietport", "ssh-agent", "--runtime-root", str(self.root), *words]

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the program to its end."""
        return subprocess.run(
            self.argv(*words),
            env=self.env() if env is None else env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            **options,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start the program, and leave it running."""
        return subprocess.Popen(
            self.argv(*words),
            env=options.pop("env", None) or self.env(),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            text=True,
            **options,
        )

    def listed(self) -> list[dict[str, Any]]:
        done = self.run("--list", "--json")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        document = json.loads(done.stdout)
        assert document["schema"] == 1
        found: list[dict[str, Any]] = document["sessions"]
        return found

    def only(self) -> dict[str, Any]:
        (session,) = self.listed()
        return session

    def events(self) -> list[str]:
        """The names of the events in audit.jsonl."""
        try:
            lines = (self.root / "audit.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line)["event"] for line in lines]

    def opened(self, *, create: bool = True) -> Root:
        return open_root(str(self.root), create=create, sockets=True)

    def fabricate(self, **changes: Any) -> Record:
        """Publish a session as the wrapper does, of processes that are no more; returns its record."""
        root = self.opened()
        try:
            moment = changes.pop("at", now())
            ttl = changes.pop("ttl_s", 1800)
            nobody = Process(gone_pid(), 1, boot_id())
            record = Record(
                id=sessions.new_id(moment),
                created_at=stamp(moment),
                expires_at=stamp(moment + timedelta(seconds=ttl)),
                ttl_s=ttl,
                deadline_s=boottime() + (moment - now()).total_seconds() + ttl,
                hosts=(),
                wrapper=nobody,
                keeper=nobody,
                agent=nobody,
            )
            record = replace(record, **changes)
            environment = agent_env(self.root / "sockets" / record.id, record.agent)
            sessions.publish(root, record, environment)
            return record
        finally:
            root.close()

    def directory(self, record: Record) -> Path:
        return self.root / "sessions" / record.id

    def trail(self) -> audit.Trail:
        root = self.opened()
        try:
            return audit.read(root)
        finally:
            root.close()


def gone_pid() -> int:
    """A PID that nobody has: of a child that was waited for."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def wait_until(ready: Callable[[], object], *, seconds: float = PATIENCE_S) -> None:
    """Fails the test when `ready` does not come true in time."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not ready():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(pause)
        pause = min(pause * 1.3, 0.2)


def alive(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def agents_of(root: Path) -> list[int]:
    """PIDs of the ssh-agents and keepers whose current or recorded directory is in `root`."""
    found = []
    for session in (root / "sessions").glob("*/agent.env"):
        found.append(int(session.read_text().split("SSH_AGENT_PID=")[1]))
    return found


def script(folder: Path, name: str, text: str) -> Path:
    """An executable sh script."""
    folder.mkdir(exist_ok=True)
    place = folder / name
    place.write_text(f"#!/bin/sh\n{text}\n")
    place.chmod(0o755)
    return place
