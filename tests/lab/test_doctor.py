"""Every check of the doctor is provoked on a real host, and its next step, to the letter, mends it.

The ailments are in tests/lab/ailments.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.ailments import AILMENTS, BATCHES, DOCTOR, NAME, Ailment, Doctor, Patient
from tests.lab.own import Waits

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def patient(waits: Waits) -> Iterator[Patient]:
    """The story of one host; it is told in the background."""
    told: Patient = waits.told("patient")
    yield told
    told.story.wait()
    waits.leave("patient")


def test_a_converged_host_has_nothing_to_complain_of(patient: Patient) -> None:
    said: Doctor = patient.story["healthy"]
    assert said.failing() == []
    assert said.code == 0
    assert said.document["ok"] is True


@pytest.mark.parametrize("check", ["updates", "dns"])
def test_what_is_slow_waits_for_the_timer(patient: Patient, check: str) -> None:
    """Before it has run nothing is known, and the next step makes it run; then there is an answer."""
    (before,) = patient.story["before the timer"].rows(check)
    assert before["status"] != "SKIP" or f"`systemctl start {DOCTOR}`" in before["next_step"]
    assert patient.story["healthy"].is_well(check)


@pytest.mark.parametrize("ailment", AILMENTS, ids=lambda one: f"{one.check}: {one.name}".replace(" ", "-"))
def test_it_is_found_and_its_next_step_mends_it(patient: Patient, ailment: Ailment) -> None:
    ill: Doctor = patient.story[f"ill: {ailment.batch}"]
    row = ill.row_of(ailment)
    assert row is not None, ill.rows(ailment.check)
    assert row["next_step"]
    assert (ill.code, ill.document["ok"]) == (1, False)
    well: Doctor = patient.story[f"well: {ailment.batch}"]
    assert patient.typed[ailment.name], row["next_step"]
    assert [one for one in well.rows(ailment.check) if ailment.says in one["reason"]] == []
    assert well.is_well(ailment.check), well.rows(ailment.check)


@pytest.mark.parametrize("batch", BATCHES)
def test_then_the_host_is_well(patient: Patient, batch: str) -> None:
    well: Doctor = patient.story[f"well: {batch}"]
    assert well.failing() == []
    assert well.code == 0


# From the operator's side


def seen(patient: Patient, chapter: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what is said of the host."""
    said: Doctor = patient.story[f"seen: {chapter}"]
    assert said.document["schema"] == 1
    return said.code, said.document["hosts"][NAME]


def test_the_operator_sees_a_host_that_is_well(patient: Patient) -> None:
    code, host = seen(patient, "healthy")
    assert (code, host["error"], host["tailnet"]["ok"]) == (0, "", True), host
    assert host["state"] in ("pass", "warn")
    assert (host["public"]["state"], host["public"]["open"]) == ("closed", [])
    here: Doctor = patient.story["healthy"]
    assert {row["check"] for row in host["report"]["checks"]} == {
        row["check"] for row in here.document["checks"]
    }


def test_the_operator_sees_what_the_public_sees(patient: Patient) -> None:
    """The firewall is off and something listens."""
    code, host = seen(patient, "by commands")
    assert (code, host["state"], host["public"]["state"]) == (1, "fail", "open"), host
    assert [one for one in host["public"]["open"] if one.endswith(":8088")]
    assert host["tailnet"]["ok"] is True
    assert host["report"]["state"] == "fail"


def test_a_host_that_is_off_the_tailnet_is_a_row(patient: Patient) -> None:
    code, host = seen(patient, "the ground")
    assert (code, host["state"], host["report"]) == (1, "unreachable", None), host
    assert NAME not in host["error"] and host["error"]
    assert host["public"]["state"] == "closed"
