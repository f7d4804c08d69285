"""Telling somebody that the state of this host has changed, with a command of theirs.

/var/lib/quietport/doctor/notified.json, schema 1: state (the last one that was told), at (UTC). It is written
once the command has succeeded, so a change that nobody was told of is told at the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from quietport.commands import Done, ended
from quietport.doctor.place import FOLDER
from quietport.doctor.run import State, text_of
from quietport.errors import HostProgramError, printable
from quietport.hostfile import HostFileError, HostFileMissingError, read_json, write_atomic

NOTIFIED = "notified.json"
LIMIT_S = 60.0
# Before the first of all results.
NEVER = "never looked"
_STATES = ("pass", "warn", "fail", "unknown")
_LAST_WORDS = 4096

Runner = Callable[..., Done]


def run_alone(argv: Sequence[str], *, stdin: str, timeout: float) -> Done:
    """Run `argv` for at most `timeout` seconds; what it leaves running is not waited for.

    Of what it says the end is kept. Raises HostProgramError when it is missing or takes too long.
    """
    try:
        # In memory: a pipe ends with the last process that holds it, and a disk that is full takes nothing.
        with _memory("out") as out, _memory("err") as err:
            done = ended(argv, stdin=stdin, timeout=timeout, out=out, err=err)
            return Done(done.returncode, _end_of(out), _end_of(err))
    except (OSError, HostProgramError) as error:
        raise HostProgramError(f"{argv[0]} cannot be run, or took longer than {timeout:g} s.") from error


def _memory(name: str) -> BinaryIO:
    return os.fdopen(os.memfd_create(name), "r+b")


def _end_of(stream: BinaryIO) -> str:
    size = os.fstat(stream.fileno()).st_size
    return os.pread(stream.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace")


def last_told(folder: Path = FOLDER) -> str:
    """The state that somebody was told last; NEVER without one. A file that cannot be read tells nothing."""
    try:
        state = read_json(folder / NOTIFIED).get("state")
    except HostFileMissingError:
        return NEVER
    except HostFileError as error:
        # Rather twice than not at all.
        print(printable(str(error)), flush=True)
        return NEVER
    return str(state) if state in _STATES else NEVER


def if_changed(
    command: Sequence[str],
    state: State,
    text: str,
    *,
    name: str,
    at: datetime,
    folder: Path = FOLDER,
    runner: Runner = run_alone,
) -> str:
    """Run `command` (argv) with `text` on standard input if `state` is not the one that was told last.

    The first line is `NAME: OLD -> NEW`. A first state that is pass is no news. Returns what to say about it,
    "" when nothing was due. Raises HostProgramError when it cannot be remembered.
    """
    if not command:
        return ""
    before = last_told(folder)
    if before == state:
        return ""
    change = f"{name}: {before} -> {state}"
    if (before, state) != (NEVER, "pass"):
        problem = _tell(command, f"{change}\n\n{text}\n", runner)
        if problem:
            return f"notify_command was not told ({change}), and is again at the next run: {problem}"
    document = {"schema": 1, "state": state, "at": text_of(at)}
    write_atomic(folder / NOTIFIED, (json.dumps(document) + "\n").encode(), mode=0o640)
    return f"notify_command was told: {change}" if before != NEVER or state != "pass" else ""


def _tell(command: Sequence[str], text: str, runner: Runner) -> str:
    """ "" or why it failed. Its arguments are not repeated: people put tokens there."""
    try:
        done = runner(list(command), stdin=text, timeout=LIMIT_S)
    except HostProgramError:
        return f"{printable(command[0])} cannot be run, or took longer than {LIMIT_S:g} s."
    if done.code != 0:
        said = printable(done.complaint, limit=200)
        return f"{printable(command[0])} ended with exit code {done.code}: {said}"
    return ""
