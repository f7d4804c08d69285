"""A blank host becomes a private one: what was announced is what happened, and it stays."""

from __future__ import annotations

from tests.lab.story import SECRET_PATH, Applied, Plan, canary
from tests.lab.tale import Tale


def test_a_blank_host_answers_the_public_over_both_families(tale: Tale) -> None:
    """The positive control of every later probe: this public side sees an open port."""
    seen = set().union(*tale.chapters["blank"].values())
    assert seen == set(tale.ssh_places())


def test_a_dry_run_announces_changes_on_every_host(tale: Tale) -> None:
    plan: Plan = tale.chapters["dry"]
    assert {host for host, _ in plan.changes} == set(tale.names)


def test_the_converge_goes_through(tale: Tale) -> None:
    applied: Applied = tale.chapters["apply"]
    applied.ok()


def test_what_was_announced_is_what_changed(tale: Tale) -> None:
    plan: Plan = tale.chapters["dry"]
    applied: Applied = tale.chapters["apply"]
    # Differences first: they say which operation was dishonest.
    assert sorted(applied.changed - plan.changes) == []
    assert sorted(plan.changes - applied.changed) == []
    assert len(plan.changes) > 10 * len(tale.names)


def test_the_public_finds_sshd_no_more(tale: Tale) -> None:
    assert set().union(*tale.chapters["closed"].values()) == set()


def test_the_specs_hold(tale: Tale) -> None:
    tale.chapters["spec"].ok()


def test_a_second_run_changes_nothing(tale: Tale) -> None:
    again: Applied = tale.chapters["again"]
    assert again.ok().changed == frozenset()


def test_the_specs_hold_after_a_restart(tale: Tale) -> None:
    tale.chapters["restart"]
    assert set().union(*tale.chapters["closed again"].values()) == set()
    tale.chapters["spec again"].ok()


def test_no_output_shows_the_secret(tale: Tale) -> None:
    """Plans with differences, plans as JSON, and a converge; the file on the host does hold it."""
    tale.chapters["spec again"]
    outputs = [tale.chapters[chapter].done.text for chapter in ("dry", "apply", "again")]
    assert [canary() in text for text in outputs] == [False] * 3
    assert SECRET_PATH in outputs[0]
    for name in tale.names:
        assert tale.hosts.ssh(name, f"cat {SECRET_PATH}").ok().out == canary()
