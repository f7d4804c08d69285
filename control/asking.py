"""Asking hosts for the JSON that their own `quietport` program prints: many at once, an answer or a reason.

No answer is never a good one: what is not understood, or does not agree with its exit code, is a NoReport.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from control.apply import chosen_of
from control.errors import QuietportError
from control.guard import LAUNCHER, last_line
from control.session import Session
from control.settings import fleet
from quietport.errors import FINE, PROBLEM, UNKNOWN, USAGE

SCHEMA = 1
ANSWER_S = 60.0
AT_ONCE = 8
_NOT_FOUND = 127

Answer = TypeVar("Answer")
Fits = Callable[[dict[str, Any], int], bool]


class NoReport(QuietportError):
    """A host was asked and gave no report: the sentence why, without the host's name."""


def everyone(names: Sequence[str], ask: Callable[[str], Answer]) -> list[Answer]:
    """What `ask` answers for each of these hosts, all by default, AT_ONCE at a time, in their order.

    Raises SettingsError for a hosts file that cannot be used or an unknown name, before any is asked.
    """
    chosen = chosen_of(names) or list(fleet().hosts)
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(ask, chosen))


def report(session: Session, verb: str, *, fits: Fits) -> dict[str, Any]:
    """The document that `quietport VERB --json` prints on the host of `session`.

    `fits` says whether a document of our schema is one of that verb and agrees with the exit code; it may
    raise KeyError or TypeError for one that is not. Raises NoReport, ReachError when the link is lost,
    TimeoutError after ANSWER_S seconds.
    """
    done = session.run(shlex.join([LAUNCHER, verb, "--json"]), timeout=ANSWER_S)
    if done.exit_code == _NOT_FOUND:
        raise NoReport(
            "it has no quietport program yet.", hint=f"Converge it: `quietport apply {session.name}`"
        )
    if done.exit_code == USAGE:
        raise NoReport(
            f"its programs know no `quietport {verb} --json`: they are of another version.",
            hint=f"Converge it: `quietport apply {session.name}`",
        )
    # A program that could not tell everything may still have a report of the rest.
    silent = done.exit_code == UNKNOWN and not done.stdout.strip()
    if silent or done.exit_code not in (FINE, PROBLEM, UNKNOWN):
        raise NoReport(f"it could not tell: {last_line(done.stdout, done.stderr)}")
    document = _document(done.stdout, done.exit_code, fits)
    if document is None:
        raise NoReport(
            "its report is not understood; its programs may be of another version.",
            hint=f"Converge it: `quietport apply {session.name}`",
        )
    return document


def why(name: str, error: BaseException) -> str:
    """The sentence of an error about the host called `name`, for a row that begins with its name."""
    return str(error).removeprefix(f"{name}: ") or type(error).__name__


def _document(printed: bytes, code: int, fits: Fits) -> dict[str, Any] | None:
    try:
        document = json.loads(printed)
        if document["schema"] == SCHEMA and fits(document, code):
            return dict(document)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
