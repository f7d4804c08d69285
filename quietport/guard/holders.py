"""Who holds the guard's lock, and how the rollback gets it from them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from quietport import guardlock
from quietport.errors import HostProgramError
from quietport.guard.machine import Machine, stat_fields
from quietport.guard.state import LOCK

PATIENCE_S = 10.0
# Another rollback may wait twice for sshd; it does the same as we.
ROLLBACK_PATIENCE_S = 280.0
_AFTER_KILL_S = 5.0
_MARK = b"rollback"


def holders(machine: Machine) -> set[int]:
    """Processes that have the lock open, but this one. Who only waits for it has it open for an instant."""
    first = _openers(machine)
    if first:
        machine.sleep(0.05)
        first &= _openers(machine)
    return first


def _openers(machine: Machine) -> set[int]:
    try:
        lock = machine.path(LOCK).stat()
    except OSError:
        return set()
    found = set()
    for process in machine.path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(descriptor.stat(), lock):
                        found.add(int(process.name))
                        break
    return found


def name_of(machine: Machine, pid: int) -> str:
    """A process as a sentence names it: id and program."""
    try:
        name = machine.path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        name = ""
    return f"{pid} ({name})" if name else str(pid)


def family(machine: Machine, pids: set[int], *, session: int | None = None) -> set[int]:
    """`pids` and all their descendants; with `session` only those that are in that session."""
    parents: dict[int, tuple[int, int]] = {}
    for process in machine.path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = stat_fields(process)
                parents[int(process.name)] = (int(fields[1]), int(fields[3]))
    found = set(pids)
    while True:
        more = {pid for pid, (parent, _) in parents.items() if parent in found} - found
        if session is not None:
            more = {pid for pid in more if parents[pid][1] == session}
        if not more:
            return found - {os.getpid()}
        found |= more


def kill(pids: set[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal them all; those that are gone are gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def seized(machine: Machine, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock for a rollback, which goes on in any case: who keeps it longer than 10 s is killed.

    Another rollback at work is given time to end: it does what this one would.
    """
    with ExitStack() as stack:
        descriptor = _take(machine, stack, PATIENCE_S)
        if descriptor is None and _is_rollback(machine, holders(machine)):
            say("another rollback is at work; waiting for it")
            descriptor = _take(machine, stack, ROLLBACK_PATIENCE_S)
        for _ in range(3):
            if descriptor is not None:
                break
            # Nobody: it has ended by itself in this moment.
            if doomed := family(machine, holders(machine)):
                names = ", ".join(name_of(machine, pid) for pid in sorted(doomed))
                say(f"the lock is held after {PATIENCE_S:g} s; killing {names}")
                kill(doomed)
            descriptor = _take(machine, stack, _AFTER_KILL_S)
        if descriptor is None:
            say("the lock cannot be had; going on without it")
        else:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, b"%s %d\n" % (_MARK, os.getpid()), 0)
        try:
            yield
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)


def _take(machine: Machine, stack: ExitStack, timeout: float) -> int | None:
    try:
        return stack.enter_context(guardlock.hold(timeout=timeout, path=machine.path(LOCK)))
    except HostProgramError:
        return None


def _is_rollback(machine: Machine, pids: set[int]) -> bool:
    """Whether one of `pids` says in the lock that it is a rollback. Of a dead one the word stays behind."""
    try:
        mark, _, pid = machine.path(LOCK).read_bytes().strip().partition(b" ")
        return mark == _MARK and int(pid) in pids
    except (OSError, ValueError):
        return False
