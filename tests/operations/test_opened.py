"""What a converge does on a host that was opened by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeState, create_host

from operations import opened

NOTE = """{"schema": 1, "since": "2026-11-21 10:00 UTC", "until": 1800000000, "public_before": false,
"replaced": ["deny 22/tcp"], "said": ""}"""


def commands(text: str | None) -> list[Any]:
    state = FakeState()
    facts = {"files.FileText": {"path=/etc/quietport/opened.json": text}}
    with ctx_state.use(state), ctx_host.use(create_host(state, facts=facts)):
        return list(opened.forgotten._inner())


def test_a_host_that_was_not_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert commands(None) == []
    assert caplog.text == ""


@pytest.mark.parametrize("text", [NOTE, "damaged"])
def test_it_is_said_and_forgotten(text: str, caplog: pytest.LogCaptureFixture) -> None:
    (command,) = commands(text)
    assert str(command) == "/usr/local/sbin/quietport close --note-only"
    assert "ssh: opened by hand since " in caplog.text
    assert ("not put back: deny 22/tcp" in caplog.text) == (text == NOTE)
