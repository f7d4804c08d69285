"""Arming, and the proof that disarms: what a host is asked, and what is said when it goes wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.command import FunctionCommand
from pyinfra.api.exceptions import FactProcessError
from pyinfra.connectors.util import CommandOutput, OutputLine

from control import guard as there
from control.connector import Unanswered
from control.errors import ReachError
from control.proof import Proof
from facts.guard import Guard
from operations import guard, proven

ARMED = json.dumps({"schema": 1, "token": "a1b2", "since": "2026-11-21 10:02:11", "left_s": 120})


@dataclass
class FakeHost:
    """A host that answers `guard arm` and changes over to another session."""

    name: str = "vps1"
    print_prefix: str = ""
    installed: bool = True
    answer: tuple[bool, CommandOutput] = (True, CommandOutput([OutputLine("stdout", ARMED)]))
    asked: list[str] = field(default_factory=list)
    sessions: list[Any] = field(default_factory=list)
    lost_to: str = ""
    state: Any = None

    @property
    def connector(self) -> FakeHost:
        return self

    def switch(self, session: Any) -> None:
        if self.lost_to:
            raise ReachError(f"vps1: the lock of this run was lost to {self.lost_to}.")
        self.sessions.append(session)

    def get_fact(self, fact: Any) -> dict[str, Any]:
        return {"installed": self.installed, "armed": None, "addresses": ["100.64.0.7"]}

    def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, CommandOutput]:
        self.asked.append(str(command))
        return self.answer


@pytest.fixture
def host() -> FakeHost:
    guard.forget()
    there.note("vps1", None)
    return FakeHost()


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the new login is like, and what it is used for."""
    world: dict[str, Any] = {"ok": True, "closed": [], "confirmed": []}
    session = SimpleNamespace(name="vps1", way="tailnet", close=lambda: world["closed"].append(1))

    def prove(name: str, addresses: Any) -> Proof:
        sentence = f"{name}: it is said here."
        return Proof(ok=True, sentence=sentence, session=session) if world["ok"] else Proof(False, sentence)  # type: ignore[arg-type]

    def confirm(over: Any, token: str) -> None:
        if problem := world.get("problem"):
            raise ReachError(problem)
        world["confirmed"].append((over, token))

    monkeypatch.setattr(guard, "prove", prove)
    monkeypatch.setattr(there, "confirm", confirm)
    world["session"] = session
    return world


def arm(host: FakeHost) -> bool:
    return guard.arm(None, host, 120)  # type: ignore[arg-type]


def test_it_is_armed_once_a_transaction(host: FakeHost) -> None:
    assert arm(host)
    assert arm(host)
    assert len(host.asked) == 1
    assert host.asked[0].startswith("/usr/local/sbin/quietport guard arm --timeout 120 --by 'converge of ")
    assert host.asked[0].endswith("--json")
    armed = there.armed("vps1")
    assert armed is not None
    assert armed.token == "a1b2"


def test_nothing_risky_is_done_without_a_guard(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.installed = False
    assert not arm(host)
    assert "vps1: failed: `quietport guard status` does not answer there" in caplog.text
    assert host.asked == []
    assert there.armed("vps1") is None


def test_a_guard_that_refuses_ends_the_run_for_the_host(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    said = "quietport guard: a guard of anna is armed since 10:02."
    host.answer = (False, CommandOutput([OutputLine("stderr", said)]))
    assert not arm(host)
    told = "vps1: failed: a guard of anna is armed since 10:02. Then run again; nothing was changed."
    assert told in caplog.text
    assert there.armed("vps1") is None


def test_a_link_that_is_lost_while_arming_is_said_as_such(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.answer = (False, Unanswered("vps1", [], "the link is gone. Run again."))
    assert not arm(host)
    assert "vps1: failed: the link is gone. Run again. Nothing was changed; a guard that" in caplog.text
    assert there.armed("vps1") is None


def test_an_answer_that_is_none_is_not_taken_for_a_guard(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.answer = (True, CommandOutput([OutputLine("stdout", "armed")]))
    assert not arm(host)
    assert "vps1: failed: the guard's answer cannot be read" in caplog.text


def test_the_new_login_disarms_and_carries_on(host: FakeHost, proofs: dict[str, Any]) -> None:
    arm(host)
    assert guard.prove_and_confirm(host)  # type: ignore[arg-type]
    assert proofs["confirmed"] == [(proofs["session"], "a1b2")]
    assert host.sessions == [proofs["session"]]
    assert there.armed("vps1") is None


def test_without_a_guard_there_is_nothing_to_prove(host: FakeHost, proofs: dict[str, Any]) -> None:
    assert guard.prove_and_confirm(host)  # type: ignore[arg-type]
    assert host.sessions == []


@pytest.mark.parametrize("what", ["no login", "lock lost", "policy", "not confirmed"])
def test_what_is_not_proven_stays_armed(
    host: FakeHost, proofs: dict[str, Any], caplog: pytest.LogCaptureFixture, what: str
) -> None:
    arm(host)
    found: list[str] = []
    if what == "no login":
        proofs["ok"] = False
    elif what == "lock lost":
        host.lost_to = "root@box"
    elif what == "policy":
        found = ["the firewall is not active", "sshd listens on 0.0.0.0:22"]
    else:
        proofs["problem"] = "vps1: the guard was not disarmed: too late."

    def proven_now(state: Any, host: Any) -> bool:
        return guard.prove_and_confirm(host, problems=lambda: found)

    assert not guard.one_host_at_most(proven_now)(None, host)  # type: ignore[arg-type]
    assert proofs["confirmed"] == []
    assert there.armed("vps1") is not None
    wanted = {
        "no login": "vps1: failed: the change is not proven, so the guard undoes it: it is said here.",
        "lock lost": "the change is not proven, so the guard undoes it: the lock of this run was lost",
        "policy": "the guard undoes it: the firewall is not active; sshd listens on 0.0.0.0:22.",
        "not confirmed": "vps1: failed: the guard was not disarmed: too late.",
    }
    assert wanted[what] in caplog.text


def test_the_last_step_changes_something_only_where_something_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "executing", lambda: False)
    host: Any = FakeHost()
    guard.forget()
    assert not guard.waiting(host)
    guard.will_be_armed("vps1")
    assert guard.waiting(host)
    # What a plan expected is not what a run has done.
    monkeypatch.setattr(guard, "executing", lambda: True)
    there.note("vps1", None)
    assert not guard.waiting(host)
    there.note("vps1", there.Armed(token="a1b2", until=0))
    assert guard.waiting(host)


def test_the_policy_is_read_before_it_is_confirmed(
    host: FakeHost, proofs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(host)
    order: list[str] = []

    def not_as_wanted(what: str) -> list[str]:
        order.append(f"{what} over {len(host.sessions)} new, confirmed {len(proofs['confirmed'])}")
        return []

    monkeypatch.setattr(
        proven.sshd, "not_as_wanted", lambda user, *, break_glass: not_as_wanted(f"sshd of {user}")
    )
    monkeypatch.setattr(proven.ufw, "not_as_wanted", lambda **options: not_as_wanted("ufw"))
    assert proven._prove(None, host, "admin", False, [])  # type: ignore[arg-type]
    assert order == ["sshd of admin over 1 new, confirmed 0", "ufw over 1 new, confirmed 0"]
    assert len(proofs["confirmed"]) == 1


def test_a_step_of_its_own_is_proven_by_the_login_alone(host: FakeHost, proofs: dict[str, Any]) -> None:
    arm(host)
    command = FunctionCommand(guard.proven, (), {})
    assert command.function(None, host, *command.args)
    assert len(proofs["confirmed"]) == 1


def test_a_guard_that_is_armed_and_does_not_answer_is_not_one_that_is_not_there() -> None:
    failed = ["##status", "|", "|3", "##left", "|", "|0"]
    with pytest.raises(FactProcessError, match="a guard is armed there"):
        Guard().process(failed)
    assert Guard().process([*failed[:-1], "|1"]) == {"installed": False, "armed": None}
