"""Timers: enabled, hardened, and their last run went well."""

from __future__ import annotations

import json
import re

import pytest

from facts.files import FileState, FileText
from facts.units import Units
from tests.spec.reading import Reading
from tests.spec.snapshot import REPORT

PREFIX = "quietport-"
MOST_EXPOSED = 3.0


@pytest.fixture(scope="session")
def timers(reading: Reading) -> list[str]:
    """The timers of the project on this host."""
    found = reading.lines("systemctl list-unit-files --type=timer --no-legend --no-pager %s", f"{PREFIX}*")
    names = [line.split()[0] for line in found]
    assert names, "no timer of quietport is installed"
    return names


def test_timers_are_enabled_and_waiting(reading: Reading, timers: list[str]) -> None:
    states = reading.fact(Units, timers)
    for timer in timers:
        assert (states[timer]["active"], states[timer]["enabled"]) == ("active", "enabled"), timer


def test_timers_catch_up_and_spread(reading: Reading, timers: list[str]) -> None:
    for timer in timers:
        settings = reading.text("systemctl cat -- %s", timer)
        assert "Persistent=true" in settings, timer
        assert re.search(r"RandomizedDelaySec=[1-9]", settings), timer


def test_services_are_hardened(reading: Reading, timers: list[str]) -> None:
    for timer in timers:
        service = timer.removesuffix(".timer") + ".service"
        verdict = reading.text("systemd-analyze security --no-pager %s", service)
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", verdict)
        assert found, verdict[-200:]
        assert float(found.group(1)) <= MOST_EXPOSED, service


def test_the_last_run_went_well(reading: Reading, timers: list[str]) -> None:
    for timer in timers:
        service = reading.unit(timer.removesuffix(".timer") + ".service")
        found = (service["LoadState"], service["Result"], service["ExecMainStatus"])
        assert found == ("loaded", "success", "0"), timer


def test_the_report_is_there(reading: Reading) -> None:
    state = reading.fact(FileState, REPORT)
    if state["kind"] == "absent":
        pytest.skip("the daily report has not run yet on this host")
    assert (state["kind"], state["user"], state["mode"]) == ("file", "root", "0640")
    document = json.loads(reading.fact(FileText, REPORT))
    assert document["schema"] == 1
    assert document["ok"] == all(one["verdict"] != "violation" for one in document["listeners"])
    assert {"protocol", "address", "port", "exposure", "verdict", "hint"} <= set(document["listeners"][0])
