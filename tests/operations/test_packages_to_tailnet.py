"""Every path of the operations before secrets, from the lock to the tailnet, one fixture each."""

from __future__ import annotations

import pytest

from control import guard as control_guard
from control.settings import HostSettings
from operations import gate, guard, tailnet
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


def test_every_operation_has_fixtures() -> None:
    assert fixtures.without_fixtures(MODULES) == set()
