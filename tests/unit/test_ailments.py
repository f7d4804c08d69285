"""The ailments of tests/lab/ailments.py: each is of a check that there is, and says what that check says."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quietport.commands import Done
from quietport.docker_user import Fault, problems, rules
from quietport.doctor import docker, files, machine, units, updates
from quietport.doctor.model import Finding
from quietport.sshagent.names import PROGRAM
from tests.lab.ailments import (
    AILMENTS,
    BATCHES,
    SERVICE,
    SESSIONS,
    Ailment,
    Doctor,
    commands,
)
from tests.lab.story import SECRET_PATH
from tests.unit.doctor_place import DECLARED, NOW, World

OF_THE_OTHER_HALF = ("tailnet", "key-expiry", "firewall", "listeners", "ssh-sockets", "sshd")
OF_THIS_HALF = (
    *("docker", "compose", "published", "timers", "failed-units", "secrets", "sessions"),
    *("disk", "clock", "reboot", "updates", "dns"),
)
OURS = (docker, units, files, machine, updates)
BY_NAME = {one.name: one for one in AILMENTS}


def test_every_check_is_provoked_to_fail() -> None:
    assert {one.check for one in AILMENTS if one.status == "FAIL"} == {*OF_THE_OTHER_HALF, *OF_THIS_HALF}


def test_the_checks_of_this_half_have_these_names() -> None:
    checks = [check for module in OURS for check in module.CHECKS]
    assert tuple(check.name for check in checks) == OF_THIS_HALF
    assert {check.name for check in checks if check.slow} == {one.check for one in AILMENTS if one.slow}


def test_each_can_be_told_from_the_others() -> None:
    for key in ("name", "says"):
        counts = Counter(getattr(one, key) for one in AILMENTS)
        assert [what for what, count in counts.items() if count > 1] == []
    for one in AILMENTS:
        assert bool(one.provoke) != bool(one.admin), one.name
        mates = [other for other in AILMENTS if other.batch == one.batch and other.check == one.check]
        assert mates == [one], "what one check says of one thing is not mistaken for another"
    assert {one.batch for one in AILMENTS} == set(BATCHES)


@pytest.mark.parametrize("ailment", AILMENTS, ids=lambda one: one.name)
def test_what_is_typed_is_shell(ailment: Ailment) -> None:
    for text in (ailment.provoke, ailment.undo):
        subprocess.run(["sh", "-n", "-c", text], check=True)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["sh", "-n", "-c", "if"], check=True, capture_output=True)


def test_what_a_next_step_says_to_type() -> None:
    step = "`journalctl -u a.service` says why. On your machine: `quietport apply vps1`."
    assert commands(step) == ["journalctl -u a.service", "quietport apply vps1"]
    assert commands("Look at it.") == []


def test_a_report_is_asked_for_the_row_that_names_it() -> None:
    ailment = BY_NAME["a unit that failed"]
    row = {"check": "failed-units", "status": "FAIL", "reason": "lab-fails.service has failed (exit-code)."}
    said = Doctor(1, {"checks": [row, {**row, "check": "timers", "status": "PASS"}]})
    assert said.row_of(ailment) == row
    assert (said.is_well("failed-units"), said.is_well("timers"), said.is_well("dns")) == (False, True, False)
    for other in ({"status": "WARN"}, {"reason": "another"}, {"check": "timers"}):
        assert Doctor(1, {"checks": [{**row, **other}]}).row_of(ailment) is None


# --- the words, of the checks of this half ------------------------------------------------------------


def says(name: str, found: list[Finding]) -> Finding:
    """The finding that the ailment's test will look for."""
    ailment = BY_NAME[name]
    (named,) = [one for one in found if one.status == ailment.status and ailment.says in one.reason]
    return named


def test_what_docker_says(tmp_path: Path) -> None:
    world = World(tmp_path)
    declared = {**DECLARED, "docker_source": "debian"}
    world.units[docker.SERVICE] = {"ActiveState": "inactive"}
    found = says("the engine stopped", docker.docker(declared, place=world.place))
    assert commands(found.next_step)[-1] == "systemctl start docker.service"

    labels = {docker.PROJECT: "shop", docker.COMPOSE_SERVICE: "web"}
    stopped = {"Id": "0", "Names": [f"/{SERVICE}"], "State": "exited", "Labels": labels}
    shown = {"HostConfig": {"RestartPolicy": {"Name": "always"}}, "State": {"ExitCode": 143}}

    def ask(path: str) -> Any:
        return [stopped] if path.startswith("/containers/json") else shown

    world.process("dockerd")
    found = says("a service stopped", docker.compose(declared, place=world.place, ask=ask))
    assert commands(found.next_step)[-1] == f"docker start {SERVICE}"

    (chain,) = [place for place in docker.docker_user.PLACES if place.chain == "DOCKER-USER"]
    flushed = [Fault(f"iptables {line}") for line in problems(chain, f"-P FORWARD DROP\n{chain.jump}\n")]
    assert problems(chain, "\n".join([chain.jump, *rules(chain)])) == [], "the control"
    says(
        "DOCKER-USER flushed",
        docker.shielded(declared, place=world.place, faults=lambda: flushed, ask=ask),
    )


def test_what_units_say(tmp_path: Path) -> None:
    listed = "lab-fails.service loaded failed failed x\n"
    world = World(tmp_path, answers={"systemctl list-units": Done(0, listed, "")})
    declared = {**DECLARED, "timers": ["quietport-report.timer"]}
    world.units["quietport-report.timer"] = {"UnitFileState": "disabled", "ActiveState": "inactive"}
    found = says("a timer disabled", units.timers(declared, place=world.place))
    assert commands(found.next_step) == ["systemctl enable --now quietport-report.timer"]
    world.units["quietport-report.timer"] = {"LoadState": "not-found"}
    found = says("a timer removed", units.timers(declared, place=world.place))
    assert commands(found.next_step) == ["quietport apply vps1"]
    found = says("a unit that failed", units.failed_units(declared, place=world.place))
    assert commands(found.next_step)[-1] == "systemctl start lab-fails.service"


def test_what_files_say(tmp_path: Path) -> None:
    world = World(tmp_path)
    tmp_path.chmod(0o755)
    file = world.write(SECRET_PATH, "x", mode=0o644)
    declared = {**DECLARED, "secret_files": [SECRET_PATH]}
    says("a secret that all can read", files.secrets(declared, place=world.place))
    file.unlink()
    says("a secret removed", files.secrets(declared, place=world.place))
    assert SESSIONS.endswith(f".local/state/{PROGRAM}")


def test_what_the_machine_says(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(machine.LATEST, '{"schema": 1, "at": "2099-01-01T00:00:00+00:00"}')
    says("a result of another century", machine.clock(DECLARED, place=world.place, error=lambda: 0))
    due = world.write(machine.REBOOT_DUE)
    os.utime(due, (NOW - 15 * 86400,) * 2)
    found = says("a reboot that is overdue", machine.reboot(DECLARED, place=world.place))
    assert commands(found.next_step) == ["systemctl reboot"]


def test_what_is_slow_says(tmp_path: Path) -> None:
    summary = "0 upgraded, 0 newly installed, 0 to remove and 0 not upgraded.\n"
    world = World(tmp_path, answers={"apt-get": Done(0, summary, ""), "getent": Done(2, "", "")})
    for path in updates.STAMPS:
        os.utime(world.write(path), (NOW - 4 * 86400 - 60,) * 2)
    says("lists of packages that are four days old", updates.updates(DECLARED, place=world.place))
    declared = {**DECLARED, "login_server": "https://control.quietport.invalid"}
    found = says("a login server that nobody knows", updates.dns(declared, place=world.place))
    assert "quietport apply vps1" in commands(found.next_step)
