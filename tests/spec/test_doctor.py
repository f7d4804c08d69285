"""The doctor on the host: it can tell everything, finds nothing wrong, and its timer keeps what it finds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from facts.files import FileState, FileText
from quietport.doctor.place import LATEST
from tests.spec.reading import Reading

KEYS = {"check", "status", "reason", "next_step", "at"}


@pytest.fixture(scope="session")
def told(reading: Reading) -> dict[str, Any]:
    """What `quietport doctor --json` says of the host."""
    # By itself: beside a snapshot an emulated host has no time for the programs that it starts.
    text, _, code = reading.text("quietport doctor --json; echo $?").rpartition("\n")
    document: dict[str, Any] = json.loads(text)
    # A warning is no failure, and neither is what nobody has looked at yet.
    assert int(code) == {"fail": 1, "unknown": 3}.get(document["state"], 0)
    return document


def wrong(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["check"], one["reason"]) for one in told["checks"] if one["status"] == "FAIL"]


def test_it_finds_nothing_wrong(told: dict[str, Any]) -> None:
    # What listens is whose host it is; the policy has specs of its own.
    assert [one for one in wrong(told) if one[0] not in ("listeners", "published")] == []


def test_it_has_the_policys_word_for_what_listens(reading: Reading, told: dict[str, Any]) -> None:
    violations = [one for one in reading.reachable() if one["verdict"] == "violation"]
    found = [reason for check, reason in wrong(told) if check == "listeners"]
    assert sorted(found) == sorted(
        f"{one['protocol']} {one['address']} port {one['port']} is public and may not be "
        f"({', '.join(filter(None, (one['process'], one['unit']))) or 'no process'})."
        for one in violations
    )


def test_it_can_tell_everything(told: dict[str, Any]) -> None:
    assert told["schema"] == 1
    assert [one["reason"] for one in told["checks"] if one["reason"].startswith("could not tell")] == []
    assert all(set(one) == KEYS for one in told["checks"])


def test_what_is_wrong_has_a_next_step(told: dict[str, Any]) -> None:
    assert [one["check"] for one in told["checks"] if one["status"] == "WARN" and not one["next_step"]] == []


def test_the_timer_keeps_what_it_finds(reading: Reading) -> None:
    state = reading.fact(FileState, LATEST)
    if state["kind"] == "absent":
        pytest.skip("the doctor's timer has not run yet on this host")
    assert (state["kind"], state["user"], state["mode"]) == ("file", "root", "0640")
    document = json.loads(reading.fact(FileText, LATEST))
    assert document["schema"] == 1
    assert {"updates", "dns"} <= {one["check"] for one in document["checks"]}
