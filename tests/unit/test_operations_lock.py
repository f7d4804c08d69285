"""The converge's first step: taken while executing, without a change, and refused when somebody has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.command import FunctionCommand
from pyinfra.context import ctx_host

from control.lock import LockError
from operations import lock


def at(connector: Any) -> SimpleNamespace:
    """A host while it is being changed."""
    state = SimpleNamespace(is_executing=True, failed_hosts=set())
    return SimpleNamespace(
        name="vps1", print_prefix="", state=state, connector=connector, noop=lambda text: None
    )


def test_a_free_lock_is_taken_and_is_no_change() -> None:
    calls: list[str] = []
    with ctx_host.use(at(SimpleNamespace(take_lock=lambda: calls.append("taken")))):
        assert list(lock.held._inner()) == []
    assert calls == ["taken"]


def test_somebody_elses_refuses_the_host(caplog: pytest.LogCaptureFixture) -> None:
    def take_lock() -> None:
        raise LockError("vps1: another converge is at work here: root@box.")

    with ctx_host.use(at(SimpleNamespace(take_lock=take_lock))):
        (command,) = list(lock.held._inner())
        assert isinstance(command, FunctionCommand)
        assert command.function(None, at(None), *command.args) is False
    assert "vps1: refused: another converge is at work here: root@box." in caplog.text
