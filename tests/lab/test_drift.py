"""Changes by hand are found by a plan, named, and repaired by one converge that touches nothing else.

The changes are in tests/lab/drifts.py. In the fleet's containers each host has some of them, at the same
time; the VM has all of them at once.
"""

from __future__ import annotations

import pytest

from tests.lab.drifts import (
    DRIFTS,
    FIREWALL,
    FOREIGN,
    FOREIGN_DROP_IN,
    PAST_UFW,
    Drift,
    Drifted,
    Told,
    changed_by,
    unclaimed,
)
from tests.lab.drifts import drifted as drifted_by
from tests.lab.record import plain
from tests.lab.story import Applied, Done, canary
from tests.lab.tale import Tale

TOLD_BY = ("fleet", "vm")
DEPENDS = "depends on an earlier change"
# What a rule and a drop-in of somebody else show in, until they are taken away.
FOREIGN_SHOWS = (
    "file /etc/ufw/user.rules:",
    "file /etc/ufw/user6.rules:",
    "rules iptables filter INPUT:",
    "rules iptables filter ufw-user-input:",
    "rules ip6tables filter ufw6-user-input:",
    "ufw ",
    f"file {FOREIGN_DROP_IN}:",
    f"path {FOREIGN_DROP_IN}:",
    f"file {FOREIGN_DROP_IN.rpartition('/')[0]}:",
    f"path {FOREIGN_DROP_IN.rpartition('/')[0]}:",
)


@pytest.fixture
def drifted(tale: Tale) -> Drifted:
    """What is told of a story's hosts after its end."""
    return drifted_by(tale)


def test_a_converged_host_has_nothing_to_report(drifted: Drifted) -> None:
    told: Told = drifted.story["clean"]
    assert told.every_row() == frozenset()
    assert told.done.code == 0


@pytest.mark.parametrize("drift", DRIFTS, ids=lambda drift: drift.name.replace(" ", "-"))
def test_it_is_found_named_and_repaired(drifted: Drifted, drift: Drift) -> None:
    found: Told = drifted.story["found"]
    (name,) = [name for name, drifts in drifted.of.items() if drift in drifts]
    assert drift.says in found.rows(name).get(drift.row, [])
    again: Told = drifted.story["again"]
    assert drift.row not in again.rows(name)


def test_each_drift_is_on_one_host_and_there_are_enough_of_them(drifted: Drifted) -> None:
    drifted.story["made"]
    assert sorted(drift.name for drifts in drifted.of.values() for drift in drifts) == sorted(
        drift.name for drift in DRIFTS
    )
    assert len(DRIFTS) >= 25


def test_nothing_is_found_that_nobody_did(drifted: Drifted) -> None:
    found: Told = drifted.story["found"]
    assert found.done.code == 2
    for name, drifts in drifted.of.items():
        assert list(unclaimed(found.rows(name), drifts)) == [], name


def test_the_converge_does_what_was_announced(drifted: Drifted) -> None:
    found: Told = drifted.story["found"]
    applied: Applied = drifted.story["repaired"]
    assert sorted(changed_by(applied) - found.every_row()) == []
    may_be_less = {
        (name, change["what"])
        for name, host in found.hosts.items()
        for change in host["changes"]
        if change["certainty"] == DEPENDS
    }
    assert sorted(found.every_row() - changed_by(applied) - may_be_less) == []


def test_one_converge_is_enough(drifted: Drifted) -> None:
    again: Told = drifted.story["again"]
    assert again.every_row() == frozenset()
    assert again.done.code == 0


def test_and_nothing_else_was_touched(drifted: Drifted) -> None:
    left: dict[str, list[str]] = drifted.story["left"]
    for name, lines in left.items():
        # The control: what is compared does see the foreign rule.
        assert [line for line in lines if line.startswith("ufw ")], name
        assert [line for line in lines if not line.startswith(FOREIGN_SHOWS)] == [], name


def test_what_somebody_else_made_is_named_and_left(drifted: Drifted) -> None:
    for chapter in ("found", "again"):
        told: Told = drifted.story[chapter]
        for name, host in told.hosts.items():
            named = [remark for remark in host["remarks"] if "left alone, not ours: " in remark]
            assert [remark for remark in named if FOREIGN in remark], name
            for words in (f"{FOREIGN_DROP_IN} is not ours", f"not ufw's (IPv4): -A {PAST_UFW}"):
                assert [remark for remark in host["remarks"] if words in remark], (name, words)
        reasons = [reason for name in told.hosts for reason in told.rows(name).get(FIREWALL, [])]
        assert [reason for reason in reasons if FOREIGN in reason] == []


def test_with_prune_foreign_it_is_a_change_and_goes(drifted: Drifted) -> None:
    told: Told = drifted.story["to be pruned"]
    assert told.done.code == 2
    for name in told.hosts:
        assert f"rule that is not ours: {FOREIGN}" in told.rows(name)[FIREWALL]
    drifted.story["pruned"]
    after: dict[str, list[str]] = drifted.story["left after that"]
    assert after == {name: [] for name in after}
    assert drifted.story["cleared away"] is None


def test_drift_tells_the_same_in_brief(drifted: Drifted) -> None:
    found: Told = drifted.story["found"]
    brief: Done = drifted.story["in brief"]
    assert brief.code == 2
    said = plain(brief.out)
    for name in found.hosts:
        for row, reasons in found.rows(name).items():
            assert row in said
            assert [reason for reason in reasons if reason not in said] == []
    # "In brief" is without the differences, which there are: see below.
    assert "+++ /" not in said


def test_no_secret_is_shown_wherever_it_was_pasted(drifted: Drifted) -> None:
    found: Told = drifted.story["found"]
    brief: Done = drifted.story["in brief"]
    again: Told = drifted.story["again"]
    for done in (found.done, brief, again.done):
        assert canary() not in done.text
    # The control: the file it was pasted into is shown.
    changes = [change for host in found.hosts.values() for change in host["changes"]]
    texts = [one["text"] for change in changes for one in change["differences"]]
    assert [text for text in texts if "agent_known_hosts" in text and "\n-# ***" in text]
