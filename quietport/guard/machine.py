"""What the guard asks of the host: paths, programs, clocks and the journal. Tests give it another root."""

from __future__ import annotations

import os
import subprocess
import syslog
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from quietport import commands, sshd_apply
from quietport.commands import Done
from quietport.errors import PROBLEM, HostProgramError, printable

SYSTEMCTL_S = 60.0
IDENTIFIER = "quietport-guard"


class GuardError(HostProgramError):
    """The guard refuses, or could not do what it was asked for. Exit code 1 unless said otherwise."""

    def __init__(self, sentence: str, *, code: int = PROBLEM) -> None:
        super().__init__(sentence, code=code)


class Runner(Protocol):
    """Runs a program to its end; a program that is missing or takes too long is a failure, not an error."""

    def __call__(self, argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done: ...


def run(argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
    """Exit code 127 stands for a program that is missing or was stopped after `timeout` seconds."""
    try:
        return commands.run(argv, stdin=stdin, timeout=timeout)
    except HostProgramError as error:
        return Done(127, "", str(error))


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Machine:
    """One host. `now` is in seconds since boot (CLOCK_BOOTTIME), which setting the clock does not change."""

    root: Path = Path("/")
    run: Runner = run
    now: Callable[[], float] = _boottime
    sleep: Callable[[float], None] = time.sleep

    def path(self, path: str) -> Path:
        """Where `path` (absolute) is on this host."""
        return self.root / path.lstrip("/")

    def boot(self) -> str:
        """Which boot this is, of a container too: there the kernel's id stays, and process 1 is another."""
        try:
            kernel = self.path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{kernel} {started_ticks(self.path('/proc/1'))}"
        except (OSError, ValueError) as error:
            raise GuardError(f"/proc does not tell which boot this is: {error}.") from error

    def systemctl(self, *args: str, timeout: float = SYSTEMCTL_S) -> None:
        """Raises GuardError with what systemctl said."""
        done = self.run(["systemctl", *args], timeout=timeout)
        if done.code != 0:
            raise GuardError(f"systemctl {' '.join(args)}: {done.complaint}")

    def show(self, *names: str, properties: Sequence[str]) -> list[dict[str, str]]:
        """`systemctl show` of `names` (of the manager without any), a dictionary each, in their order."""
        asked = ["systemctl", "show", f"--property={','.join(properties)}"]
        done = self.run([*asked, "--", *names] if names else asked, timeout=SYSTEMCTL_S)
        if done.code != 0:
            raise GuardError(f"systemctl show: {done.complaint}")
        blocks = [block for block in done.out.split("\n\n") if block.strip()]
        return [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]

    def sshd_host(self) -> sshd_apply.Host:
        """The same host as sshd-apply sees it."""

        def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
            done = self.run(argv, timeout=SYSTEMCTL_S)
            return subprocess.CompletedProcess(list(argv), done.code, done.out, done.err)

        return sshd_apply.Host(root=self.root, run=answer)


def stat_fields(process: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on: the second may hold anything (proc(5))."""
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


def started_ticks(process: Path) -> int:
    """When a process began: field 22 of its stat, clock ticks since boot."""
    return int(stat_fields(process)[19])


@dataclass
class Log:
    """What is said: kept for the history, told to the journal and, with `aloud`, on standard output."""

    lines: list[str] = field(default_factory=list)
    aloud: bool = True

    def say(self, line: str) -> None:
        """Never raises: who listened may have gone, and a rollback goes on without a listener."""
        line = printable(line)
        self.lines.append(line)
        to_journal(line)
        if self.aloud:
            with suppress(OSError):
                os.write(1, f"{line}\n".encode(errors="replace"))


def to_journal(line: str) -> None:
    """One line to the journal as `quietport-guard`."""
    syslog.openlog(IDENTIFIER, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, printable(line))
