"""Every check of the doctor is provoked on a real host, and its next step, to the letter, mends it.

The ailments are in tests/lab/ailments.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.ailments import AILMENTS, BATCHES, DOCTOR, Ailment, Doctor, Patient
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
