"""The doctor's look at timers and at units that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.settings import HostSettings
from deploys import packages, timers
from deploys.programs import timer_names
from quietport.commands import Done
from quietport.doctor import units
from quietport.doctor.model import CutShortError
from quietport.doctor.units import failed_units, marked_timers, parse_failed
from quietport.errors import HostProgramError
from tests.unit.doctor_place import DECLARED, World, commands, only, statuses

REPORT = "quietport-report"
WITH_TIMERS = {**DECLARED, "timers": [f"{REPORT}.timer", "apt-daily.timer"]}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    for name in WITH_TIMERS["timers"]:
        world.units[name] = {"SubState": "waiting"}
        world.units[name.replace(".timer", ".service")] = {
            "ActiveState": "inactive",
            "UnitFileState": "static",
        }
    world.units[units.BOOT_UNIT] = {"ActiveState": "inactive"}
    return world


def change(world: World, name: str, **state: str) -> None:
    world.units[name] = {**world.units.get(name, {}), **state}


def test_all_is_well_and_one_question_is_enough(world: World) -> None:
    found = only(units.timers(WITH_TIMERS, place=world.place), "PASS")
    assert f"{REPORT}.timer, apt-daily.timer" in found.reason
    assert len(world.asked) == 1


@pytest.mark.parametrize(
    ("name", "state", "typed"),
    [
        (f"{REPORT}.timer", {"UnitFileState": "disabled"}, f"systemctl enable --now {REPORT}.timer"),
        (f"{REPORT}.timer", {"ActiveState": "inactive"}, f"systemctl enable --now {REPORT}.timer"),
        (f"{REPORT}.timer", {"SubState": "elapsed"}, f"systemctl restart {REPORT}.timer"),
        (f"{REPORT}.timer", {"LoadState": "not-found"}, "quietport apply vps1"),
        ("apt-daily.timer", {"LoadState": "masked"}, "systemctl unmask apt-daily.timer"),
        (
            f"{REPORT}.service",
            {"Result": "exit-code", "ExecMainStatus": "1"},
            f"systemctl start {REPORT}.service",
        ),
        (f"{REPORT}.service", {"LoadState": "masked"}, f"systemctl unmask {REPORT}.service"),
        (units.FOLLOWER, {"ActiveState": "failed"}, f"systemctl enable --now {units.FOLLOWER}"),
        (units.BOOT_UNIT, {"UnitFileState": "disabled"}, f"systemctl enable {units.BOOT_UNIT}"),
    ],
)
def test_what_is_not_as_declared(world: World, name: str, state: dict[str, str], typed: str) -> None:
    change(world, name, **state)
    found = only(units.timers(WITH_TIMERS, place=world.place), "FAIL")
    assert name in found.reason
    assert typed in commands(found)


def test_what_systemd_has_not_read(world: World) -> None:
    change(world, f"{REPORT}.service", NeedDaemonReload="yes")
    assert commands(only(units.timers(WITH_TIMERS, place=world.place), "WARN")) == ["systemctl daemon-reload"]


def test_each_thing_that_is_wrong_is_told(world: World) -> None:
    change(world, f"{REPORT}.timer", UnitFileState="disabled")
    change(world, "apt-daily.service", Result="timeout")
    assert statuses(units.timers(WITH_TIMERS, place=world.place)) == ["FAIL", "FAIL"]


def test_an_older_host_json_names_no_timers(world: World) -> None:
    only(units.timers(DECLARED, place=world.place), "SKIP")
    world.write(f"{units.UNIT_FOLDER}/{REPORT}.timer", "# Written by quietport.\n[Timer]\n")
    world.write(f"{units.UNIT_FOLDER}/quietport-own.timer", "[Timer]\n")
    assert marked_timers(world.root / "etc/systemd/system") == [f"{REPORT}.timer"]
    assert "apt" not in only(units.timers(DECLARED, place=world.place), "PASS").reason


def test_systemd_that_does_not_answer_is_not_fine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_show", lambda self, argv: "Id=x\n")
    with pytest.raises(HostProgramError):
        units.timers(WITH_TIMERS, place=world.place)


@pytest.mark.parametrize("upgrades", [True, False])
def test_host_json_names_the_timers_that_are_made(upgrades: bool) -> None:
    settings = HostSettings(address="203.0.113.7", agent_users=("agent", "b"), unattended_upgrades=upgrades)
    names = timer_names(settings)
    assert {f"{timer.unit}.timer" for timer in timers.TIMERS} <= set(names)
    assert {"quietport-agent-prune-agent.timer", "quietport-agent-prune-b.timer"} <= set(names)
    assert (set(packages.TIMERS) <= set(names)) is upgrades


# --- units that failed --------------------------------------------------------------------------------

LISTED = "systemctl list-units"
TWO = (
    "quietport-report.service loaded failed failed quietport: report\n"
    "dev-disk-by\\x2dlabel-a.swap not-found failed failed /dev/disk/by-label/a\n"
)


def test_no_unit_has_failed(tmp_path: Path) -> None:
    world = World(tmp_path, answers={LISTED: Done(0, "", "")})
    only(failed_units(DECLARED, place=world.place), "PASS")
    assert len(world.asked) == 1


def test_a_unit_that_failed_is_started_again_and_one_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, answers={LISTED: Done(0, TWO, "")})
    gone = "dev-disk-by\\x2dlabel-a.swap"
    world.units["quietport-report.service"] = {"Result": "exit-code"}
    world.units[gone] = {"LoadState": "not-found"}
    first, second = failed_units(DECLARED, place=world.place)
    assert (first.status, second.status) == ("FAIL", "FAIL")
    assert first.reason == "quietport-report.service has failed (exit-code)."
    assert commands(first)[-2:] == [
        "systemctl reset-failed quietport-report.service",
        "systemctl start quietport-report.service",
    ]
    assert commands(second)[-1] == f"systemctl reset-failed '{gone}'"


def test_units_that_failed_are_told_also_when_systemd_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, answers={LISTED: Done(0, TWO, "")})
    monkeypatch.setattr(World, "_show", lambda self, argv: "")
    with pytest.raises(CutShortError) as caught:
        failed_units(DECLARED, place=world.place)
    assert statuses(caught.value.found) == ["FAIL", "FAIL"]
    assert caught.value.found[0].reason == "quietport-report.service has failed (unknown)."


def test_a_unit_of_a_moment_is_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, answers={LISTED: Done(0, "run-u1.service loaded failed failed x\n", "")})
    world.units["run-u1.service"] = {"Transient": "yes"}
    assert commands(only(failed_units(DECLARED, place=world.place), "FAIL"))[-1].startswith(
        "systemctl reset-failed"
    )


@pytest.mark.parametrize(
    "done", [Done(1, "", "Failed to connect to bus"), Done(0, "garbage\n", ""), Done(0, "a b c d", "")]
)
def test_a_list_that_is_not_understood_is_not_fine(done: Done) -> None:
    with pytest.raises(HostProgramError):
        parse_failed(done)


@given(st.text(max_size=200))
def test_whatever_is_listed_is_names_or_refused(text: str) -> None:
    try:
        names = parse_failed(Done(0, text, ""))
    except HostProgramError:
        return
    assert len(names) == len([line for line in text.splitlines() if line.split()])
