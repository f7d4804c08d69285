"""Agent access: the launchers, a private place for each agent's sessions, and no other hands on it."""

from __future__ import annotations

from control.settings import HostSettings
from deploys.agent_access import KNOWN_HOSTS, LAUNCHERS
from facts.files import FileState, FileText
from facts.sessions import Sessions
from operations.agent_access import STATE
from quietport.sshagent.names import LINGER
from tests.spec.reading import Reading


def test_launchers_are_roots_and_run(reading: Reading) -> None:
    for path, text in LAUNCHERS.items():
        state = reading.fact(FileState, path)
        assert (state["kind"], state["user"], state["mode"]) == ("file", "root", "0755"), path
        assert reading.fact(FileText, path) == text
        assert reading.text(f"{path} --version").startswith(path.rpartition("/")[2])


def test_hosts_that_a_session_may_be_bound_to_are_for_root_to_say(reading: Reading) -> None:
    state = reading.fact(FileState, KNOWN_HOSTS)
    assert (state["kind"], state["user"], state["mode"]) == ("file", "root", "0644")


def test_each_agent_has_a_private_place_for_its_sessions(reading: Reading, settings: HostSettings) -> None:
    for user in settings.agents:
        home = reading.text("getent passwd %s", user).split(":")[5]
        for path in (f"{home}/{STATE}", f"{home}/{STATE}/sessions"):
            state = reading.fact(FileState, path)
            assert (state["kind"], state["user"], state["mode"]) == ("directory", user, "0700"), path


def test_each_agent_has_a_runtime_directory_without_a_login(reading: Reading, settings: HostSettings) -> None:
    for user in settings.agents:
        assert reading.fact(FileState, f"{LINGER}/{user}")["kind"] == "file"
        uid = reading.text("id -u %s", user)
        state = reading.fact(FileState, f"/run/user/{uid}")
        assert (state["kind"], state["user"], state["mode"]) == ("directory", user, "0700")


def test_sessions_are_readable_and_none_is_unsafe(reading: Reading, settings: HostSettings) -> None:
    found = reading.fact(Sessions)
    for user in settings.agents:
        assert found[user]["readable"], user
        assert found[user]["unsafe"] == [], user
