"""A secret that still has to be written is shown by no output, however talkative it was asked to be."""

from __future__ import annotations

import pytest

from tests.lab.story import DEPLOY, SECRET_PATH, SECRET_VARIABLE, Hosts, canary
from tests.lab.tale import Tale

TOLD_BY = ("fleet",)
OTHER = "/etc/e2e-canary/key"
LOUD = (
    ("--dry", "--diff"),
    ("--dry", "-vvv"),
    ("--dry", "--debug"),
    ("--dry", "--json"),
    ("--debug-operations",),
)


@pytest.fixture
def pending(tale: Tale) -> Hosts:
    """The same hosts with one more secret, which is not there yet."""
    tale.chapters["spec again"]
    return tale.vary("pending", dict.fromkeys((SECRET_PATH, OTHER), f"env:{SECRET_VARIABLE}"))


@pytest.mark.parametrize("flags", LOUD, ids=" ".join)
def test_no_plan_shows_it(pending: Hosts, flags: tuple[str, ...]) -> None:
    done = pending.pyinfra(DEPLOY, *flags).ok()
    # The plan is about that file, so its content could have been in it.
    assert OTHER in done.text
    assert canary() not in done.text


def test_no_converge_shows_it(tale: Tale, pending: Hosts) -> None:
    done = pending.pyinfra(DEPLOY, "-y", "-vvv", "--diff").ok()
    assert canary() not in done.text
    for name in tale.names:
        assert pending.ssh(name, f"cat {OTHER}; rm -r {OTHER.rpartition('/')[0]}").ok().out == canary()
