"""The doctor's look at pending security updates and at names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploys.packages import UPGRADES_PATH, upgrades_text
from quietport.commands import Done
from quietport.doctor import updates as checks
from quietport.doctor.model import Check, Finding
from quietport.doctor.place import LATEST, Place
from quietport.doctor.run import run, state_of
from quietport.doctor.updates import dns, parse_simulation, parse_upgradable, updates
from quietport.errors import HostProgramError
from tests.unit.doctor_place import DECLARED, NOW, World, commands, only, statuses

AGAIN = "systemctl start quietport-doctor.service"
APT = "apt-get"
NOTHING = "Reading package lists...\n0 upgraded, 0 newly installed, 0 to remove and 0 not upgraded.\n"
# As apt 2.6 and 2.7 print it.
BOOKWORM = """Reading package lists...
The following packages will be upgraded:
  base-files libssl3 perl
3 upgraded, 0 newly installed, 0 to remove and 2 not upgraded.
Inst base-files [12.4] (12.4+deb12u9 Debian:12.9/stable [amd64])
Inst libperl5.36 [5.36.0-7+u2] (5.36.0-7+u4 Debian-Security:12/oldstable-security [amd64]) [perl:amd64 ]
Inst libssl3 [3.0.15-1~u1] (3.0.16-1~u1 Debian:12.9/stable, Debian-Security:12/stable-security [amd64])
Conf base-files (12.4+deb12u9 Debian:12.9/stable [amd64])
"""
NOBLE = """3 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.
Inst openssl [3.0.13-0u3.4] (3.0.13-0u3.5 Ubuntu:24.04/noble-updates, Ubuntu:24.04/noble-security [amd64])
Inst tzdata [2024a] (2025a Ubuntu:24.04/noble-updates [all])
Inst docker-ce [5:27.0] (5:28.0 Docker CE:trixie/trixie [amd64])
Inst linux-image-6.8.0-60-generic (6.8.0-60.63 Ubuntu:24.04/noble-security [amd64])
"""
KEPT = """Reading package lists...
The following packages have been kept back:
  openssl
0 upgraded, 0 newly installed, 0 to remove and 1 not upgraded.
"""
# As apt 2.6 lists it: what would be upgraded, and what is on hold, does not fit or is not rolled out yet.
ORDINARY = """Listing...
bash/oldstable 5.2.15-2+b13 amd64 [upgradable from: 5.2.15-2+b8]
docker-ce/bookworm 5:28.0 amd64 [upgradable from: 5:27.0]
libperl5.36/oldstable-security 5.36.0-7+u4 amd64 [upgradable from: 5.36.0-7+u2]
libssl3/stable,stable-security 3.0.16-1~u1 amd64 [upgradable from: 3.0.15-1~u1]
tzdata/noble-updates 2025a all [upgradable from: 2024a]
"""
HELD = "openssl/stable-security 3.0.16-1~u1 amd64 [upgradable from: 3.0.15-1~u1]\n"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A host whose lists are of today, and that upgrades by itself."""
    world = World(tmp_path, answers={APT: Done(0, NOTHING, ""), "apt": Done(0, ORDINARY, "")})
    for path in (
        checks.UNATTENDED,
        *checks.STAMPS[:1],
        f"{checks.LISTS}/a_InRelease",
        f"{checks.LISTS}/partial/x",
    ):
        world.write(path)
    world.write(checks.PERIODIC, upgrades_text(enabled=True, sites=()))
    aged(world, 0.5)
    return world


def aged(world: World, days: float) -> None:
    """Every time by which lists are judged."""
    lists = world.root / checks.LISTS.lstrip("/")
    for path in (*(world.root / stamp.lstrip("/") for stamp in checks.STAMPS), *lists.iterdir(), lists):
        if path.exists():
            os.utime(path, (NOW - days * 86400, NOW - days * 86400))


def last_said(world: World, reason: str, check: str = "updates") -> None:
    world.write(LATEST, json.dumps({"schema": 1, "checks": [{"check": check, "reason": reason}]}))


def stamp(days: float) -> str:
    return datetime.fromtimestamp(NOW - days * 86400, UTC).isoformat(timespec="seconds")


def test_nothing_waits(world: World) -> None:
    only(updates(DECLARED, place=world.place), "PASS")
    assert world.asked == [list(checks.SIMULATE)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (NOTHING, []),
        (BOOKWORM, ["libperl5.36", "libssl3"]),
        (NOBLE, ["openssl", "linux-image-6.8.0-60-generic"]),
        (NOTHING + "Inst a [1] (2 Not-Debian-Security:1/stable [amd64])\n", []),
        (NOTHING + "Inst a [1] (2 Debian-Security:1/stable [amd64])\n", ["a"]),
    ],
)
def test_what_is_a_security_update(text: str, names: list[str]) -> None:
    assert parse_simulation(text) == names


@pytest.mark.parametrize(
    "text", ["", "garbage", "E: Could not open lock file", NOTHING + "Inst something else\n"]
)
def test_what_is_not_understood_is_not_fine(text: str) -> None:
    with pytest.raises(HostProgramError):
        parse_simulation(text)


@given(st.text(max_size=300), st.booleans())
def test_whatever_apt_prints_is_names_or_refused(text: str, answered: bool) -> None:
    try:
        found = parse_simulation((NOTHING if answered else "") + text)
    except HostProgramError:
        return
    assert all(name.isprintable() for name in found)


def test_apt_that_fails_could_not_tell(world: World) -> None:
    world.answers[APT] = Done(100, NOTHING, "E: broken")
    with pytest.raises(HostProgramError, match="broken"):
        updates(DECLARED, place=world.place)


def test_what_waits_is_a_warning_first_and_keeps_its_time(world: World) -> None:
    world.answers[APT] = Done(0, BOOKWORM, "")
    first = only(updates(DECLARED, place=world.place), "WARN")
    assert first.reason == f"Security updates pending since {stamp(0)}: libperl5.36, libssl3."
    assert commands(first) == ["apt-get update", "unattended-upgrade", AGAIN]
    last_said(world, first.reason)
    later = Place(root=world.root, run=world.run, wall=lambda: NOW + 3600)
    assert only(updates(DECLARED, place=later), "WARN").reason == first.reason


@pytest.mark.parametrize(("days", "status"), [(2.9, "WARN"), (3.1, "FAIL"), (-1, "WARN")])
def test_what_waits_for_long_is_a_failure(world: World, days: float, status: str) -> None:
    world.answers[APT] = Done(0, BOOKWORM, "")
    last_said(world, f"Security updates pending since {stamp(days)}: openssl.")
    only(updates(DECLARED, place=world.place), status)
    last_said(world, f"Security updates pending since {stamp(days)}: openssl.", check="dns")
    only(updates(DECLARED, place=world.place), "WARN")


@pytest.mark.parametrize(
    "reason", ["", "No security update waits.", "pending since then: x", "pending since "]
)
def test_a_last_result_that_says_no_time(world: World, reason: str) -> None:
    world.answers[APT] = Done(0, BOOKWORM, "")
    last_said(world, reason)
    assert f"since {stamp(0)}" in only(updates(DECLARED, place=world.place), "WARN").reason


def test_without_unattended_upgrades_apt_is_asked(world: World) -> None:
    (world.root / checks.UNATTENDED.lstrip("/")).unlink()
    world.answers[APT] = Done(0, NOBLE, "")
    assert "apt-get -y dist-upgrade" in commands(only(updates(DECLARED, place=world.place), "WARN"))


def test_many_packages_are_cut(world: World) -> None:
    lines = "".join(f"Inst p{n} [1] (2 Debian-Security:12/stable-security [all])\n" for n in range(9))
    world.answers[APT] = Done(0, NOTHING + lines, "")
    assert only(updates(DECLARED, place=world.place), "WARN").reason.endswith("p4 and 4 more.")


# --- held back ----------------------------------------------------------------------------------------


def test_a_security_update_that_is_held_back_is_a_warning(world: World) -> None:
    """apt-get has no Inst line for it."""
    assert parse_simulation(KEPT) == []
    world.answers = {APT: Done(0, KEPT, ""), "apt": Done(0, f"Listing...\n{HELD}", "")}
    found = only(updates(DECLARED, place=world.place), "WARN")
    assert found.reason == "Security updates are held back: openssl."
    assert commands(found) == ["apt-mark showhold", "apt list --upgradable", AGAIN]
    assert world.asked == [list(checks.SIMULATE), list(checks.UPGRADABLE)]


def test_what_is_left_and_is_no_security_update_is_fine(world: World) -> None:
    """On hold, or an update that Ubuntu rolls out by and by: security updates are never among those."""
    ordinary = "".join(line for line in ORDINARY.splitlines(keepends=True) if "-security" not in line)
    world.answers = {APT: Done(0, KEPT, ""), "apt": Done(0, ordinary, "")}
    only(updates(DECLARED, place=world.place), "PASS")


def test_what_waits_and_what_is_held_back_are_two_things(world: World) -> None:
    """Of BOOKWORM's two that are not upgraded one is a security update; what is upgraded is not held back."""
    world.answers = {APT: Done(0, BOOKWORM, ""), "apt": Done(0, ORDINARY + HELD, "")}
    waits, held = updates(DECLARED, place=world.place)
    assert [waits.status, held.status] == ["WARN", "WARN"]
    assert waits.reason.endswith(": libperl5.36, libssl3.")
    assert held.reason == "Security updates are held back: openssl."
    # The next run still finds since when the others wait.
    world.write(LATEST, json.dumps({"schema": 1, "checks": [{"check": "updates", "reason": held.reason}]}))
    assert f"since {stamp(0)}" in updates(DECLARED, place=world.place)[0].reason


def test_an_architecture_is_not_another_package(world: World) -> None:
    text = KEPT + "Inst openssl:i386 [1] (2 Debian-Security:12/stable-security [i386])\n"
    world.answers = {APT: Done(0, text, ""), "apt": Done(0, HELD + HELD.replace("amd64", "i386"), "")}
    assert "openssl:i386" in only(updates(DECLARED, place=world.place), "WARN").reason
    assert parse_upgradable(HELD * 2) == ["openssl"]


def test_many_that_are_held_back_are_cut(world: World) -> None:
    many = "".join(HELD.replace("openssl", f"p{number}") for number in range(9))
    world.answers = {APT: Done(0, KEPT, ""), "apt": Done(0, many, "")}
    assert only(updates(DECLARED, place=world.place), "WARN").reason.endswith("p4 and 4 more.")


@pytest.mark.parametrize(
    "done", [Done(100, "", "E: broken"), Done(0, "Listing...\n", ""), Done(0, "what", "")]
)
def test_what_is_held_back_and_cannot_be_told_is_not_fine(world: World, done: Done) -> None:
    world.answers = {APT: Done(0, KEPT, ""), "apt": done}
    with pytest.raises(HostProgramError):
        updates(DECLARED, place=world.place)


# --- lists --------------------------------------------------------------------------------------------


def test_lists_that_are_old(world: World) -> None:
    aged(world, 4)
    found = only(updates(DECLARED, place=world.place), "FAIL")
    assert "4 days old" in found.reason
    assert commands(found)[0] == "systemctl start apt-daily.service"
    assert commands(found)[-1] == AGAIN


@pytest.mark.parametrize("path", [*checks.STAMPS, f"{checks.LISTS}/a_InRelease"])
def test_any_of_these_says_that_they_are_new(world: World, path: str) -> None:
    aged(world, 4)
    file = world.write(path)
    os.utime(file.parent, (NOW - 4 * 86400,) * 2)
    os.utime(file, (NOW, NOW))
    only(updates(DECLARED, place=world.place), "PASS")


def test_a_try_counts_only_where_nothing_writes_down_what_came_of_it(world: World) -> None:
    aged(world, 4)
    partial = world.root / checks.LISTS.lstrip("/") / "partial"
    os.utime(partial, (NOW, NOW))
    only(updates(DECLARED, place=world.place), "FAIL")
    world.write(checks.PERIODIC, upgrades_text(enabled=False, sites=()))
    only(updates(DECLARED, place=world.place), "PASS")
    aged(world, 4)
    assert commands(only(updates(DECLARED, place=world.place), "FAIL")) == ["apt-get update", AGAIN]


def test_lists_of_the_future_or_none(world: World) -> None:
    aged(world, -2)
    assert "are not there" in only(updates(DECLARED, place=world.place), "FAIL").reason


def test_old_lists_and_what_waits_are_two_things(world: World) -> None:
    aged(world, 4)
    world.answers[APT] = Done(0, BOOKWORM, "")
    assert statuses(updates(DECLARED, place=world.place)) == ["FAIL", "WARN"]


def test_old_lists_are_told_also_when_apt_cannot_tell(world: World) -> None:
    aged(world, 4)
    world.answers[APT] = Done(100, "", "E: broken")
    rows = run([Check("updates", lambda declared: updates(declared, place=world.place))], DECLARED)["updates"]
    assert [(one.status, one.told) for one in rows] == [("FAIL", True), ("SKIP", False)]
    assert "4 days old" in rows[0].reason and "E: broken" in rows[1].reason
    assert state_of(rows) == "fail"


def test_the_file_that_the_converge_writes_is_the_one_that_is_read() -> None:
    assert checks.PERIODIC == UPGRADES_PATH


# --- names --------------------------------------------------------------------------------------------

GETENT = "getent"


def named(world: World, server: Any) -> list[Finding]:
    return dns({**DECLARED, "login_server": server}, place=world.place)


def test_a_name_that_is_found(world: World) -> None:
    world.answers[GETENT] = Done(0, "192.0.2.1 STREAM control.example.org\n", "")
    only(named(world, "https://control.example.org:8443/x"), "PASS")
    assert world.asked == [["getent", "ahosts", "--", "control.example.org"]]


@pytest.mark.parametrize(
    ("resolver", "typed"),
    [
        ("nameserver 127.0.0.53\n", "systemctl restart systemd-resolved.service"),
        ("nameserver 100.100.100.100\nsearch x\n", "systemctl restart tailscaled.service"),
        ("nameserver 192.0.2.53\n", "quietport apply vps1"),
        ("", "quietport apply vps1"),
    ],
)
def test_a_name_that_is_not_found(world: World, resolver: str, typed: str) -> None:
    world.write("/etc/resolv.conf", resolver)
    for done in (Done(2, "", ""), Done(0, "", "")):
        world.answers[GETENT] = done
        found = only(named(world, "https://control.example.org"), "FAIL")
        assert found.reason == "control.example.org, the login server, is not found."
        assert commands(found)[0] == typed and commands(found)[-2:] == ["quietport apply vps1", AGAIN]


def test_a_nameserver_that_is_silent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
        assert timeout == checks.LOOKUP_S
        raise HostProgramError("getent ahosts took longer than 5 s.")

    place = Place(root=world.root, run=slow)
    found = dns({"login_server": "https://control.example.org"}, place=place)
    assert "within 5 s" in only(found, "FAIL").reason


@pytest.mark.parametrize("server", ["http://192.0.2.7:8080", "https://[2001:db8::7]/"])
def test_an_address_needs_no_lookup(world: World, server: str) -> None:
    only(named(world, server), "PASS")
    assert world.asked == []


@pytest.mark.parametrize("server", [None, "", "https://", "https://[", 7])
def test_no_login_server(world: World, server: Any) -> None:
    only(named(world, server), "SKIP")
