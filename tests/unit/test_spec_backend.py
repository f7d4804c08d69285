"""The specs' way to a host: a lost connection is made anew, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from control.session import LinkLost, Result
from tests.spec import backend
from tests.spec.backend import QuietportBackend


@dataclass
class Line:
    """A session that is lost after `lasts` commands."""

    lasts: int
    closed: bool = False
    ran: list[str] = field(default_factory=list)

    def run(self, line: str, *, stdin: bytes | None, timeout: float) -> Result:
        if len(self.ran) >= self.lasts:
            raise LinkLost("vps1: the connection to 192.0.2.1 is lost.")
        self.ran.append(line)
        return Result(0, b"here\n", b"")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Line]]:
    """The sessions that are opened one after the other."""
    coming: list[Line] = []
    left = iter(coming)
    monkeypatch.setattr(backend, "open_session", lambda name: next(left))
    yield coming
    QuietportBackend.close_all()


def test_a_lost_connection_is_made_anew(lines: list[Line]) -> None:
    lines += [Line(lasts=1), Line(lasts=5)]
    host = QuietportBackend("vps1")
    assert [host.run("true").stdout for _ in range(3)] == ["here\n"] * 3
    assert lines[0].closed
    assert len(lines[1].ran) == 2


def test_a_connection_that_is_lost_again_is_an_error(lines: list[Line]) -> None:
    lines += [Line(lasts=0), Line(lasts=0)]
    with pytest.raises(LinkLost):
        QuietportBackend("vps1").run("true")
