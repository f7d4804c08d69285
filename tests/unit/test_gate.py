"""The gate: shut unless a new login over the tailnet works, and the run goes on over that one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.command import FunctionCommand, StringCommand

from control import guard as control_guard
from control.errors import ReachError
from control.proof import Proof
from control.settings import HostSettings
from operations import gate, guard
from operations.common import program


@dataclass
class Connector:
    session: Any = None

    taken_by: str = ""

    def switch(self, session: Any) -> None:
        if self.taken_by:
            raise ReachError(f"vps1: the lock of this run was lost to {self.taken_by}.")
        self.session = session


@dataclass
class FakeHost:
    name: str = "vps1"
    print_prefix: str = ""
    connector: Connector = field(default_factory=Connector)
    tailnet: dict[str, Any] = field(default_factory=lambda: {"addresses": ["100.64.0.7"]})

    def get_fact(self, fact: Any) -> dict[str, Any]:
        return self.tailnet


@dataclass
class World:
    host: FakeHost
    proofs: list[tuple[str, Any]]
    clock: list[float]
    closed: list[str] = field(default_factory=list)
    ok: bool = True
    blocked: str | None = None

    def passes(self) -> bool:
        return gate._pass_gate(None, self.host)  # type: ignore[arg-type]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    gate.forget_proofs()
    guard.forget()
    control_guard.note("vps1", None)
    world = World(FakeHost(), [], [0.0])

    def prove(name: str, addresses: Any) -> Proof:
        world.proofs.append((name, addresses))
        close = partial(world.closed.append, "closed")
        session = SimpleNamespace(way="tailnet", close=close) if world.ok else None
        return Proof(ok=world.ok, sentence="vps1: it is said here", session=session)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "prove", prove)
    monkeypatch.setattr(gate, "settings_for", lambda name: HostSettings(address="192.0.2.1"))
    monkeypatch.setattr(gate.tailnet, "blocking_reason", lambda state, settings: world.blocked)
    monkeypatch.setattr(gate.time, "monotonic", lambda: world.clock[0])
    return world


def test_the_run_goes_on_over_the_proved_connection(world: World) -> None:
    world.host.connector.session = SimpleNamespace(way="public")
    assert world.passes()
    assert world.proofs == [("vps1", ["100.64.0.7"])]
    assert gate.reached_by(world.host) == "tailnet"  # type: ignore[arg-type]


def test_a_proof_lasts_a_minute(world: World) -> None:
    assert world.passes()
    world.clock[0] = 59
    assert world.passes()
    assert len(world.proofs) == 1
    world.clock[0] = 61
    assert world.passes()
    assert len(world.proofs) == 2


def test_a_fresh_proof_does_not_count_for_a_run_that_goes_the_public_way(world: World) -> None:
    assert world.passes()
    world.host.connector.session = SimpleNamespace(way="public")
    assert world.passes()
    assert len(world.proofs) == 2


def test_without_a_proof_it_stays_shut(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.ok = False
    with caplog.at_level("ERROR", logger="pyinfra"):
        assert not world.passes()
    assert world.host.connector.session is None
    assert "vps1: refused: it is said here" in caplog.text


def test_a_host_that_another_controller_took_stays_as_it_is(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.host.connector.taken_by = "root@box"
    with caplog.at_level("ERROR", logger="pyinfra"):
        assert not world.passes()
    assert "vps1: refused: the lock of this run was lost to root@box." in caplog.text
    assert world.closed == ["closed"]


def test_a_tailnet_that_will_not_last_is_not_even_tried(world: World) -> None:
    assert world.passes()
    world.blocked = "the node's key expires tomorrow"
    assert not world.passes()
    assert len(world.proofs) == 1


def test_every_risky_command_comes_after_the_proof_and_the_guard_and_has_a_limit(world: World) -> None:
    commands = [StringCommand("ufw", "enable"), StringCommand("slow", _timeout=600)]
    proof, arm, *risky = gate.risky(world.host, commands)  # type: ignore[arg-type]
    assert isinstance(proof, FunctionCommand)
    assert proof.function is gate._pass_gate
    assert isinstance(arm, FunctionCommand)
    assert (arm.function, arm.args) == (guard.arm, (300,))
    assert [command.connector_arguments["_timeout"] for command in risky] == [120, 600]
    assert guard._planned == {"vps1"}


def test_with_the_guard_armed_every_risky_command_runs_under_it(world: World) -> None:
    _, _, *before = gate.risky(world.host, [StringCommand("ufw", "enable")])  # type: ignore[arg-type]
    assert [str(command) for command in before] == ["ufw enable"]
    control_guard.note("vps1", control_guard.Armed(token="a1b2", until=9.0))
    commands = [program("sh", "-c", "echo 'a  b'; $x", stdin=b"plan"), StringCommand("ufw", "enable")]
    _, _, *after = gate.risky(world.host, commands)  # type: ignore[arg-type]
    fence = "/usr/local/sbin/quietport guard exec a1b2 --"
    assert [str(command) for command in after] == [
        f"{fence} sh -c 'echo '\"'\"'a  b'\"'\"'; $x'",
        f"{fence} ufw enable",
    ]
    assert after[0].connector_arguments["_stdin"] == b"plan"


@pytest.mark.parametrize("way", ["public", "tailnet"])
def test_some_steps_are_risky_only_over_the_tailnet(world: World, way: str) -> None:
    world.host.connector.session = SimpleNamespace(way=way)
    steps = [StringCommand("x", _timeout=900), StringCommand("y")]
    done = list(gate.risky_if_tailnet(world.host, steps))  # type: ignore[arg-type]
    if way == "public":
        assert done == steps
        return
    functions = [one.function for one in done if isinstance(one, FunctionCommand)]
    assert functions == [gate._pass_gate, guard.arm, guard.proven]
    arm = done[1]
    assert isinstance(arm, FunctionCommand)
    # An upgrade is not broken off for want of time.
    assert arm.args == (900 + gate.PROOF_TIME_S,)
    # It ends its own transaction; the last one has nothing to prove for it.
    assert guard._planned == set()
