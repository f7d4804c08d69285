"""The lockout matrix: the operator is never shut out, whatever comes between a converge and its host.

`make chaos FAULTS=200 SEED=7` throws as many as you like; tests/lab/lockout.py says how one is had again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.lab import lockout
from tests.lab.lockout import ENDS, Report
from tests.lab.lockplan import FAULTS
from tests.lab.record import record
from tests.lab.story import Lab

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, needs_containers: None) -> Iterator[Report]:
    """What the faults of a plan came to."""
    seed = int(os.environ.get("QUIETPORT_SEED", lockout.DEFAULT_SEED))
    lab = Lab.new("lockout")
    before = request.session.testsfailed
    try:
        found = lockout.campaign(lab, faults=lockout.DEFAULT_FAULTS, seed=seed)
        (lab.run.logs / "lockout.json").write_text(json.dumps(found.to_json(), indent=1))
        yield found
    except BaseException:
        lab.collect()
        raise
    if request.session.testsfailed > before:
        lab.collect()
    else:
        lab.down()


def test_the_judge_knows_what_is_done_on_purpose(report: Report) -> None:
    """Positive controls: the new state, two that are neither, and a host that nobody reaches."""
    assert report.controls == {
        "without a fault": "new",
        "ufw off, sshd new": "mixture",
        "ufw on, sshd old": "mixture",
        "no sshd": "unreachable",
    }


def test_the_host_is_always_reached_by_one_path_and_is_in_one_state(report: Report) -> None:
    """Old and complete by the old path, or new and complete by the tailnet; and the controller says which."""
    print(f"{len(report.results)} faults in {report.took:.0f} s")
    print(report.table())
    assert len(report.results) == lockout.DEFAULT_FAULTS >= 34
    assert not report.failed, report.table()


def test_every_kind_of_fault_was_there(report: Report) -> None:
    assert {result.round.fault for result in report.results} == {fault.name for fault in FAULTS}
    # Else nothing would be shown of the one or of the other.
    assert {result.state for result in report.results} == {"old", "new"}
    for fault in FAULTS:
        found = [result for result in report.results if result.round.fault == fault.name]
        said = [result.said for result in found if result.code is not None and result.code > 0]
        states = {
            "old": "as it was",
            "new": "private",
            None: "as it was, or private; all of one or of the other",
        }
        record(
            "fault",
            f"{fault.name}, while firewall and ssh are changed",
            sees=lockout.sentences(said),
            after=states[ENDS.get(fault.name)],
        )
