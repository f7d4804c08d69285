"""The lockout matrix: the operator is never shut out, whatever comes between a converge and its host.

`make chaos FAULTS=200 SEED=7` throws as many as you like; tests/lab/lockout.py says how one is had again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.lockout import DEFAULT_FAULTS, ENDS, SILENT, Report, sentences, told, words
from tests.lab.lockplan import FAULTS
from tests.lab.own import Waits
from tests.lab.record import record

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def lockout(waits: Waits) -> Iterator[Report]:
    """What the faults of a plan came to."""
    report: Report = waits.told("lockout")
    yield report
    waits.leave("lockout")


def test_the_judge_knows_what_is_done_on_purpose(lockout: Report) -> None:
    """Positive controls: the new state, two that are neither, and a host that nobody reaches."""
    assert lockout.controls == {
        "without a fault": "new",
        "ufw off, sshd new": "mixture",
        "ufw on, sshd old": "mixture",
        "no sshd": "unreachable",
    }


def test_the_host_is_always_reached_by_one_path_and_is_in_one_state(lockout: Report) -> None:
    """Old and complete by the old path, or new and complete by the tailnet; and the controller says which."""
    print(f"{len(lockout.results)} faults in {lockout.took:.0f} s")
    print(lockout.table())
    assert len(lockout.results) == DEFAULT_FAULTS >= 34
    assert not lockout.failed, lockout.table()


def test_every_kind_of_fault_was_there(lockout: Report) -> None:
    assert {result.round.fault for result in lockout.results} == {fault.name for fault in FAULTS}
    # Else nothing would be shown of the one or of the other.
    assert {result.state for result in lockout.results} == {"old", "new"}
    for fault in FAULTS:
        found = [result for result in lockout.results if result.round.fault == fault.name]
        said = [words(result.said) for result in found if result.code is not None and result.code > 0]
        if fault.name not in SILENT:
            assert frozenset().union(*said) <= set(told(fault.name)), fault.name
        states = {
            "old": "as it was",
            "new": "private",
            None: "as it was, or private; all of one or of the other",
        }
        record(
            "fault",
            f"{fault.name}, while firewall and ssh are changed",
            sees=sentences(fault.name),
            after=states[ENDS.get(fault.name)],
        )
