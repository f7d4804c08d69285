"""Which process a PID means, and what a process asks the kernel to keep from others."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quietport.sshagent.names import AgentAccessError

# The largest PID the kernel gives (PID_MAX_LIMIT, proc(5)).
MAX_PID = 1 << 22
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


@cache
def boot_id() -> str:
    """Which boot this is: random, new with every boot (random(4)). Raises AgentAccessError."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise AgentAccessError(f"/proc does not tell which boot this is: {error.strerror}.") from error


def boottime() -> float:
    """Seconds since boot, also those of a suspended machine (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Process:
    """A process for ever: `start` is in clock ticks since boot, None where /proc did not show it."""

    pid: int
    start: int | None
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has `pid` now."""
        return cls(pid, start_of(pid), boot_id())

    def gone(self) -> bool:
        """Whether it is certain that this process is no more.

        kill(2) says that there is none, or the boot is another, or the PID is that of a process which began
        at another time. What /proc does not show counts for nothing: with hidepid (proc(5)) a live ssh-agent
        is not in it.
        """
        if self.boot != boot_id():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        seen = start_of(self.pid)
        return self.start is not None and seen is not None and seen != self.start

    def proved(self) -> bool:
        """Whether it is certain that the PID is still this process."""
        return self.boot == boot_id() and self.start is not None and start_of(self.pid) == self.start


def start_of(pid: int) -> int | None:
    """When the process began, in clock ticks since boot (field 22 of /proc/PID/stat); None if not shown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        # The second field may hold anything, spaces and brackets too.
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def keep_secret() -> None:
    """No core dump of this process and no ptrace of it by the same user, until it executes something."""
    prctl(_PR_SET_DUMPABLE, 0)


def hide() -> None:
    """The same, and no core dump of what is executed next either.

    A core limit of 1 byte stops what a limit of 0 does not: a handler that the kernel pipes dumps into
    (fs/coredump.c takes 1 for "no dump"). The hard limit stays, for the command to have its own again.
    """
    keep_secret()
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard != 0 else 0, hard))


def adopt_orphans() -> None:
    """Children of children become ours when their parent ends (PR_SET_CHILD_SUBREAPER, prctl(2))."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: int) -> None:
    """Be sent the signal `number` when the process `parent`, which made us, ends (prctl(2))."""
    prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def prctl(option: int, value: int) -> None:
    """prctl(2). Raises AgentAccessError."""
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise AgentAccessError(f"The kernel refuses prctl {option}: {reason}.")


def end(handle: int, *, grace_s: float) -> bool:
    """Ask the process behind a pidfd to end, and make it after `grace_s` seconds; whether it is gone."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        if poll.poll(grace_s * 1000):
            return True
    return False
