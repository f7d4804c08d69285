"""The guard of a host, from the operator's side: what a run has armed there, and what came of it.

The host's part is quietport/guard: a change that is not confirmed in time undoes itself there. Whatever
happens to a run, it must end with what the host itself says became of the change.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from control.errors import QuietportError, ReachError
from control.reach import open_session
from control.session import Session

LAUNCHER = "/usr/local/sbin/quietport"
# What a run of this program calls itself to the host; who armed by hand is called otherwise.
CONVERGE = "converge of "
# A rollback begins when the time is over; it may have to begin again, and sshd takes a while.
ROLLBACK_S = 60.0
ANSWER_S = 30.0
AGAIN_S = 3.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Armed:
    """A guard that this run armed. `until`: time.monotonic() here when the host begins to undo, about."""

    token: str
    until: float


@dataclass(frozen=True)
class Ended:
    """What became of a guard, in the host's own words: `how` is "confirmed" or "rolled back"."""

    how: str
    why: str
    log: tuple[str, ...]


_armed: dict[str, Armed] = {}
# Tokens that this run has asked a host to confirm, whatever came of it.
_asked: set[str] = set()


def armed(name: str) -> Armed | None:
    """What this run has armed on the host called `name` and not confirmed yet."""
    return _armed.get(name)


def note(name: str, guard: Armed | None) -> None:
    """Remember what is armed on `name`; None when it no longer is."""
    if guard is None:
        _armed.pop(name, None)
    else:
        _armed[name] = guard


def argv(*words: str) -> list[str]:
    """The command line of `quietport guard` on a host."""
    return [LAUNCHER, "guard", *words]


def parse_armed(text: str, *, now: float) -> Armed:
    """What `guard arm --json` printed. Raises QuietportError when it is nothing of the kind."""
    try:
        document = json.loads(text)
        return Armed(token=str(document["token"]), until=now + float(document["left_s"]))
    except (ValueError, KeyError, TypeError) as error:
        raise QuietportError(
            "the guard's answer cannot be read, so nothing was changed.",
            hint="Run again; the host's programs may be of another version.",
        ) from error


def parse_status(text: str) -> dict[str, Any]:
    """What `guard status --json` printed. Raises QuietportError when it is nothing of the kind."""
    try:
        document = json.loads(text)
        if document["schema"] == 1 and isinstance(document["history"], list):
            return dict(document)
    except (ValueError, KeyError, TypeError):
        pass
    raise QuietportError("the guard's status cannot be read.", hint="Run `quietport guard status` there.")


def ended(status: dict[str, Any], token: str) -> Ended | None:
    """What the host says became of the guard with that token; None while it is armed, or not known there.

    A host whose disk is full has no history. A guard is armed there until all is undone, or it is confirmed:
    when this run has asked for no confirmation, one that is not armed any more was undone.
    """
    for entry in status["history"]:
        if isinstance(entry, dict) and entry.get("token") == token:
            log = entry.get("log") or []
            return Ended(str(entry.get("how")), str(entry.get("why")), tuple(str(line) for line in log))
    armed_there = status.get("armed") or {}
    if token in _asked or armed_there.get("token") == token:
        return None
    return Ended("rolled back", "", ("the host could not write down what it did: is its disk full?",))


def give_up(name: str, session: Session | None, *, say: Say) -> str | None:
    """See that what this run armed on `name` and did not confirm is undone; None when nothing was.

    Asks the host to undo it now, by the session of the run or by whichever way answers; where none does,
    waits until the host has undone it by itself. Returns the sentence that says what became of it; `say` gets
    the host's own log. Never raises for a host's sake.
    """
    guard = _armed.pop(name, None)
    if guard is None:
        return None
    end = max(guard.until, time.monotonic()) + ROLLBACK_S
    why = ""
    while True:
        try:
            if session is None or not session.alive:
                session = open_session(name)
            result = _undo(session, guard.token)
            if result is not None:
                for line in result.log:
                    say(line)
                return sentence(result)
        except (QuietportError, TimeoutError, OSError, EOFError) as error:
            why = str(error).removeprefix(f"{name}: ")
        if time.monotonic() > end:
            return (
                f"whether the change was undone is not known: {why or 'the host does not say'} "
                "The host undoes it by itself; look at `quietport guard status` there."
            )
        time.sleep(AGAIN_S)


def _undo(session: Session, token: str) -> Ended | None:
    result = ended(_status(session), token)
    if result is None:
        done = session.run(shlex.join(argv("rollback", token)), timeout=ROLLBACK_S + ANSWER_S)
        result = ended(_status(session), token)
        if result is None and done.exit_code != 0:
            raise ReachError(f"the host could not undo it: {last_line(done.stdout, done.stderr)}")
    return result


def _status(session: Session) -> dict[str, Any]:
    done = session.run(shlex.join(argv("status", "--json")), timeout=ANSWER_S)
    return parse_status(done.stdout.decode("utf-8", "replace"))


def sentence(result: Ended) -> str:
    """What became of a change, for the last line about its host."""
    if result.how == "confirmed":
        return "the change was confirmed and stays."
    return "the change was undone by the host's guard: firewall and sshd are as they were before this run."


def confirm(session: Session, token: str) -> None:
    """Disarm, from a session that began after arming. Raises ReachError with the host's reason.

    A confirmation whose answer is lost is asked for again by `give_up`, which finds it in the history.
    """
    _asked.add(token)
    done = session.run(shlex.join(argv("confirm", token)), timeout=ANSWER_S)
    if done.exit_code != 0:
        raise ReachError(f"{session.name}: the guard was not disarmed: {last_line(done.stdout, done.stderr)}")


def last_line(*outputs: bytes) -> str:
    """The last line somebody said, errors last."""
    lines: Sequence[str] = [
        line.strip() for output in outputs for line in output.decode("utf-8", "replace").splitlines()
    ]
    return next((line for line in reversed(lines) if line), "it said nothing")
