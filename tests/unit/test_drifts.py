"""The drifts of tests/lab/drifts.py: each is in a row that there is, with the words an operation says."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeHost, FakeState, create_host

from operations import agent_access, apt, docker, files, notes, secret, tailnet, timers, ufw, units
from quietport import ufw_rules
from tests.lab.drifts import DRIFTS, PAST_UFW, PROOF, PROOF_SAYS, Drift, share, unclaimed

ROOT = Path(__file__).parents[2]
BY_NAME = {drift.name: drift for drift in DRIFTS}


def test_names_and_words_are_each_ones_own() -> None:
    """A plan is asked for each on its own, also where a host has all of them."""
    for key in ("name", "says", "make"):
        counts = Counter(getattr(one, key) for one in DRIFTS)
        assert [what for what, count in counts.items() if count > 1] == []
    for drift in DRIFTS:
        others = [one for one in DRIFTS if one is not drift and one.row == drift.row]
        assert [one.name for one in others if drift.says.startswith(one.also or ("\0",))] == []


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["c", "b", "a"]])
def test_every_drift_is_on_one_host(names: list[str]) -> None:
    shares = share(names)
    assert sorted(shares) == sorted(names)
    assert sorted(drift.name for drifts in shares.values() for drift in drifts) == sorted(BY_NAME)


def test_what_nobody_did_is_told() -> None:
    drift = BY_NAME["a rule of ours removed"]
    rows = {drift.row: [drift.says], PROOF: [PROOF_SAYS]}
    assert list(unclaimed(rows, [drift])) == []
    assert list(unclaimed({drift.row: [drift.says, "another"]}, [drift])) == [f"{drift.row}: another"]
    assert list(unclaimed({"a row": [drift.says]}, [drift])) == [f"a row: {drift.says}"]
    assert list(unclaimed({PROOF: ["something"]}, [drift])) == [f"{PROOF}: something"]
    assert list(unclaimed(rows, [replace(drift, says="else")])) == [f"{drift.row}: {drift.says}"]


# --- rows ---


def names_in_deploys() -> list[re.Pattern[str]]:
    """The names of all operations in deploys/, with anything where something is filled in."""
    found = []
    for file in (ROOT / "deploys").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            texts = (ast.JoinedStr, ast.Constant)
            if isinstance(node, ast.keyword) and node.arg == "name" and isinstance(node.value, texts):
                parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
                text = "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts
                )
                found.append(re.compile(text))
    return found


def test_every_row_is_the_name_of_an_operation() -> None:
    names = names_in_deploys()
    assert len(names) > 30
    rows = {drift.row for drift in DRIFTS} | {PROOF}
    assert sorted(row for row in rows if not any(name.fullmatch(row) for name in names)) == []
    assert not any(name.fullmatch("firewall: something else") for name in names), "the control"


# --- words ---

FIREWALL = {
    "installed": True,
    "active": True,
    "defaults": {"incoming": "deny", "outgoing": "allow", "routed": "deny"},
    "ipv6": True,
    "policies": {"ipv4": {"INPUT": "DROP"}, "ipv6": {"INPUT": "DROP"}},
    "rules": [rule.shown() for rule in ufw_rules.WANTED],
}
ON_IPV4 = {"policies": {**FIREWALL["policies"], "ipv4": {"INPUT": "ACCEPT"}}}  # type: ignore[dict-item]
STAYS_OFF = {"enabled": False}
LOST = {"lost": {"ipv4": [], "ipv6": ["allow in on tailscale0"]}}
OURS: list[str] = FIREWALL["rules"]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "changed", "at_boot"),
    [
        ("a rule of ours removed", {"rules": OURS[:1]}, True),
        ("the order of the rules changed", {"rules": ["deny from 203.0.113.9", *OURS]}, True),
        (
            "a rule with our mark added",
            {"rules": [*OURS, "allow 9090/tcp comment 'quietport: by hand'"]},
            True,
        ),
        ("the kernel's policy opened", ON_IPV4, True),
        ("a default of ufw changed", {"defaults": {**FIREWALL["defaults"], "outgoing": "deny"}}, True),  # type: ignore[dict-item]
        ("the firewall not started at boot", {}, False),
        ("the firewall told to stay off", STAYS_OFF, True),
        ("a rule of ours taken out of the kernel", LOST, True),
    ],
)
def test_the_firewall_says_so(name: str, changed: dict[str, Any], at_boot: bool) -> None:
    assert ufw_rules.reasons(FIREWALL, ipv6=True, at_boot=True) == []
    found = ufw_rules.reasons({**FIREWALL, **changed}, ipv6=True, at_boot=at_boot)
    assert BY_NAME[name].says in found
    assert [reason for reason in found if not BY_NAME[name].claims(reason)] == []


@pytest.mark.parametrize(
    ("changed", "prune", "said"),
    [
        (["allow 8081/tcp", *OURS], True, ["rule that is not ours: allow 8081/tcp"]),
        (["allow 8081/tcp", *OURS], False, []),
        (
            [OURS[0], "deny 41641/udp"],
            False,
            ["rule that contradicts ours: deny 41641/udp", "rule missing: allow 41641/udp"],
        ),
        ([OURS[0], "allow 41641/udp"], False, ["rule without our mark: allow 41641/udp"]),
    ],
)
def test_a_rule_is_named_by_what_it_is(changed: list[str], prune: bool, said: list[str]) -> None:
    found = ufw_rules.reasons({**FIREWALL, "rules": changed}, ipv6=True, at_boot=True, prune_foreign=prune)
    assert found == said


def test_a_rule_past_ufw_is_told_from_those_of_ufw_and_tailscaled() -> None:
    jumps = ("ts-input", "ufw-before-input", "ufw6-track-input")
    usual = "".join(["-P INPUT DROP\n", *(f"-A INPUT -j {jump}\n" for jump in jumps)])
    assert ufw_rules.past_ufw(usual) == []
    rule = f"-A {PAST_UFW}"
    others = "-A INPUT -j sshguard\n-A FORWARD -j ACCEPT\n-A ufw-user-input -p tcp -j ACCEPT\n"
    assert ufw_rules.past_ufw(f"{usual}{rule}\n{others}") == [rule, "-A INPUT -j sshguard"]


def test_reasons_are_there_exactly_where_there_is_work() -> None:
    """What is said and what is done come from the same state; neither is without the other."""
    for rules in ([], OURS, OURS[:1], OURS[::-1], ["deny 1/tcp", *OURS], [*OURS, "allow 80/tcp"]):
        for changed in ({}, ON_IPV4, {"active": False}, {"ipv6": False}, {"defaults": {}}, STAYS_OFF, LOST):
            for at_boot in (True, False):
                state = {**FIREWALL, "rules": rules, **changed}
                work = ufw._commands(state, ipv6=True, at_boot=at_boot, prune_foreign=True, break_glass=())
                said = ufw_rules.reasons(state, ipv6=True, at_boot=at_boot, prune_foreign=True)
                assert bool(work) == bool(said), (state, at_boot)


def state_of(path: str, **changed: Any) -> dict[str, Any]:
    wanted = {"kind": "file", "mode": "0644", "user": "root", "group": "root", "sha256": None}
    return {f"path={path}": {**wanted, **changed}}


def unit(name: str, *, enabled: str = "enabled", active: str = "active") -> dict[str, Any]:
    return {f"names=['{name}']": {name: {"enabled": enabled, "active": active, "need_reload": False}}}


def private(mode: str) -> dict[str, Any]:
    return {"kind": "directory", "mode": mode, "user": "root", "group": "root", "packaged": False}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], Callable[[], Any]], list[str]]:
    """What is noted while an operation's generator is asked, on a host with these facts."""

    def ask(facts: dict[str, Any], generate: Callable[[], Any]) -> list[str]:
        state = FakeState()
        monkeypatch.setattr(FakeHost, "current_op_hash", "it")
        collected = notes.collect()
        try:
            with ctx_state.use(state), ctx_host.use(create_host(state, facts=facts)):
                notes.begin()
                list(generate())
        finally:
            notes.forget()
        (note,) = [note for host in collected.of.values() for note in host.values()]
        return note.reasons

    return ask


def test_a_secret_that_differs_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    path = BY_NAME["a secret changed"].row.removeprefix("secrets: ")
    monkeypatch.setenv("QP_DRIFT_SECRET", "the-secret-itself")
    folder = path.rpartition("/")[0]
    facts = {
        "parents.Parents": {f"path={path}": {folder: private("0700")}},
        "files.FileState": state_of(path, mode="0600", sha256="0" * 64),
    }
    monkeypatch.setattr(FakeHost, "current_op_hash", "it")
    collected = notes.collect()
    try:
        with ctx_state.use(FakeState()), ctx_host.use(create_host(FakeState(), facts=facts)):
            list(secret.file._inner(path, "env:QP_DRIFT_SECRET"))
    finally:
        notes.forget()
    (note,) = [note for host in collected.of.values() for note in host.values()]
    assert note.reasons == [BY_NAME["a secret changed"].says]
    assert note.differences == {}
    assert "the-secret-itself" not in repr(collected)


Ask = Callable[[dict[str, Any], Callable[[], Any]], list[str]]
SECRET = BY_NAME["a secret's directory loosened"].row.removeprefix("secrets: ")


@pytest.mark.parametrize(
    ("name", "facts", "generate"),
    [
        (
            "a mode loosened",
            {
                "files.FileState": state_of(
                    "/etc/apt/apt.conf.d/52quietport",
                    mode="0666",
                    sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                ),
                "files.FileText": {"path=/etc/apt/apt.conf.d/52quietport": ""},
            },
            lambda: files.put_if_needed("/etc/apt/apt.conf.d/52quietport", ""),
        ),
        (
            "a unit's drop-in edited",
            {
                "files.FileState": state_of("/etc/systemd/system/ufw.service.d/quietport.conf"),
                "files.FileText": {"path=/etc/systemd/system/ufw.service.d/quietport.conf": "x"},
            },
            lambda: units.files_if_needed({"/etc/systemd/system/ufw.service.d/quietport.conf": "y"}),
        ),
        (
            "a directory's mode loosened",
            {"files.FileState": state_of("/var/log/quietport", kind="directory", mode="0777")},
            lambda: files.directory._inner("/var/log/quietport", mode="0750"),
        ),
        (
            "the limits of a repository removed",
            {"files.FileState": state_of("/etc/apt/preferences.d/quietport-tailscale", kind="absent")},
            lambda: files.put_if_needed("/etc/apt/preferences.d/quietport-tailscale", ""),
        ),
        (
            "a secret's directory loosened",
            {},
            lambda: secret._folders({SECRET.rpartition("/")[0]: private("0755")}),
        ),
        (
            "a package removed",
            {"packages.Packages": {"names=['curl']": {"curl": None}}},
            lambda: apt.packages._inner(("curl",)),
        ),
        (
            "a daemon not started at boot",
            {
                "packages.Packages": {"names=['tailscale']": {"tailscale": "1"}},
                "units.Units": unit("tailscaled.service", enabled="disabled"),
            },
            tailnet.installed._inner,
        ),
        (
            "a timer disabled",
            {"units.Units": unit("quietport-report.timer", enabled="disabled", active="inactive")},
            lambda: units.enable_if_needed("quietport-report.timer"),
        ),
        (
            "the guard not started at boot",
            {"units.Units": unit("quietport-guard-boot.service", enabled="disabled", active="inactive")},
            lambda: units.enable_if_needed("quietport-guard-boot.service", running=False),
        ),
        (
            "a timer of an older version",
            {"units.OwnTimers": ["quietport-old", "quietport-report"]},
            lambda: timers.no_others._inner(["quietport-report"]),
        ),
        (
            "an agent's runtime directory taken away",
            {"files.FileState": state_of("/var/lib/systemd/linger/agent", kind="absent")},
            lambda: agent_access.lingering._inner("agent"),
        ),
        (
            "DOCKER-USER flushed",
            {
                "units.Units": unit("quietport-docker-user.service"),
                "docker_user.DockerUserChain": {"as_wanted": False},
            },
            docker._chain_runs,
        ),
    ],
)
def test_an_operation_says_so(
    said: Ask, name: str, facts: dict[str, Any], generate: Callable[[], Any]
) -> None:
    drift: Drift = BY_NAME[name]
    reasons = said(facts, generate)
    assert drift.says in reasons
    assert [reason for reason in reasons if not drift.claims(reason)] == []


def test_a_preference_says_so(said: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = tailnet.Membership(hostname="vps1", login_server="https://x")
    prefs = {**membership.preferences(), "accept_routes": True}
    running = {"installed": True, "running": True, "backend_state": "Running"}
    facts = {"tailnet.Tailnet": {**running, "prefs": prefs}}
    monkeypatch.setattr(tailnet.gate, "reached_by", lambda host: "public")
    found = said(facts, lambda: tailnet.preferences._inner(membership))
    assert found == [BY_NAME["a preference of tailscale changed"].says]
