"""The pure parts of the lockout matrix: which faults are thrown, and what is said of a host after one."""

from __future__ import annotations

import json

import pytest

from tests.lab.lockout import DEFAULT_FAULTS, DEFAULT_SEED, ENDS, HOSTS, Report, Result, closing
from tests.lab.lockplan import FAULTS, MOMENTS, Seen, plan, turns, verdict, wrong_words
from tests.lab.story import Done

OLD = Seen((), ("sshd listens elsewhere",), public=True, open_to_public=True, tailnet=True, login=True)
NEW = Seen(("ufw is active",), (), public=False, open_to_public=False, tailnet=True, login=True)
UNDONE = "quietport: k1 did not converge: failed. The change was undone by the host's guard: as before."
STAYS = "quietport: k1 did not converge: failed. The change was confirmed and stays."
UNKNOWN = "quietport: k1 did not converge: failed. Whether the change was undone is not known: no answer."


def test_a_seed_is_a_plan_and_another_is_another() -> None:
    hosts = list(HOSTS)
    assert plan(faults=36, seed=7, hosts=hosts) == plan(faults=36, seed=7, hosts=hosts)
    assert plan(faults=36, seed=7, hosts=hosts) != plan(faults=36, seed=8, hosts=hosts)


@pytest.mark.parametrize("seed", [1, DEFAULT_SEED, 99])
def test_a_plan_has_every_kind_at_its_moments_and_shares_the_work(seed: int) -> None:
    rounds = plan(faults=DEFAULT_FAULTS, seed=seed, hosts=list(HOSTS))
    assert [one.number for one in rounds] == list(range(1, DEFAULT_FAULTS + 1))
    assert {one.fault for one in rounds} == {fault.name for fault in FAULTS}
    assert all(one.moment in one.kind.moments for one in rounds)
    thrown = {(one.fault, one.moment) for one in rounds}
    assert {(fault.name, moment) for fault in FAULTS if fault.each for moment in MOMENTS} <= thrown
    busy = [sum(one.kind.takes for one in rounds if one.host == host) for host in HOSTS]
    assert max(busy) - min(busy) <= max(fault.takes for fault in FAULTS)
    assert DEFAULT_FAULTS >= 34


def test_disks_are_last_and_restarts_first() -> None:
    rounds = plan(faults=200, seed=3, hosts=["a"])
    order = [one.kind.turn for one in turns(rounds, "a")]
    assert order == sorted(order)
    assert {0, 1, 2} == set(order)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (OLD, "old"),
        (NEW, "new"),
        # The old path is back although the tailnet is gone.
        (Seen((), ("x",), public=True, open_to_public=True, tailnet=False, login=True), "old"),
        (Seen(("x",), ("y",), public=True, open_to_public=True, tailnet=True, login=True), "mixture"),
        # As it shall be by its files, but the public side gets in.
        (Seen(("x",), (), public=False, open_to_public=True, tailnet=True, login=True), "mixture"),
        # The old state, and half of its path.
        (Seen((), ("x",), public=False, open_to_public=True, tailnet=True, login=True), "mixture"),
        (Seen(("x",), (), public=False, open_to_public=False, tailnet=False, login=False), "unreachable"),
        (Seen((), ("x",), public=True, open_to_public=True, tailnet=True, login=False), "unreachable"),
    ],
)
def test_the_judge(seen: Seen, wanted: str) -> None:
    assert verdict(seen) == wanted


@pytest.mark.parametrize(
    ("code", "said", "state", "armed", "wrong"),
    [
        (0, "quietport: k1 converged, 2 changes", "new", True, False),
        (0, "quietport: k1 converged, 2 changes", "old", True, True),
        (1, UNDONE, "old", True, False),
        (1, UNDONE, "new", True, True),
        (1, STAYS, "new", True, False),
        (1, STAYS, "old", True, True),
        (1, UNKNOWN, "old", True, False),
        (1, UNKNOWN, "new", True, False),
        (1, "quietport: k1 did not converge: failed", "old", True, True),
        (1, "quietport: k1 did not converge: cut. Nothing was changed; more", "old", True, False),
        (1, "quietport: k1 did not converge: cut. Nothing was changed; more", "new", True, True),
        (1, "quietport: k1 did not converge: failed", "old", False, False),
        (1, "quietport: k1 did not converge: failed", "new", False, True),
    ],
)
def test_exit_code_and_closing_line_must_fit(
    code: int, said: str, state: str, armed: bool, wrong: bool
) -> None:
    assert bool(wrong_words(code=code, said=said, state=state, armed=armed)) is wrong


def test_the_closing_line_is_that_of_the_host() -> None:
    text = "quietport: k1 converged, 1 change\nquietport: k10 did not converge: x\n--> Disconnecting\n"
    assert closing(Done((), 1, text, ""), "k1") == "quietport: k1 converged, 1 change"
    assert closing(Done((), 1, "", ""), "k1") == ""


def test_a_report_is_json_and_names_the_command_of_a_failure() -> None:
    (one,) = plan(faults=1, seed=7, hosts=["k1"])
    report = Report(1, 7, [Result(one, state="mixture", failures=["mixture: ..."], code=1)])
    assert "python -m tests.lab.lockout --faults 1 --seed 7 --only 1" in report.table()
    document = json.loads(json.dumps(report.to_json()))
    assert document["schema"] == 1
    assert document["rounds"][0]["round"]["fault"] == one.fault


def test_ends_are_of_known_faults() -> None:
    assert set(ENDS) <= {fault.name for fault in FAULTS}
