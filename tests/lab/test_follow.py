"""sshd answers on the tailnet after whatever happened to its addresses, and never in public.

The two half fixes that are told elsewhere are shown to be half: on a host without our mechanisms, each leaves
an sshd that nobody reaches. The stories are in tests/lab/guarded.py.
"""

from __future__ import annotations

import pytest

from tests.lab.guarded import Guarded

pytestmark = pytest.mark.container

FOLLOWED = (
    "tailscaled killed",
    "reinstalled",
    "logged out and in",
    "registered anew",
    "IPv6 alone",
    "follower dead",
    "late, with another address",
)


@pytest.mark.parametrize("what", FOLLOWED)
def test_sshd_answers_on_the_tailnet_again(guarded: Guarded, what: str) -> None:
    assert guarded.follow[what] is None


def test_nothing_of_it_was_seen_in_public(guarded: Guarded) -> None:
    guarded.follow[FOLLOWED[-1]]
    assert set(guarded.tries) == set(FOLLOWED)
    # A try takes most of a second, since nobody answers it.
    assert all(tries >= 5 for tries in guarded.tries.values()), guarded.tries


def test_a_converge_then_changes_nothing(guarded: Guarded) -> None:
    assert guarded.follow["again"] is None


@pytest.mark.parametrize("half", ["nonlocal bind alone", "ordering alone"])
def test_a_half_fix_leaves_a_host_that_nobody_reaches(guarded: Guarded, half: str) -> None:
    """Positive control: what our mechanisms are there for does happen without them."""
    assert guarded.guard[half] is None
