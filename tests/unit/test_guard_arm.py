"""Arming on a host that does not show what it is, or breaks off half-way: nothing is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quietport import opened
from quietport.commands import Done
from quietport.guard import rollback, state
from quietport.guard.machine import GuardError, Log, Machine
from quietport.opened import Opened
from quietport.sshd_follow import PAUSED
from tests.unit.guard_world import World, left_in

SAVES = ("iptables-save", "ip6tables-save")


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.write("/proc/net/if_inet6", "00000000000000000000000000000001 01 80 10 80       lo\n")
    return made


def armed_on(world: World, program: str, answer: Done) -> Any:
    """Arm on a host on which `program` answers so."""

    def run(argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
        return answer if argv[0] == program else world(argv, stdin=stdin, timeout=timeout)

    return world.arm(machine=replace(world.machine, run=run))


@pytest.mark.parametrize("program", SAVES)
@pytest.mark.parametrize("failure", [Done(1, "", "it failed"), Done(127, "", "it took longer than 30 s.")])
def test_a_firewall_that_cannot_be_read_is_not_one_that_is_off(
    world: World, program: str, failure: Done
) -> None:
    with pytest.raises(GuardError, match=f"the firewall cannot be read: {program}"):
        armed_on(world, program, failure)
    assert left_in(world) == []
    assert world.timers == set()


@pytest.mark.parametrize("program", SAVES)
def test_a_host_without_the_program_has_no_such_firewall(world: World, program: str) -> None:
    assert armed_on(world, program, Done(127, "", f"{program} is not installed.")).token


def test_a_host_without_ipv6_need_not_show_its_firewall(world: World) -> None:
    world.write("/proc/net/if_inet6", "")
    assert armed_on(world, "ip6tables-save", Done(3, "", "no such protocol")).token


def test_a_rollback_that_cannot_read_the_firewall_has_not_put_it_back(world: World) -> None:
    armed = world.arm()
    world.fails["iptables-save"] = "it failed"
    assert rollback.roll_back(world.machine, armed.token, why="asked", log=Log(aloud=False)) is False
    assert state.read_armed(world.machine) is not None
    world.fails.clear()
    assert rollback.roll_back(world.machine, armed.token, why="asked", log=Log(aloud=False)) is True


def test_what_was_opened_by_hand_meanwhile_is_taken_back(world: World) -> None:
    armed = world.arm()
    opened.write(Opened(until=2e9), world.path)
    assert rollback.roll_back(world.machine, armed.token, why="asked", log=Log(aloud=False)) is True
    assert opened.read(world.path) is None
    assert not world.path(str(PAUSED)).exists()


def test_what_was_opened_by_hand_before_stays_noted(world: World) -> None:
    world.path("/etc/quietport").mkdir(exist_ok=True)
    opened.write(Opened(until=2e9, replaced=("deny 22/tcp",)), world.path)
    armed = world.arm()
    opened.forget(world.path)
    assert rollback.roll_back(world.machine, armed.token, why="asked", log=Log(aloud=False)) is True
    assert opened.read(world.path) == Opened(until=2e9, replaced=("deny 22/tcp",))
    assert world.path(str(PAUSED)).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_breaks_off_after_the_note_was_written_leaves_no_note(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    really = state.write_armed

    def write(machine: Machine, armed: Any) -> None:
        really(machine, armed)
        raise error

    monkeypatch.setattr(state, "write_armed", write)
    with pytest.raises((GuardError, KeyboardInterrupt)):
        world.arm()
    assert state.read_armed(world.machine) is None
    assert left_in(world) == []
    monkeypatch.undo()
    # The next one is not refused because of it.
    assert world.arm().token
