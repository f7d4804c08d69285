"""The doctor on the host: it can tell everything, finds nothing wrong, and its timer keeps what it finds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from facts.files import FileState, FileText
from tests.spec.reading import Reading
from tests.spec.snapshot import DOCTORS_LATEST

KEYS = {"check", "status", "reason", "next_step", "at"}


@pytest.fixture(scope="session")
def told(reading: Reading) -> dict[str, Any]:
    """What `quietport doctor --json` says of the host."""
    text, _, code = reading.text("quietport doctor --json; echo $?").rpartition("\n")
    document: dict[str, Any] = json.loads(text)
    # A warning is no failure, and neither is what nobody has looked at yet.
    assert int(code) == {"fail": 1, "unknown": 3}.get(document["state"], 0)
    return document


def test_it_finds_nothing_wrong(told: dict[str, Any]) -> None:
    wrong = [f"{one['check']}: {one['reason']}" for one in told["checks"] if one["status"] == "FAIL"]
    assert wrong == []


def test_it_can_tell_everything(told: dict[str, Any]) -> None:
    assert told["schema"] == 1
    assert [one["reason"] for one in told["checks"] if one["reason"].startswith("could not tell")] == []
    assert all(set(one) == KEYS for one in told["checks"])


def test_what_is_wrong_has_a_next_step(told: dict[str, Any]) -> None:
    assert [one["check"] for one in told["checks"] if one["status"] == "WARN" and not one["next_step"]] == []


def test_the_timer_keeps_what_it_finds(reading: Reading) -> None:
    state = reading.fact(FileState, DOCTORS_LATEST)
    if state["kind"] == "absent":
        pytest.skip("the doctor's timer has not run yet on this host")
    assert (state["kind"], state["user"], state["mode"]) == ("file", "root", "0640")
    document = json.loads(reading.fact(FileText, DOCTORS_LATEST))
    assert document["schema"] == 1
    assert {"updates", "dns"} <= {one["check"] for one in document["checks"]}
