"""The pure parts of killing the converge: where the kills go, and what is said of what was seen."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import hoststate, outlook
from tests.lab.fingerprint import Fingerprint, differences
from tests.lab.kills import (
    KINDS,
    PROVEN,
    RISKY,
    Chain,
    Kill,
    Operation,
    Report,
    Result,
    Shot,
    aim,
    aims,
    plan,
    waited_for,
)
from tests.lab.outlook import Outlook, View, is_public

OPERATIONS = (
    Operation("preflight: possible", 0.2),
    Operation("packages: apt is ready", 0.1),
    Operation("packages: base packages", 10.0),
    Operation("users: agent", 0.2),
    Operation("tailscale: installed", 5.0),
    Operation("firewall: drop-in", 0.2),
    Operation("firewall: rules", 2.0),
    Operation("ssh: answers the tailnet alone", 4.0),
)


# Where the kills go


def test_a_seed_is_a_plan_and_another_is_another() -> None:
    assert plan(kills=30, seed=7) == plan(kills=30, seed=7)
    assert plan(kills=30, seed=7) != plan(kills=30, seed=8)


@pytest.mark.parametrize("kills", [1, 2, 3, 30, 200])
def test_every_kill_is_in_the_plan_on_every_host_and_from_both_beginnings(kills: int) -> None:
    chains = plan(kills=kills, seed=7)
    assert sum(len(chain.shots) for chain in chains) == kills
    assert [chain.number for chain in chains] == list(range(1, len(chains) + 1))
    if kills >= 30:
        assert {chain.host for chain in chains} == {kind.name for kind in KINDS}
        assert {chain.begins for chain in chains} == {"blank", "drifted"}
        strata = Counter(shot.stratum for chain in chains for shot in chain.shots)
        assert strata["risky"] >= kills // 3


def test_the_first_chains_of_a_longer_campaign_are_those_of_a_shorter_one() -> None:
    assert plan(kills=300, seed=7)[:6] == plan(kills=30, seed=7)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_every_shot_hits_an_operation(where: float, when: float) -> None:
    for stratum in ("risky", "operation", "time"):
        one = aim(Shot(stratum, where, when, 0), OPERATIONS)
        hit = OPERATIONS[one.number - 1]
        assert one.name == hit.name
        assert 0 <= one.delay <= max(hit.took, 0.3)
        if stratum == "risky":
            assert hit.name.startswith(RISKY)


def test_a_shot_by_time_hits_the_operations_that_take_it() -> None:
    hits = Counter(aim(Shot("time", at / 1000, 0, 0), OPERATIONS).name for at in range(1000))
    total = sum(one.took for one in OPERATIONS)
    assert hits["packages: base packages"] == pytest.approx(1000 * 10 / total, abs=2)
    assert set(hits) == {one.name for one in OPERATIONS}


def test_a_chain_gets_further_with_each_kill() -> None:
    shots = (Shot("risky", 0.9, 0.5, 0), Shot("operation", 0, 0, 0), Shot("operation", 0.3, 0, 0))
    assert [one.number for one in aims(Chain(1, "k13", "blank", shots), OPERATIONS)] == [1, 3, 8]


def test_a_host_that_drifted_is_not_killed_in_steps_that_have_nothing_to_do() -> None:
    shots = (Shot("operation", 0, 0, 0), Shot("time", 0.999, 0, 0), Shot("risky", 0, 0.5, 0))
    found = aims(Chain(1, "k13", "drifted", shots), OPERATIONS)
    assert [(one.number, one.name) for one in found] == [
        (4, "users: agent"),
        (6, "firewall: drop-in"),
        (8, "ssh: answers the tailnet alone"),
    ]


def test_a_failure_is_told_with_the_command_that_does_it_again() -> None:
    chains = plan(kills=30, seed=7)
    kill = Kill("a", 0.5, "b", "public", 0.1)
    results = [Result(chains[0], [kill]), Result(chains[1], [kill], failures=["due: ssh.service is old"])]
    report = Report(30, 7, results)
    again = "python -m tests.lab.kills --kills 30 --seed 7 --only 2"
    assert [result.chain.number for result in report.failed] == [2]
    assert report.table().count("again:") == 1
    assert again in report.table()
    document = json.loads(json.dumps(report.to_json()))
    assert document["chains"][1]["again"] == again
    assert document["chains"][1]["kills"][0]["landed"] == "b"


def test_what_a_killed_run_left_at_work_is_read_from_the_next() -> None:
    text = (
        "    [k13]  waiting for what a converge that ended without finishing began: dpkg-deb (pid 799).\n"
        "    [k13]  the converge of root@vm (process 2) since TIME UTC ended without finishing;"
        " this one goes on from there.\n"
    )
    assert waited_for(text) == ["dpkg-deb (pid 799)"]
    assert waited_for("    [k13]  No changes\n") == []


# What was seen


def view(*lines: tuple[float, str | None, object]) -> View:
    seen = View()
    for line in lines:
        seen.take(json.dumps(line))
    return seen


SSHD = "tcp 0.0.0.0 22"
OURS = "tcp 100.64.0.3 22"


def test_what_was_open_before_may_be_and_may_restart_and_go() -> None:
    seen = view(
        (1, SSHD, True), (1, None, 1), (9, SSHD, False), (9.5, SSHD, True), (20, SSHD, False), (30, None, 9)
    )
    assert seen.opened() == []
    assert Outlook(seen, seen).violations() == []


def test_what_opens_is_news() -> None:
    seen = view((1, SSHD, True), (1, None, 1), (9, "tcp :: 2222", True), (9.1, "tcp :: 2222", False))
    assert seen.opened() == ["tcp :: 2222, 8.0 s after the beginning"]
    first, second = Outlook(seen, seen).violations()
    assert "a public listener that was not there before: tcp :: 2222" in first
    assert "reached from the public side, as not before: tcp :: 2222" in second


def test_what_had_gone_and_comes_back_is_news() -> None:
    seen = view((1, SSHD, True), (1, None, 1), (9, SSHD, False), (19, SSHD, True))
    assert seen.opened() == [f"{SSHD}, 18.0 s after the beginning, 10.0 s after it had closed"]


def test_what_was_open_before_comes_back_while_nothing_is_proven_and_never_after() -> None:
    seen = view((1, SSHD, True), (1, None, 1), (9, SSHD, False), (19, SSHD, True))
    assert seen.opened(proven_at=30) == []
    assert Outlook(seen, seen).violations(proven_at=math.inf) == []
    assert len(seen.opened(proven_at=18.5)) == 1
    # What was never open is news at any time.
    other = view((1, SSHD, True), (1, None, 1), (9, "tcp :: 2222", True))
    assert len(Outlook(other, View()).violations(proven_at=math.inf)) == 1


def test_the_proof_is_noted_once() -> None:
    result = Result(plan(kills=30, seed=7)[0])
    result.heard("killed half-way")
    assert result.proven_at is None
    result.heard(f"    [k13]  a new key login was accepted by sshd. {PROVEN}")
    first = result.proven_at
    assert first is not None
    result.heard(PROVEN)
    assert result.proven_at == first


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("tcp 0.0.0.0 22", True),
        ("tcp :: 22", True),
        ("tcp 10.213.4.13 40000", True),
        ("tcp ::ffff:10.0.0.1 80", True),
        ("udp 0.0.0.0 53", True),
        ("tcp 127.0.0.1 22", False),
        ("tcp ::1 22", False),
        ("tcp ::ffff:127.0.0.1 80", False),
        ("tcp 100.64.0.3 22", False),
        ("tcp fd7a:115c:a1e0::3 41112", False),
        ("udp 0.0.0.0 41641", False),
        ("udp 0.0.0.0 68", False),
        ("udp :: 51312", False),
    ],
)
def test_who_could_be_reached_by_the_public(name: str, *, public: bool) -> None:
    assert is_public(name) is public


def test_a_listener_on_the_tailnet_is_no_news() -> None:
    seen = view((1, SSHD, True), (1, None, 1), (9, OURS, True), (9, SSHD, False), (99, None, 900))
    assert Outlook(seen, View()).violations() == []
    assert Outlook(seen, View()).without_sshd() == 0


def test_the_time_without_sshd_is_measured_whatever_its_address() -> None:
    seen = view(
        (1, SSHD, True), (1, None, 1), (9, SSHD, False), (12, OURS, True), (20, OURS, False), (21, None, 9)
    )
    assert Outlook(seen, View()).without_sshd() == 3
    gone = view((1, SSHD, True), (1, None, 1), (9, SSHD, False), (30, None, 9))
    assert Outlook(gone, View()).without_sshd() == 21


def test_the_watcher_of_listeners_sees_one_open_and_close() -> None:
    argv = [sys.executable, "-I", "-c", outlook._INSIDE]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    seen = View()
    assert process.stdout is not None
    try:
        while not seen.began:
            seen.take(process.stdout.readline())
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            name = f"tcp 127.0.0.1 {listener.getsockname()[1]}"
            while name not in seen.names:
                seen.take(process.stdout.readline())
        while seen.of(name).news[-1].open:
            seen.take(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
    assert name not in seen.before
    assert [one.open for one in seen.of(name).news] == [True, False]


# Whether two hosts are the same


def state(**changes: str) -> Fingerprint:
    facts = {"file": {"/etc/a": "-rw-r--r-- 0:0 one\ntwo\n"}, "unit": {"ssh.service is": "enabled"}}
    for name, text in changes.items():
        area, _, key = name.partition("__")
        facts[area][key.replace("_", "/")] = text
    return Fingerprint(facts, ())


def test_the_same_is_the_same() -> None:
    assert differences(state(), state()) == []


def test_every_kind_of_difference_is_said() -> None:
    found = Fingerprint({"file": {"/etc/b": "x"}, "unit": {"ssh.service is": "masked"}}, ("sshd is old",))
    assert differences(state(), found) == [
        "due: sshd is old",
        "file /etc/a: missing",
        "file /etc/b: is there, and should not: x",
        "unit ssh.service is: masked, not enabled",
    ]
    changed = state(file___etc_a="-rw-r--r-- 0:0 one\nthree\n")
    assert differences(state(), changed) == ["file /etc/a: -two / +three"]


def test_files_are_told_with_mode_and_owner_and_secrets_by_their_digest(tmp_path: Path) -> None:
    (tmp_path / "open").write_text("at 100.64.0.3\n")
    (tmp_path / "secret").write_text("hush")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "link").symlink_to("/somewhere/100.64.0.3")
    plain = hoststate.replacer([["100.64.0.3", "TAILNET4"], ["", "nothing"]])
    found = {Path(path).name: text for path, text in hoststate.contents([str(tmp_path)], plain).items()}
    assert "-rw-r--r--" in found["open"]
    assert "at TAILNET4" in found["open"]
    assert "hush" not in found["secret"]
    assert found["link"].endswith("-> /somewhere/TAILNET4")
    before = found["secret"]
    (tmp_path / "secret").chmod(0o640)
    assert hoststate.contents([str(tmp_path)], plain)[str(tmp_path / "secret")] != before


def test_an_address_is_no_part_of_another_one() -> None:
    plain = hoststate.replacer([["100.64.0.3", "TAILNET4"], ["fd7a::5", "TAILNET6"]])
    assert plain("100.64.0.3:22 [fd7a::5]:22 100.64.0.3/32") == "TAILNET4:22 [TAILNET6]:22 TAILNET4/32"
    others = "100.64.0.33 fd7a::53 1100.64.0.3"
    assert plain(others) == others


def test_the_order_of_our_rules_counts_and_that_of_daemons_among_themselves_does_not() -> None:
    head = "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -j DOCKER-USER\n"
    ts, ufw, more = "-A FORWARD -j ts-forward\n", "-A FORWARD -j ufw-a\n", "-A FORWARD -j ufw-b\n"
    wanted = hoststate.saved_rules(head + ts + ufw + more)
    assert wanted["filter FORWARD"].startswith("policy DROP\n-A FORWARD -j ufw-a\n-A FORWARD -j ufw-b")
    assert hoststate.saved_rules(head + ufw + more + ts) == wanted
    assert hoststate.saved_rules(head + ts + more + ufw) != wanted
    assert hoststate.saved_rules(head + ufw + more) != wanted


@pytest.mark.parametrize(
    ("path", "by_chance"),
    [
        ("/etc/ssh/.quietport.AbCdEf0123", False),
        ("/run/quietport-join.AbCdEf0123", False),
        ("/tmp/pyinfra-0123", False),
        ("/var/lib/quietport/half", False),
        ("/var/cache/apt/archives/partial/x", True),
        ("/run/systemd/units", True),
        ("/proc/1", True),
    ],
)
def test_what_a_killed_run_could_leave_is_looked_for(path: str, *, by_chance: bool) -> None:
    assert bool(hoststate.PATHS_BY_CHANCE.match(path)) is by_chance
