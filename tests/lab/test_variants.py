"""Hosts as they are found: in each of them plan, converge, specs, a second run, a restart, specs again."""

from __future__ import annotations

from lab import variants
from tests.lab.checks import CHECKS
from tests.lab.record import record
from tests.lab.story import Applied, Plan
from tests.lab.variants import Guest, Specs


def of(host: str, pairs: frozenset[tuple[str, str]]) -> list[str]:
    """The operations of one host."""
    return sorted(operation for name, operation in pairs if name == host)


def test_every_variant_has_a_check() -> None:
    assert CHECKS.keys() == variants.ALL.keys()


def test_the_host_really_is_like_that(guest: Guest) -> None:
    """The positive controls of what is looked at in the end."""
    assert guest.tale.chapters["before"][guest.name] == ""
    # An older converge leaves nothing that the public side could see.
    assert guest.found.open or "older-converge" in guest.variants


def test_the_plan_names_what_then_changes(guest: Guest) -> None:
    plan: Plan = guest.tale.chapters["dry"]
    applied = guest.convergence.applied
    assert of(guest.name, applied.failed) == []
    assert of(guest.name, applied.changed - plan.changes) == []
    assert of(guest.name, plan.changes - applied.changed) == []
    assert of(guest.name, plan.changes)


def test_it_converges(guest: Guest) -> None:
    applied = guest.convergence.applied
    assert of(guest.name, applied.failed) == [], applied.done.err[-6000:]
    assert len(of(guest.name, applied.changed | applied.unchanged)) > 20, "it was not a part of the run"


def test_nothing_opened_meanwhile(guest: Guest) -> None:
    seen = guest.convergence.seen[guest.name]
    assert seen.opened == []
    assert seen.tries > 10 * len(guest.found.closed)


def test_the_public_finds_nothing(guest: Guest) -> None:
    assert guest.tale.chapters["closed"][guest.name] == set()


def test_the_specs_hold(guest: Guest) -> None:
    specs: Specs = guest.tale.chapters["spec"][guest.name]
    specs.ok()


def test_a_second_run_changes_nothing(guest: Guest) -> None:
    again: Applied = guest.tale.chapters["again"]
    assert of(guest.name, again.changed | again.failed) == []
    assert len(of(guest.name, again.unchanged)) > 20


def test_the_specs_hold_after_a_restart(guest: Guest) -> None:
    guest.tale.chapters["restart"]
    assert guest.tale.chapters["closed again"][guest.name] == set()
    specs: Specs = guest.tale.chapters["spec again"][guest.name]
    specs.ok()


def test_what_has_become_of_it(guest: Guest) -> None:
    """Each variant's own end, and its row for the table in the docs."""
    guest.tale.chapters["spec again"]
    ends = {name: CHECKS[name].after(guest) for name in guest.variants}
    sentences = {name: CHECKS[name].sees(guest) for name in guest.variants}
    # Combined ones have proven the same once more; the table has a row for each alone.
    if (guest.target.kind, guest.target.distro) == ("container", "trixie"):
        for name in guest.variants:
            record("variant", variants.ALL[name].what, sees=sentences[name], after=ends[name])
