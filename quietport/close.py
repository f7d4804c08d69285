"""`quietport close`: the end of `quietport open`, when the tailnet works."""

from __future__ import annotations

import argparse
import os

from quietport import opened, sshd_follow
from quietport.errors import FINE, PROBLEM, USAGE, HostProgramError
from quietport.open import LOCK_TIMEOUT_S, Door, Hold, Say, armed_by, run, waits
from quietport.sshd_apply import Host, to_the_end


def closing(
    host: Host,
    *,
    say: Say,
    force: bool = False,
    when_due: bool = False,
    note_only: bool = False,
    hold: Hold = sshd_follow.hold,
    door: Door | None = None,
) -> int:
    """`quietport close` with the lock held; returns the exit code."""

    def refused() -> bool:
        # What is closed now would be opened again, and nothing in a guard's snapshot is written meanwhile.
        by = "" if force or note_only else armed_by(host.path)
        if by and not when_due:
            say(waits(by))
        return bool(by)

    not_now = FINE if when_due else PROBLEM
    if refused():
        return not_now
    try:
        # The timer comes again in a minute.
        with hold(0 if when_due else LOCK_TIMEOUT_S):
            # Arming takes the same lock: a guard may be there now.
            if refused():
                return not_now
            door = door or Door(host, say=say)
            note = opened.read(host.path)
            if note_only:
                door.forget(note)
                return FINE
            done = door.when_due(note) if when_due else door.close(note, force=force)
            return FINE if done else PROBLEM
    except (HostProgramError, OSError) as error:
        if when_due:
            return FINE
        say(str(error))
        return PROBLEM


def main(argv: list[str]) -> int:
    """Exit codes: 0 closed (--when-due: or not due), 1 it stays open (the output says why), 2 usage."""
    parser = argparse.ArgumentParser(prog="quietport close", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="close although nobody gets in then")
    how.add_argument("--when-due", action="store_true", help="only when its time is over (the timer)")
    how.add_argument("--note-only", action="store_true", help="forget that it was opened (the converge)")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.exit(USAGE, "quietport close: only root can do this.\n")
    return to_the_end(
        lambda say: closing(
            Host(run=run),
            say=say,
            force=options.force,
            when_due=options.when_due,
            note_only=options.note_only,
        )
    )
