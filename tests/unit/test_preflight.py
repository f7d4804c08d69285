"""Preflight: what makes a converge impossible, and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from control.settings import HostSettings
from deploys.preflight import key_problems, secret_problems, system_problems
from operations import secret

DEBIAN = {"distribution": "debian", "version": "13", "arch": "amd64", "systemd": 257, "python": "3.13.5"}
BLANK: dict[str, Any] = {"running": False, "backend_state": None}
JOINED: dict[str, Any] = {"running": True, "backend_state": "Running"}


@pytest.fixture(autouse=True)
def _fresh_sources() -> None:
    secret.resolved.cache_clear()


def host(**keys: Any) -> HostSettings:
    return HostSettings(address="192.0.2.1", **keys)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"version": "12", "systemd": 252, "python": "3.11.2"},
        {"distribution": "ubuntu", "version": "24.04", "systemd": 255, "python": "3.12.3"},
        {"arch": "arm64"},
        {"python": None},
    ],
)
def test_systems_that_will_do(change: dict[str, Any]) -> None:
    assert list(system_problems(DEBIAN | change)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "11"}, "the system is debian 11"),
        ({"distribution": "ubuntu", "version": "22.04"}, "the system is ubuntu 22.04"),
        ({"distribution": "", "version": ""}, "the system is unknown"),
        ({"arch": "armhf"}, "the machine is armhf"),
        ({"systemd": 0}, "systemd does not run as PID 1"),
        ({"systemd": 247}, "systemd 247 runs as PID 1; 252 or newer"),
        ({"python": "3.9.2"}, "python3 is 3.9.2"),
    ],
)
def test_systems_that_will_not(change: dict[str, Any], words: str) -> None:
    (problem,) = system_problems(DEBIAN | change)
    assert words in problem


def test_a_host_that_is_joined_needs_no_key() -> None:
    assert list(key_problems(JOINED, host(), name="vps1")) == []


@pytest.mark.parametrize("state", [BLANK, {"running": True, "backend_state": "NeedsLogin"}])
def test_a_host_that_is_not_needs_one(state: dict[str, Any]) -> None:
    (problem,) = key_problems(state, host(), name="vps1")
    assert "no auth_key" in problem


def test_a_key_with_a_source_that_gives_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_TEST_KEY", "abc")
    assert list(key_problems(BLANK, host(auth_key="env:QUIETPORT_TEST_KEY"), name="vps1")) == []


def test_a_key_whose_source_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIETPORT_TEST_KEY", raising=False)
    (problem,) = key_problems(BLANK, host(auth_key="env:QUIETPORT_TEST_KEY"), name="vps1")
    # The host is named once, by what refuses.
    assert problem.startswith("auth_key: the environment has no QUIETPORT_TEST_KEY.")


def test_an_ephemeral_oauth_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_TEST_KEY", "tskey-client-abc?ephemeral=true")
    (problem,) = key_problems(BLANK, host(auth_key="env:QUIETPORT_TEST_KEY"), name="vps1")
    assert "ephemeral" in problem
    assert "tskey-client-abc" not in problem


def test_every_secret_without_content_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_TEST_KEY", "abc")
    monkeypatch.setenv("QUIETPORT_TEST_EMPTY", " ")
    monkeypatch.delenv("QUIETPORT_TEST_ABSENT", raising=False)
    sources = {"/etc/a/full": "KEY", "/etc/a/empty": "EMPTY", "/etc/a/absent": "ABSENT"}
    settings = host(secrets={path: f"env:QUIETPORT_TEST_{name}" for path, name in sources.items()})
    problems = list(secret_problems(settings, name="vps1"))
    assert [problem.split(":")[0].split()[-1] for problem in problems] == ["/etc/a/empty", "/etc/a/absent"]
