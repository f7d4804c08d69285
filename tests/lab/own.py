"""Labs that belong to one module of tests, and those of them that are told beside other tests.

Lockout, guard, follower, the other ways in and the doctor are mostly waits: the lockout matrix begins with
the stories, the others with the faults around the host; they are asked for when everything else that needs
this thread is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.lab.story import Lab

# Set on each test that failed, whatever part of it.
FAILED: pytest.StashKey[bool] = pytest.StashKey()


@contextlib.contextmanager
def own_lab(word: str, session: pytest.Session, *, asked_by: str) -> Iterator[Lab]:
    """A lab that goes in the end, unless a test that asks for the fixture `asked_by` failed: it then stays,
    with its logs."""
    lab = Lab.new(word)
    try:
        yield lab
    except BaseException:
        lab.collect()
        raise
    tests = [item for item in session.items if asked_by in getattr(item, "fixturenames", ())]
    if any(item.stash.get(FAILED, False) for item in tests):
        lab.collect()
    else:
        lab.down()


@dataclass
class Waits:
    """What goes on in the background, by the name of the fixture that asks for it."""

    session: pytest.Session
    pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)
    labs: dict[str, contextlib.ExitStack] = field(default_factory=dict)
    begun: dict[str, Future[Any]] = field(default_factory=dict)

    def begin(self, word: str, act: Callable[[Lab], Any]) -> None:
        """Begin `act`, in a lab of its own, if a selected test asks for it."""
        if not any(word in getattr(item, "fixturenames", ()) for item in self.session.items):
            return
        self.labs[word] = contextlib.ExitStack()
        lab = self.labs[word].enter_context(own_lab(word, self.session, asked_by=word))
        self.begun[word] = self.pool.submit(act, lab)

    def told(self, word: str) -> Any:
        """What the act came to, waited for; what it raised, it raises."""
        return self.begun[word].result()

    def leave(self, word: str) -> None:
        """Nobody asks for it any more."""
        if word in self.labs:
            # A lab does not go while its hosts are still being made.
            self.begun[word].exception()
            self.labs.pop(word).close()

    def close(self) -> None:
        """Leave what is left."""
        for word in list(self.labs):
            self.leave(word)
        self.pool.shutdown()
