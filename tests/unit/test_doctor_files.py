"""The doctor's look at secrets and at the sessions of agents."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operations import secret
from quietport.doctor import files
from quietport.doctor.files import secrets, sessions
from quietport.doctor.model import CutShortError, Finding
from quietport.sshagent.names import PROGRAM
from tests.unit.doctor_place import DECLARED, World, commands, only, statuses

PATH = "/etc/app/secrets/key"
WITH_SECRET = {**DECLARED, "secret_files": [PATH]}
ME = (os.getuid(), os.getgid())
AGENT = {**DECLARED, "agent_users": ["agent"]}


@pytest.fixture
def world(tmp_path: Path) -> World:
    tmp_path.chmod(0o755)
    world = World(tmp_path)
    world.write(PATH, "content", mode=0o600).parent.chmod(0o700)
    os.chown(world.root / "etc/app/secrets/key", *ME)
    os.chown(world.root / "etc/app/secrets", *ME)
    return world


def looked(world: World, declared: dict[str, Any] = WITH_SECRET) -> list[Finding]:
    return secrets(declared, place=world.place, owner=ME)


def follow(world: World, finding: Finding) -> None:
    """Type its commands, on this tree: what is chowned is ours already."""
    for command in commands(finding):
        words = shlex.split(command)
        if words[0] in ("chmod", "mv", "rm"):
            subprocess.run([*words[:-1], str(world.root) + words[-1]], check=True)


def test_a_secret_that_is_root_s_alone(world: World) -> None:
    only(looked(world), "PASS")
    only(looked(world, DECLARED), "SKIP")


@pytest.mark.parametrize(
    ("path", "mode"), [(PATH, 0o644), (PATH, 0o400), ("/etc/app/secrets", 0o755), ("/etc/app", 0o777)]
)
def test_a_mode_that_is_loose_is_mended_by_what_is_said(world: World, path: str, mode: int) -> None:
    (world.root / path.lstrip("/")).chmod(mode)
    found = only(looked(world), "FAIL")
    assert path in found.reason and f"{mode:04o}" in found.reason
    follow(world, found)
    only(looked(world), "PASS")


def test_another_owner(world: World) -> None:
    found = secrets(WITH_SECRET, place=world.place, owner=(ME[0] + 1, ME[1] + 1))
    assert set(statuses(found)) == {"FAIL"}
    assert "chown root:root /etc/app/secrets/key" in commands(found[-1])


@pytest.mark.parametrize("kind", ["absent", "no directory", "empty", "link", "directory", "linked directory"])
def test_what_only_the_converge_puts_back(world: World, kind: str) -> None:
    file = world.root / PATH.lstrip("/")
    elsewhere = world.write("/elsewhere/key", "content", mode=0o600)
    if kind == "empty":
        file.write_text("")
    else:
        file.unlink()
    if kind == "no directory":
        file.parent.rmdir()
    elif kind == "link":
        file.symlink_to(elsewhere)
    elif kind == "directory":
        file.mkdir()
    elif kind == "linked directory":
        file.parent.rmdir()
        file.parent.symlink_to(elsewhere.parent)
    found = looked(world)
    assert set(statuses(found)) == {"FAIL"}
    assert commands(found[0])[-1] == "quietport apply vps1"


def test_a_second_name_of_a_secret(world: World) -> None:
    os.link(world.root / PATH.lstrip("/"), world.root / "etc/other")
    assert commands(only(looked(world), "FAIL")) == [f"rm {PATH}", "quietport apply vps1"]


def test_what_is_wrong_is_told_also_when_the_next_one_cannot_be_looked_at(world: World) -> None:
    """A name that no file can have is an error of its own."""
    loose = world.root / PATH.lstrip("/")
    loose.chmod(0o644)
    declared = {**WITH_SECRET, "secret_files": [PATH, f"/etc/app/secrets/{'x' * 300}"]}
    with pytest.raises(CutShortError) as caught:
        looked(world, declared)
    assert PATH in only(caught.value.found, "FAIL").reason

    world.write(f"{files.LINGER}/agent")

    def account(name: str) -> pwd.struct_passwd:
        if name == "nobody-here":
            raise KeyError(name)
        return pwd.getpwuid(0)

    with pytest.raises(CutShortError) as caught:
        sessions({**DECLARED, "agent_users": ["nobody-here", "x" * 300]}, place=world.place, account=account)
    assert "no account nobody-here" in only(caught.value.found, "FAIL").reason


def test_who_writes_secrets_asks_for_the_same() -> None:
    assert (secret.FILE_MODE, secret.FOLDER_MODE) == ("0600", "0700")
    assert (files.FILE_MODE, files.FOLDER_MODE) == (0o600, 0o700)


# --- sessions -----------------------------------------------------------------------------------------

ID = "20261121T100000Z-0123abcd"


@pytest.fixture
def home(world: World) -> Path:
    """A home with one session as its program makes it, and the runtime directory."""
    home = world.root / "home/agent"
    session = home / ".local/state" / PROGRAM / "sessions" / ID
    session.mkdir(parents=True)
    for folder in (session, session.parent, session.parent.parent):
        folder.chmod(0o700)
    for name in ("session.json", "agent.env"):
        (session / name).write_text("{}")
        (session / name).chmod(0o600)
    world.write(f"{files.LINGER}/agent")
    runtime = world.root / f"run/user/{ME[0]}"
    runtime.mkdir(parents=True)
    runtime.chmod(0o700)
    return home


def account_of(home: Path) -> Callable[[str], pwd.struct_passwd]:
    def account(name: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", *ME, "", str(home), "/bin/sh"))

    return account


def seen(world: World, home: Path) -> list[Finding]:
    return sessions(AGENT, place=world.place, account=account_of(home))


def test_sessions_that_are_the_agent_s_alone(world: World, home: Path) -> None:
    only(seen(world, home), "PASS")
    only(sessions(DECLARED, place=world.place), "SKIP")


@pytest.mark.parametrize("where", ["", "sessions", f"sessions/{ID}"])
def test_a_directory_that_others_can_look_into(world: World, home: Path, where: str) -> None:
    path = home / ".local/state" / PROGRAM / where
    path.chmod(0o755)
    found = only(seen(world, home), "FAIL")
    (command,) = commands(found)
    assert command.startswith("runuser -u agent -- chmod 0700 ")
    subprocess.run(shlex.split(command)[4:], check=True)
    only(seen(world, home), "PASS")


def test_a_file_that_others_can_read(world: World, home: Path) -> None:
    file = home / ".local/state" / PROGRAM / "sessions" / ID / "agent.env"
    file.chmod(0o644)
    (command,) = commands(only(seen(world, home), "FAIL"))
    assert command == f"runuser -u agent -- chmod 0600 {file}"


@pytest.mark.parametrize("where", ["", "sessions", f"sessions/{ID}", f"sessions/{ID}/agent.env"])
def test_a_link_is_not_followed_and_nothing_is_typed_at_it(world: World, home: Path, where: str) -> None:
    path = home / ".local/state" / PROGRAM / where
    moved = home / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    found = seen(world, home)
    assert statuses(found) == ["FAIL"]
    assert commands(found[0]) == [] and found[0].next_step


def test_a_second_name_is_told_and_no_mode_mends_it(world: World, home: Path) -> None:
    file = home / ".local/state" / PROGRAM / "sessions" / ID / "agent.env"
    os.link(file, home / "second")
    (found,) = seen(world, home)
    assert (found.status, commands(found)) == ("FAIL", [])


def test_what_an_agent_may_take_away_is_a_warning(world: World, home: Path) -> None:
    (home / ".local/state" / PROGRAM).rename(home / "away")
    assert commands(only(seen(world, home), "WARN")) == ["quietport apply vps1"]


def test_the_report_has_an_end_whatever_an_agent_makes(world: World, home: Path) -> None:
    for number in range(3 * files.MAX_FINDINGS):
        (home / ".local/state" / PROGRAM / "sessions" / f"x{number}").mkdir(mode=0o755)
    assert len(seen(world, home)) == files.MAX_FINDINGS


@pytest.mark.parametrize(
    ("change", "typed"),
    [
        ("linger", "loginctl enable-linger agent"),
        ("absent", f"systemctl restart user@{ME[0]}.service"),
        ("loose", f"systemctl restart user-runtime-dir@{ME[0]}.service user@{ME[0]}.service"),
    ],
)
def test_the_runtime_directory(world: World, home: Path, change: str, typed: str) -> None:
    runtime = world.root / f"run/user/{ME[0]}"
    if change == "linger":
        (world.root / files.LINGER.lstrip("/") / "agent").unlink()
    elif change == "absent":
        runtime.rmdir()
    else:
        runtime.chmod(0o755)
    assert commands(only(seen(world, home), "FAIL")) == [typed]


def test_an_agent_without_an_account(world: World) -> None:
    def nobody(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    found = sessions(AGENT, place=world.place, account=nobody)
    assert commands(only(found, "FAIL")) == ["quietport apply vps1"]
