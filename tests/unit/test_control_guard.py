"""What a run makes of a guard it armed: confirmed, undone at once, or waited for until the host undid it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from control import guard
from control.errors import QuietportError, ReachError
from control.session import Result

TOKEN = "a1b2c3"
ROLLED_BACK = {"token": TOKEN, "how": "rolled back", "why": "asked", "log": ["/etc/ufw put back", "done"]}


@dataclass
class HostThere:
    """A host whose guard is armed, as its sessions see it."""

    history: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    rollback_works: bool = True
    confirm_says: str = ""
    armed: bool = True
    full: bool = False
    """Its disk: nothing is written down."""

    def answer(self, line: str) -> Result:
        words = line.split()[2:]
        self.asked.append(" ".join(words))
        if words[0] == "rollback":
            if not self.rollback_works:
                return Result(1, b"not as before: ufw\n", b"")
            self.armed = False
            if not self.full:
                self.history.insert(0, dict(ROLLED_BACK))
        if words[0] == "status":
            over = any(one["token"] == TOKEN for one in self.history)
            armed = {"token": TOKEN} if self.armed and not over else None
            return Result(0, json.dumps({"schema": 1, "armed": armed, "history": self.history}).encode(), b"")
        if words[0] == "confirm" and self.confirm_says:
            return Result(1, b"", self.confirm_says.encode())
        return Result(0, b"", b"")


@dataclass
class Line:
    """A session to it; `cut` when the link is gone."""

    host: HostThere
    cut: bool = False
    name: str = "vps1"

    @property
    def alive(self) -> bool:
        return not self.cut

    def run(self, line: str, *, timeout: float) -> Result:
        if self.cut:
            raise ReachError("vps1: the link is gone.")
        return self.host.answer(line)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(guard.time, "sleep", sleep)
    monkeypatch.setattr(guard, "_asked", set())
    guard.note("vps1", guard.Armed(token=TOKEN, until=20.0))
    return now


def no_way(name: str) -> Line:
    raise ReachError(f"{name}: nothing answers.")


def test_where_nothing_is_armed_nothing_is_asked(clock: list[float]) -> None:
    guard.note("vps1", None)
    there = HostThere()
    assert guard.give_up("vps1", Line(there), say=print) is None  # type: ignore[arg-type]
    assert there.asked == []


def test_what_is_not_confirmed_is_undone_now(clock: list[float]) -> None:
    there, said = HostThere(), list[str]()
    told = guard.give_up("vps1", Line(there), say=said.append)  # type: ignore[arg-type]
    assert told is not None
    assert "undone by the host's guard" in told
    assert said == ["/etc/ufw put back", "done"]
    assert there.asked == ["status --json", f"rollback {TOKEN}", "status --json"]
    assert guard.armed("vps1") is None


def test_a_host_that_undid_it_by_itself_is_not_asked_to(clock: list[float]) -> None:
    there = HostThere(history=[{"token": "older", "how": "confirmed"}, dict(ROLLED_BACK, why="timeout")])
    told = guard.give_up("vps1", Line(there), say=print)  # type: ignore[arg-type]
    assert told is not None
    assert "undone" in told
    assert there.asked == ["status --json"]


def test_a_confirmation_whose_answer_was_lost_counts(clock: list[float]) -> None:
    there = HostThere(history=[{"token": TOKEN, "how": "confirmed", "why": "", "log": []}])
    assert guard.give_up("vps1", Line(there), say=print) == "the change was confirmed and stays."  # type: ignore[arg-type]


def test_with_the_link_gone_it_comes_back_by_whichever_way_answers(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, tried = HostThere(), list[str]()

    def open_session(name: str) -> Line:
        tried.append(name)
        return no_way(name) if len(tried) < 4 else Line(there)

    monkeypatch.setattr(guard, "open_session", open_session)
    told = guard.give_up("vps1", Line(there, cut=True), say=print)  # type: ignore[arg-type]
    assert told is not None
    assert "undone" in told
    assert len(tried) == 4


def test_it_is_waited_for_until_a_while_after_its_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "open_session", no_way)
    told = guard.give_up("vps1", None, say=print)
    assert told is not None
    assert told.startswith("whether the change was undone is not known: nothing answers.")
    assert 20 + guard.ROLLBACK_S < clock[0] < 20 + guard.ROLLBACK_S + 2 * guard.AGAIN_S


def test_a_rollback_that_does_not_work_is_not_called_one(clock: list[float]) -> None:
    told = guard.give_up("vps1", Line(HostThere(rollback_works=False)), say=print)  # type: ignore[arg-type]
    assert told is not None
    assert told.startswith("whether the change was undone is not known: the host could not undo it: not as")


def test_a_host_whose_disk_is_full_has_undone_it_all_the_same(clock: list[float]) -> None:
    """A guard stays armed until everything is undone."""
    there, said = HostThere(full=True), list[str]()
    told = guard.give_up("vps1", Line(there), say=said.append)  # type: ignore[arg-type]
    assert told is not None
    assert "undone by the host's guard" in told
    assert said == ["the host could not write down what it did: is its disk full?"]
    assert clock[0] == 0


def test_without_a_word_of_it_a_confirmation_that_was_asked_for_is_not_ruled_out(clock: list[float]) -> None:
    there = HostThere(full=True, armed=False, confirm_says="cut off")
    with pytest.raises(ReachError):
        guard.confirm(Line(there), TOKEN)  # type: ignore[arg-type]
    told = guard.give_up("vps1", Line(there), say=print)  # type: ignore[arg-type]
    assert told is not None
    assert told.startswith("whether the change was undone is not known: ")


def test_a_refused_confirmation_says_why(clock: list[float]) -> None:
    there = HostThere(confirm_says="quietport guard: this session began before the guard was armed.\n")
    with pytest.raises(ReachError, match=r"not disarmed: .*this session began before"):
        guard.confirm(Line(there), TOKEN)  # type: ignore[arg-type]
    there.confirm_says = ""
    guard.confirm(Line(there), TOKEN)  # type: ignore[arg-type]
    assert there.asked == [f"confirm {TOKEN}"] * 2


def test_the_answer_of_arming_is_read() -> None:
    text = json.dumps({"schema": 1, "token": TOKEN, "left_s": 120})
    assert guard.parse_armed(text, now=5.0) == guard.Armed(token=TOKEN, until=125.0)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', "armed"])
def test_no_answer_is_no_guard(text: str) -> None:
    with pytest.raises(QuietportError, match="nothing was changed"):
        guard.parse_armed(text, now=0.0)
    with pytest.raises(QuietportError, match="status cannot be read"):
        guard.parse_status(text)
