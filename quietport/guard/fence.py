"""`exec`: a risky command, run only while its guard is armed, and never beside a rollback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from quietport import guardlock
from quietport.errors import HostProgramError, printable
from quietport.guard import holders, state
from quietport.guard.machine import GuardError, Machine, to_journal
from quietport.guard.state import Armed

NOT_ARMED = 75  # EX_TEMPFAIL of sysexits.h
TOO_LONG = 124
CANNOT_RUN = 126
NOT_FOUND = 127
# From SIGTERM to SIGKILL.
GRACE_S = 2.0


def execute(machine: Machine, token: str, argv: Sequence[str], *, timeout: float | None = None) -> int:
    """Run `argv` with our standard input and output; its exit code, 128 + n when signal n ended it.

    Raises GuardError (code 75) when `token` is not armed, or its time is up while another holds the lock.
    TOO_LONG: it was ended after `timeout` seconds, or when the guard's time was up. What it has put into a
    session of its own goes on then, holds the lock, and is ended by the rollback.
    """
    armed = require_armed(machine, token)
    try:
        with guardlock.hold(timeout=armed.seconds_left(machine), path=machine.path(state.LOCK)) as lock:
            armed = require_armed(machine, token)
            return _run(machine, armed, argv, timeout=timeout, lock=lock)
    except GuardError:
        raise
    except HostProgramError as error:
        raise GuardError(f"not run: {error}", code=NOT_ARMED) from error


def require_armed(machine: Machine, token: str) -> Armed:
    """The guard with this token, while it is armed. Raises GuardError (75), which says what became of it."""
    armed = state.read_armed(machine)
    if armed is None or armed.token != token:
        raise GuardError(f"not run: {gone(machine, token)}", code=NOT_ARMED)
    if not armed.seconds_left(machine):
        raise GuardError(
            f"not run: the time of guard {token} is up, and what was changed is being undone.", code=NOT_ARMED
        )
    return armed


def gone(machine: Machine, token: str) -> str:
    """What became of a guard that is not armed, as a sentence."""
    for entry in state.history(machine):
        if entry.get("token") == token:
            return (
                f"guard {token} is not armed any more: {entry['how']} ({entry['why']}) at {entry['ended']}."
            )
    return f"no guard {printable(token)} is armed here; `quietport guard status` tells what is."


def _run(machine: Machine, armed: Armed, argv: Sequence[str], *, timeout: float | None, lock: int) -> int:
    left = armed.seconds_left(machine)
    limit = left if timeout is None else min(timeout, left)
    began = machine.now()
    try:
        # The lock goes with it: whatever it leaves at work holds on to it when we are gone.
        child = subprocess.Popen(list(argv), pass_fds=(lock,))
    except FileNotFoundError:
        print(f"quietport guard exec: {printable(argv[0])} is not there.", file=sys.stderr)
        return NOT_FOUND
    except OSError as error:
        print(f"quietport guard exec: {printable(argv[0])}: {error.strerror}.", file=sys.stderr)
        return CANNOT_RUN
    with _signals_for(child):
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            _end(machine, child)
    took = machine.now() - began
    name = os.path.basename(argv[0])  # noqa: PTH119, a word of a command, not a path of ours
    if code is None:
        whose = "its own time limit" if limit < left else "the end of the guard's time"
        said = f"{name} was ended after {took:.1f} s: {whose}"
        to_journal(f"guard {armed.token}: {said}")
        print(f"quietport guard exec: {printable(said)}.", file=sys.stderr)
        return TOO_LONG
    code = 128 - code if code < 0 else code
    # Arguments may be secrets of somebody; the name is none.
    to_journal(f"guard {armed.token}: {name} ended with {code} after {took:.1f} s")
    return code


def _end(machine: Machine, child: subprocess.Popen[bytes]) -> None:
    session = os.getsid(child.pid)
    holders.kill(holders.family(machine, {child.pid}, session=session), signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        holders.kill(holders.family(machine, {child.pid}, session=session))
        child.wait()


@contextmanager
def _signals_for(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A terminal's keys reach the command as well as us: it decides. Others are handed on to it."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    # Functions, never SIG_IGN, which the command would inherit; set after it was started all the same.
    old = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGQUIT)}
    old |= {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
