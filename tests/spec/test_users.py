"""Users and directories: agents without power, system accounts left alone."""

from __future__ import annotations

from control.settings import HostSettings
from facts.files import FileState
from tests.spec.reading import Reading

DIRECTORIES = {"/etc/quietport": "0755", "/var/lib/quietport": "0750", "/var/log/quietport": "0750"}


def test_agents_exist_with_a_home_of_their_own(reading: Reading, settings: HostSettings) -> None:
    for user in settings.agents:
        entry = reading.text("getent passwd %s", user).split(":")
        assert int(entry[2]) >= 1000
        state = reading.fact(FileState, entry[5])
        assert (state["kind"], state["user"]) == ("directory", user)


def test_agents_have_no_password(reading: Reading, settings: HostSettings) -> None:
    for user in settings.agents:
        assert reading.text("getent shadow %s", user).split(":")[1].startswith(("!", "*"))


def test_agents_cannot_become_root(reading: Reading, settings: HostSettings) -> None:
    for user in settings.agents:
        groups = set(reading.text("id -nG %s", user).split())
        allowed = {"docker"} if user in settings.docker_users else set()
        assert groups & {"root", "sudo", "wheel", "adm", "disk", "lxd", "docker"} == allowed


def test_directories_belong_to_root(reading: Reading) -> None:
    for path, mode in DIRECTORIES.items():
        state = reading.fact(FileState, path)
        assert (state["kind"], state["user"], state["mode"]) == ("directory", "root", mode), path


def test_system_directories_were_not_given_away(reading: Reading) -> None:
    """A converge that makes the homes of system accounts chowns /usr/sbin, /bin, /dev to them."""
    assert reading.text("stat -c %s /usr/sbin /usr/bin /dev / /var/lib", "%U").split() == ["root"] * 5
