"""The guard on real hosts: undone when the time is up, after a boot, and when the one who undoes is killed.

`quietport guard scope --against` compares all that a guard keeps with before: "the old state" means that it
finds nothing. Each story has a host of its own (tests/lab/guarded.py).
"""

from __future__ import annotations

import pytest

from tests.lab.guarded import Guarded

pytestmark = pytest.mark.container

TIME_UP = ("daemon-reloads", "killed half-way", "exec killed", "a command without confirmation")


@pytest.mark.parametrize("what", TIME_UP)
def test_what_nobody_confirms_is_undone_in_time(guarded: Guarded, what: str) -> None:
    assert guarded.guard[what] is None


def test_a_boot_undoes_before_sshd_starts(guarded: Guarded) -> None:
    assert guarded.guard["rebooted"] is None


@pytest.mark.parametrize("what", ["who may not confirm", "who may confirm", "a command with confirmation"])
def test_only_a_new_login_over_the_tailnet_confirms(guarded: Guarded, what: str) -> None:
    assert guarded.guard[what] is None


def test_a_killed_converge_leaves_the_sockets_as_they_were(guarded: Guarded) -> None:
    assert guarded.sockets["killed before the proof"] is None


def test_and_the_next_one_makes_the_host_private(guarded: Guarded) -> None:
    assert guarded.sockets["converged"] is None


def test_nothing_is_left_to_change(guarded: Guarded) -> None:
    for story in (guarded.guard, guarded.sockets):
        assert story["again"] is None
