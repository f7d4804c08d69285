"""Every path of the operations before secrets, from the lock to the tailnet, one fixture each."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeHost, FakeState, create_host

from control import guard as control_guard
from control.settings import HostSettings
from operations import docker, files, gate, guard, notes, tailnet
from tests.operations import fixtures

MODULES = ("lock", "guard", "proven", "files", "apt", "users", "programs", "tailnet", "docker")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operation asks besides facts: the way the host is reached, what the operator knows.

    The host of a fixture has changed nothing that waits for its proof (tests/unit/test_operations_guard.py
    has the rest).
    """
    guard.forget()
    control_guard.note("somehost", None)
    monkeypatch.setattr(gate, "settings_for", lambda name: HostSettings(address="192.0.2.1"))
    monkeypatch.setattr(gate, "reached_by", lambda host: "public")
    monkeypatch.setattr(tailnet, "known_addresses", lambda name: ["100.64.0.7", "fd7a:115c:a1e0::7"])


globals().update(fixtures.tests_of(MODULES))


def noted(operation: Any, facts: dict[str, Any], *args: Any) -> notes.Note:
    """What a plan is told by an operation."""
    state = FakeState()
    with (
        ctx_state.use(state),
        ctx_host.use(create_host(state, facts=facts)),
        patch.object(FakeHost, "current_op_hash", "it"),
    ):
        collected = notes.collect()
        try:
            list(operation._inner(*args))
        finally:
            notes.forget()
    ((note,),) = [list(host.values()) for host in collected.of.values()]
    return note


@pytest.mark.parametrize(("mode", "shown"), [("0644", True), ("0640", False), ("0600", False)])
def test_what_not_everybody_may_read_is_not_shown(mode: str, *, shown: bool) -> None:
    old = '{"proxies": {"http-proxy": "http://svc:a-password@proxy.example"}}'
    engine = {"installed": True, "running": True, "firewall": "iptables", "config_stale": False}
    state = {"kind": "file", "mode": mode, "user": "root", "group": "root", "sha256": "other"}
    facts = {
        "docker.Docker": {**engine, "containers": 0, "source": "debian"},
        "system.System": {"codename": "trixie"},
        "files.FileText": {"path=/etc/docker/daemon.json": old},
        "files.FileState": {"path=/etc/docker/daemon.json": state},
    }
    note = noted(docker.configured, facts, "debian")
    assert note.reasons == ["/etc/docker/daemon.json: its content differs"]
    assert ("a-password" in str(note.differences)) is shown
    # The same of any file that becomes readable for everybody.
    facts = {"files.FileText": {"path=/x": old}, "files.FileState": {"path=/x": state}}
    assert ("a-password" in str(noted(files.put, facts, "/x", "new").differences)) is shown


def test_what_this_machine_does_not_remember_is_no_change_of_the_host() -> None:
    joined = {"addresses": ["100.64.0.9"]}
    assert noted(tailnet.remembered, {"tailnet.Tailnet": joined}, "vps1").leaves_host
    assert not noted(tailnet.remembered, {"tailnet.Tailnet": {"addresses": []}}, "vps1").leaves_host


def test_every_operation_has_fixtures() -> None:
    assert fixtures.without_fixtures(MODULES) == set()
