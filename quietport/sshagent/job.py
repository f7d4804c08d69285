"""The command: started, listened to, and ended as if the wrapper were not there.

It stays in the process group of its caller, so terminal, pipeline and job control treat it as they would
without a wrapper: what the terminal sends goes to the whole group and is not sent on; what is sent to the
wrapper alone is. Which of the two a kill(2) was, the witness tells: a process in the same group that does
nothing but report the signals it gets. When the command stops, the wrapper stops itself by the same signal.
Whoever lets the command go on, or kills it, may not know of the wrapper: a waker lets that go on too.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from quietport.sshagent.process import die_with_parent
from quietport.sshagent.spawn import close_above
from quietport.sshagent.wanted import NOT_EXECUTABLE, CommandError

# Faults of our own come to us whatever is blocked (signal(7)).
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
OURS = frozenset(signal.valid_signals() - _FAULTS - {signal.SIGKILL, signal.SIGSTOP})
INTERRUPTS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_PROBE = signal.SIGRTMAX
_GROUP_S = 0.002
# The witness answers at once, unless the machine is very busy or it was stopped.
_ANSWER_S = 1.0
# How soon after its command a stopped wrapper goes on: often at first, then seldom.
_WAKE_S, _WAKE_SELDOM_S = 0.02, 0.5
# By a signal, or by a debugger (proc(5)).
_STOPPED = ("T", "t")
# No sender is -1; 0 is one outside of our PID namespace (sigaction(2), pid_namespaces(7)).
_NOBODY = -1
_REPORT = struct.Struct("=ii")


class InterruptedStartError(Exception):
    """A signal asked the wrapper to end before there was a command."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@dataclass(frozen=True)
class Original:
    """What the command gets back of what the wrapper changed for itself."""

    mask: frozenset[int]
    umask: int
    core: tuple[int, int]
    child: bool

    @classmethod
    def take(cls) -> Original:
        """Block all signals and make new files private, from here to the end of the wrapper."""
        mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, OURS))
        ignored = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        # With SIGCHLD ignored nobody learns how a child ended (waitpid(2)).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return cls(mask, os.umask(0o077), resource.getrlimit(resource.RLIMIT_CORE), ignored)

    def restore(self) -> None:
        """In the child that becomes the command."""
        os.umask(self.umask)
        resource.setrlimit(resource.RLIMIT_CORE, self.core)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if self.child:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def read_patiently(descriptor: int, *, seconds: float, most: int) -> bytes:
    """What can be read until the end of it, at most `most` bytes, in at most `seconds`.

    Raises InterruptedStartError, and TimeoutError.
    """
    data = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while len(data) < most:
        interrupted()
        # Signals are blocked: they end no system call.
        if poll.poll(20):
            part = os.read(descriptor, most - len(data))
            if not part:
                break
            data += part
        elif time.monotonic() >= deadline:
            raise TimeoutError
    return data


def interrupted() -> None:
    """Raises InterruptedStartError when a signal that asks for an end is waiting."""
    asked = {number for number in INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN}
    info = signal.sigtimedwait(asked, 0)
    if info is not None:
        raise InterruptedStartError(info.si_signo)


def start(path: str, argv: Sequence[str], *, env: Mapping[bytes, bytes], original: Original) -> int:
    """Start the command at `path`; returns its PID. Raises CommandError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        try:
            original.restore()
            os.execve(path, list(argv), env)  # noqa: S606 - no shell on purpose
        except OSError as error:
            number = error.errno or 0
        finally:
            with suppress(OSError):
                os.write(writer, struct.pack("=i", number))
            os._exit(NOT_EXECUTABLE)
    os.close(writer)
    failure = os.read(reader, 4)
    os.close(reader)
    if failure:
        os.waitpid(child, 0)
        (number,) = struct.unpack("=i", failure)
        raise CommandError(f"{path} cannot be executed: {os.strerror(number)}.", code=NOT_EXECUTABLE)
    return child


@dataclass
class Witness:
    """A child in our process group, and the descriptor on which it reports the signals it gets."""

    pid: int
    reports: int
    _seen: list[tuple[float, int, int]] = field(default_factory=list)

    @classmethod
    def start(cls) -> Witness:
        """Make it. All signals are blocked already."""
        reader, writer = os.pipe()
        wrapper = os.getpid()
        child = os.fork()
        if child == 0:
            _report_signals(writer, wrapper)
        os.close(writer)
        return cls(child, reader)

    def stop(self) -> None:
        """End it, and wait for it."""
        os.close(self.reports)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def saw(self, number: int, sender: int) -> bool:
        """Whether the whole group got the signal `number` of the process `sender` that we just got."""
        # kill(2) goes through a group one after the other: we may have been the first.
        time.sleep(_GROUP_S)
        self._catch_up()
        recent = time.monotonic() - _ANSWER_S
        self._seen = [entry for entry in self._seen if entry[0] > recent]
        for entry in self._seen:
            if entry[1:] == (number, sender):
                self._seen.remove(entry)
                return True
        return False

    def _catch_up(self) -> None:
        """Take all reports. The probe is the last that a process is given of what is pending (signal(7))."""
        try:
            os.kill(self.pid, _PROBE)
        except ProcessLookupError:
            return
        poll = select.poll()
        poll.register(self.reports, select.POLLIN)
        deadline = time.monotonic() + _ANSWER_S
        while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
            data = os.read(self.reports, _REPORT.size)
            if len(data) < _REPORT.size:
                return
            number, sender = _REPORT.unpack(data)
            if (number, sender) == (_PROBE, os.getpid()):
                return
            self._seen.append((time.monotonic(), number, sender))


def _report_signals(writer: int, wrapper: int) -> NoReturn:
    try:
        _leave_descriptors(keep=(writer,))
        die_with_parent(wrapper, signal.SIGKILL)
        os.set_blocking(writer, False)
        while True:
            info = signal.sigwaitinfo(OURS)
            if info.si_code <= 0:
                with suppress(BlockingIOError):
                    os.write(writer, _REPORT.pack(info.si_signo, info.si_pid))
    finally:
        os._exit(0)


def _leave_descriptors(*, keep: Sequence[int] = ()) -> None:
    """Hold nothing open that others wait for the end of."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    close_above(2, keep=keep)


@dataclass
class Job:
    """A command that runs. `ended` is told the PID and the wait status of every other child that ends."""

    command: int
    witness: Witness
    ended: Callable[[int, int], None]
    _waker: int = _NOBODY

    def wait(self) -> int:
        """Do what a wrapper has to until the command ends; returns its exit code, negative for a signal."""
        while True:
            info = signal.sigwaitinfo(OURS)
            if info.si_signo == signal.SIGCHLD:
                code = self._children()
                if code is not None:
                    return code
            else:
                self._pass_on(info)

    def _pass_on(self, info: signal.struct_siginfo) -> None:
        if self._is_for_the_command(info):
            with suppress(OSError):
                os.kill(self.command, info.si_signo)

    def _is_for_the_command(self, info: signal.struct_siginfo) -> bool:
        number = info.si_signo
        if info.si_code > 0:
            # A terminal tells the whole group, but of its end only the leader of the session.
            return number in (signal.SIGHUP, signal.SIGCONT) and os.getsid(0) == os.getpid()
        if info.si_pid in (os.getpid(), self._waker):
            return False
        return not self.witness.saw(number, info.si_pid)

    def _children(self) -> int | None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid != self.command:
                if not os.WIFSTOPPED(status):
                    self.ended(pid, status)
            elif os.WIFSTOPPED(status):
                self._stop(os.WSTOPSIG(status))
            else:
                return os.waitstatus_to_exitcode(status)

    def _stop(self, number: int) -> None:
        """Stop like the command did, until both go on."""
        self._waker = _start_waker(self.command)
        before = signal.getsignal(number)
        if number != signal.SIGSTOP:
            signal.signal(number, signal.SIG_DFL)
        try:
            # Asked last: a SIGCONT that waits is lost when a stop comes (signal(7)).
            if not self._just_continued():
                os.kill(os.getpid(), number)
                # Unblocked it stops us here, and the next line is for after that.
                if number != signal.SIGSTOP:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
                    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        finally:
            if number != signal.SIGSTOP:
                signal.signal(number, before)
            if self._waker != _NOBODY:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(self._waker, signal.SIGKILL)
                    os.waitpid(self._waker, 0)
        # At once: it belongs to this stop, and would undo the next.
        self._pass_on_continue()

    def _just_continued(self) -> bool:
        """Whether a SIGCONT was waiting for us, and the command runs again: it may be of an earlier stop."""
        return self._pass_on_continue() and _state(self.command) not in _STOPPED

    def _pass_on_continue(self) -> bool:
        info = signal.sigtimedwait({signal.SIGCONT}, 0)
        if info is not None:
            self._pass_on(info)
        return info is not None


def _start_waker(command: int) -> int:
    """A child that continues us when we are stopped and `command` is not; its PID, or _NOBODY.

    A signal that the kernel gave us in between, a SIGCONT for the command alone, a SIGKILL for it: of none of
    these does a stopped process hear.
    """
    wrapper = os.getpid()
    try:
        child = os.fork()
    except OSError:
        return _NOBODY
    if child:
        return child
    try:
        os.setsid()  # what stops the whole group again does not stop it
        _leave_descriptors()
        die_with_parent(wrapper, signal.SIGKILL)
        pause = _WAKE_S
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, _WAKE_SELDOM_S)
            # What /proc does not show (hidepid, proc(5)) is left as it is.
            if _state(wrapper) == "T" and _state(command) not in ("", *_STOPPED):
                os.kill(wrapper, signal.SIGCONT)
    finally:
        os._exit(0)


def _state(pid: int) -> str:
    """As in /proc/PID/stat (proc(5)): T is stopped, Z a zombie; "" when it is not shown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
