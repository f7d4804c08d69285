"""What can be reached on the host: its own program and this side say the same, by one policy."""

from __future__ import annotations

from typing import Any

import pytest

from control.settings import HostSettings
from facts.sockets import Reachable
from tests.spec.reading import Reading

HEADER = "Netid State Recv-Q Send-Q Local Address:Port Peer Address:PortProcess"
ROW = "tcp LISTEN 0 128 {address}:22 0.0.0.0:*"
KEYS = {"protocol", "address", "port", "process", "pid", "unit", "exposure", "verdict", "hint"}


def public(listeners: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What is public, but tailscaled's own: its UDP sockets come and go."""
    keys = ("protocol", "address", "port", "process", "unit", "verdict", "hint")
    found = [one for one in listeners if one["exposure"] == "public" and one["process"] != "tailscaled"]
    return sorted(tuple(one[key] for key in keys) for one in found)


def test_the_report_has_the_keys_that_were_agreed(reading: Reading) -> None:
    document = reading.json("quietport ports --json || test $? -eq 1")
    assert (set(document), document["schema"]) == ({"schema", "ok", "listeners"}, 1)
    assert {frozenset(one) for one in document["listeners"]} == {frozenset(KEYS)}


def test_the_exit_code_is_the_verdict(reading: Reading) -> None:
    code = reading.text("quietport ports >/dev/null; echo $?").strip()
    wrong = [one for one in reading.reachable() if one["verdict"] == "violation"]
    assert code == ("1" if wrong else "0")


def test_both_sides_say_the_same(reading: Reading) -> None:
    assert public(reading.fact(Reachable)) == public(reading.reachable())


def test_tailscaled_is_excused_for_what_it_is(reading: Reading) -> None:
    """WireGuard's port is public, and allowed by tailscaled's unit and executable."""
    found = [one for one in reading.reachable() if one["process"] == "tailscaled"]
    assert {one["unit"] for one in found} == {"tailscaled.service"}
    assert {one["verdict"] for one in found if one["exposure"] == "public"} == {"allowed"}


def test_nothing_is_published_by_funnel(reading: Reading) -> None:
    assert [one for one in reading.reachable() if one["process"] == "tailscale funnel"] == []


def test_an_exception_is_shown_with_its_reason(reading: Reading, settings: HostSettings) -> None:
    """And only what hosts.toml declares is one: the host goes by what it was told."""
    reasons = {f"Declared in hosts.toml: {one.reason}" for one in settings.public_listeners}
    allowed = [one for one in reading.reachable() if one["verdict"] == "allowed" and one["hint"]]
    assert {one["hint"] for one in allowed} <= reasons


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"{HEADER}\n{ROW.format(address='0.0.0.0')}\n", "1"),
        (f"{HEADER}\n{ROW.format(address='100.64.0.7')}\n", "0"),
        (f"{HEADER}\n", "0"),
        (f"{HEADER}\ngarbage\n", "3"),
        ("", "3"),
    ],
)
def test_the_program_reads_text_as_well(reading: Reading, text: str, code: str) -> None:
    """Positive control: the same program finds an open door, and is not fine with what is none."""
    command = "printf %%s %s | quietport ports --from-ss - >/dev/null 2>&1; echo $?"
    assert reading.text(command, text).strip() == code
