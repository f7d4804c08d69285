"""What a check says. A check is a function that reads the host, changes nothing, and answers in findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from quietport.errors import HostProgramError

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    `reason` is one sentence. `next_step`, of a WARN or FAIL, is what the operator types or does, so that the
    check passes afterwards; commands in it stand between backquotes.
    """

    status: Status
    reason: str
    next_step: str = ""


@dataclass(frozen=True)
class Check:
    """A check and its name in the table, the JSON, and the docs.

    `look` gets what host.json declares. It may raise HostProgramError: then it could not tell, or, with a
    CutShortError, not everything. A `slow` one needs more than a moment or the network; the timer runs it,
    and `quietport doctor` reads what that found.
    """

    name: str
    look: Callable[[Mapping[str, Any]], list[Finding]]
    slow: bool = False


class CutShortError(HostProgramError):
    """A check could not tell the rest, because of `why`; `found` is what it had found by then."""

    def __init__(self, why: Exception, found: Sequence[Finding]) -> None:
        self.why = why
        self.found = tuple(found)
        super().__init__(str(why))


@contextmanager
def keeping(found: Sequence[Finding]) -> Iterator[None]:
    """What is in `found` when the block cannot go on is told all the same. Raises CutShortError then."""
    try:
        yield
    except Exception as error:
        if not found:
            raise
        raise CutShortError(error, found) from error
