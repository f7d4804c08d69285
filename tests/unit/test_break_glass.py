"""Break-glass: sshd on every address, behind a firewall that admits the declared networks alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.errors import SettingsError
from control.settings import HostSettings, parse_fleet
from deploys import programs, timers
from operations import tailnet
from quietport import sshd, sshd_wait, survey, ufw_rules
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_NETWORKS, PUBLIC_SSHD
from quietport.net import Interfaces
from quietport.ports import PublicSshd, judge
from quietport.processes import Program
from quietport.ss import Listener, Process
from quietport.sshd_apply import Host

OFFICE = "203.0.113.0/24"
TAILNET = ["100.64.0.7", "fd7a:115c:a1e0::7"]
FILE = Path("/etc/quietport-test/hosts.toml")


def told(*networks: str) -> HostSettings:
    listed = ", ".join(f'"{network}"' for network in networks)
    text = f'[hosts.a]\naddress = "192.0.2.1"\nbreak_glass_cidrs = [{listed}]\n'
    return parse_fleet(text, file=FILE).hosts["a"]


# --- the setting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (OFFICE, OFFICE),
        ("203.0.113.7", "203.0.113.7/32"),
        ("2001:DB8:0::/48", "2001:db8::/48"),
        ("2001:db8::7", "2001:db8::7/128"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
    ],
)
def test_networks_have_one_spelling(written: str, kept: str) -> None:
    assert told(written).break_glass_cidrs == (kept,)


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        (
            ["203.0.113.7/24"],
            "has 203.0.113.7/24, an address inside of a network; the network is 203.0.113.0/24",
        ),
        (["2001:db8::1/64"], "the network is 2001:db8::/64"),
        (["0.0.0.0/0"], "lets everybody in (0.0.0.0/0)"),
        (["::/0"], "lets everybody in (::/0)"),
        (["0.0.0.0/1", "128.0.0.0/1"], "lets everybody in (0.0.0.0/0)"),
        (["::ffff:203.0.113.0/120"], "write it as the IPv4 network it is"),
        (["office"], "must be a list of networks such as 203.0.113.0/24 or 2001:db8::/48, not 'office'"),
        (["203.0.113.0/33"], "must be a list of networks"),
        (["fe80::%eth0/64"], "must be a list of networks"),
        ([""], "must be a list of networks"),
        ([OFFICE, OFFICE], "names a network twice"),
    ],
)
def test_what_is_no_network_is_one_sentence(networks: list[str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        told(*networks)
    assert f"{FILE}: [hosts.a]: break_glass_cidrs" in caught.value.what
    assert words in caught.value.what
    assert "\n" not in caught.value.what


def test_a_list_is_wanted() -> None:
    text = f'[hosts.a]\naddress = "192.0.2.1"\nbreak_glass_cidrs = "{OFFICE}"\n'
    with pytest.raises(SettingsError, match="must be a list in square brackets"):
        parse_fleet(text, file=FILE)


def test_it_is_not_set_unless_it_is_set() -> None:
    settings = HostSettings(address="192.0.2.1")
    assert settings.break_glass_cidrs == ()
    assert programs.declared("a", settings)[PUBLIC_SSHD] is False
    declared = programs.declared("a", told(OFFICE))
    assert (declared[PUBLIC_SSHD], declared[PUBLIC_NETWORKS]) == (True, [OFFICE])


def test_a_node_that_expires_is_fine_with_it() -> None:
    state: dict[str, Any] = {
        "installed": True,
        "running": True,
        "backend_state": "Running",
        "expired": False,
        "login_server": HostSettings(address="192.0.2.1").login_server,
        "addresses": TAILNET,
        "key_expiry": "2027-01-01T00:00:00Z",
    }
    assert "expires on" in str(tailnet.blocking_reason(state, HostSettings(address="192.0.2.1")))
    assert tailnet.blocking_reason(state, told(OFFICE)) is None
    assert tailnet.blocking_reason({**state, "addresses": []}, told(OFFICE)) is not None


def test_only_there_the_report_may_ask_the_firewall() -> None:
    assert timers.declared(HostSettings(address="192.0.2.1")) == list(timers.TIMERS)
    may = [
        {one.name for one in some if "CAP_NET_ADMIN" in one.capabilities}
        for some in (timers.TIMERS, timers.declared(told(OFFICE)))
    ]
    assert may[1] - may[0] == {"report"}


# --- host.json on the way back ------------------------------------------------------------------------

ALLOWED = {"schema": 1, PUBLIC_SSHD: True, PUBLIC_NETWORKS: [OFFICE]}


@pytest.mark.parametrize(
    ("old", "drop_in", "left"),
    [
        (json.dumps(ALLOWED), sshd.render((), public=sshd.public_listeners()), True),
        (json.dumps(ALLOWED), sshd.render(TAILNET), False),
        (json.dumps(ALLOWED), None, False),
        (json.dumps({**ALLOWED, PUBLIC_SSHD: False}), sshd.render((), public=sshd.public_listeners()), False),
        (None, sshd.render((), public=sshd.public_listeners()), False),
        ("[]", sshd.render((), public=sshd.public_listeners()), False),
        ("{", sshd.render((), public=sshd.public_listeners()), False),
        (json.dumps(ALLOWED), "ListenAddress somewhere\n", False),
    ],
)
def test_what_sshd_makes_use_of_stays_allowed(old: str | None, drop_in: str | None, *, left: bool) -> None:
    """Else a rollback could not start sshd as it was."""
    files = {} if drop_in is None else {sshd.DROP_IN: drop_in}
    expected = {PUBLIC_SSHD: True, PUBLIC_NETWORKS: [OFFICE]} if left else {}
    assert programs.still_allowed(old, files) == expected


# --- sshd's lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalties", [False, True])
@pytest.mark.parametrize("root", ["prohibit-password", "no"])
def test_wildcards_stand_in_the_tailnets_place_and_the_way_back_is_exact(
    root: str, *, penalties: bool
) -> None:
    closed = sshd.render(TAILNET, permit_root_login=root, penalties=penalties)
    for ipv6, lines in ((True, ["0.0.0.0:22", "[::]:22"]), (False, ["0.0.0.0:22"])):
        public = sshd.public_listeners(ipv6=ipv6)
        text = sshd.render(TAILNET, permit_root_login=root, penalties=penalties, public=public)
        assert [line for line in text.splitlines() if line.startswith("ListenAddress")] == [
            f"ListenAddress {line}" for line in lines
        ]
        assert "100.64.0.7" not in text
        assert sshd.with_addresses(text, TAILNET) == closed
        for keys_only in ("PasswordAuthentication no", "AuthenticationMethods publickey"):
            assert f"\n{keys_only}\n" in text


# --- the firewall's rules -----------------------------------------------------------------------------


def test_each_network_has_a_rule_as_ufw_shows_it() -> None:
    networks = [OFFICE, "198.51.100.7/32", "2001:db8:7::/48", "2001:db8::1/128"]
    shown = [rule.shown() for rule in ufw_rules.rules_for(networks)]
    assert shown[: len(ufw_rules.WANTED)] == [rule.shown() for rule in ufw_rules.WANTED]
    sources = [rule.split()[2] for rule in shown[len(ufw_rules.WANTED) :]]
    assert sources == [OFFICE, "198.51.100.7", "2001:db8:7::/48", "2001:db8::1"]
    assert shown[2] == f"allow from {OFFICE} to any port 22 proto tcp comment 'quietport: break-glass, ssh'"
    assert all(map(ufw_rules.is_ours, shown))
    without = ufw_rules.rules_for(networks, ipv6=False)
    assert [rule.text for rule in without if ufw_rules.for_ipv6_alone(rule.text)] == []
    assert len(without) == len(ufw_rules.WANTED) + 2


def listed(rules: Sequence[str]) -> list[str]:
    """As `ufw show added` has them: those for IPv6 alone come last."""
    return sorted(rules, key=ufw_rules.for_ipv6_alone)


def after(rules: Sequence[str], done: ufw_rules.Changes) -> list[str]:
    """The rules after `done`, as ufw keeps them: one that differs in its comment alone stays in its place."""
    kept = [rule for rule in rules if ufw_rules.bare(rule) not in done.delete]
    new = {rule.text: rule for rule in done.add}
    kept = [new.pop(ufw_rules.bare(rule)).shown() if ufw_rules.bare(rule) in new else rule for rule in kept]
    return listed([rule.shown() for rule in done.prepend] + kept + [rule.shown() for rule in new.values()])


NETWORKS = [OFFICE, "198.51.100.7/32", "2001:db8:7::/48"]
RULES = st.sampled_from(
    [
        *("allow 22/tcp", "deny 22/tcp", "reject from any", "allow in on tailscale0", "limit 41641/udp"),
        *("deny from 2001:db8::/32", "allow from 2001:db8:9::/48 to any port 80 proto tcp"),
        f"deny from {OFFICE} to any port 22 proto tcp",
        "allow from 2001:db8:7::/48 to any port 22 proto tcp comment 'quietport: an older word'",
        "allow 22/tcp comment 'quietport: opened by hand'",
        *(rule.shown() for rule in ufw_rules.rules_for(NETWORKS)),
    ]
)


@given(
    st.lists(RULES, max_size=6, unique_by=lambda rule: ufw_rules.traffic(rule)),
    st.lists(st.sampled_from(NETWORKS), unique=True, max_size=3),
    st.booleans(),
)
def test_one_converge_is_enough_there_and_back(rules: list[str], networks: list[str], prune: bool) -> None:
    ours = ufw_rules.rules_for(networks)
    rules = listed(rules)
    first = ufw_rules.changes(rules, prune_foreign=prune, ours=ours)
    there = after(rules, first)
    assert not ufw_rules.changes(there, prune_foreign=prune, ours=ours)
    assert {rule.shown() for rule in ours} <= set(there)
    assert [
        rule
        for rule in there
        if ufw_rules.is_ours(rule) and ufw_rules.bare(rule) not in {r.text for r in ours}
    ] == []
    back = after(there, ufw_rules.changes(there, prune_foreign=prune))
    assert not ufw_rules.changes(back, prune_foreign=prune)
    assert {rule for rule in back if ufw_rules.is_ours(rule)} == {rule.shown() for rule in ufw_rules.WANTED}


def test_a_rule_for_ipv6_alone_is_not_moved_for_what_ufw_lists_before_it() -> None:
    """Where it really stands is not seen; taken out and put back, it would never come to rest."""
    ours = ufw_rules.rules_for(["2001:db8:7::/48"])
    rules = [*(rule.shown() for rule in ufw_rules.WANTED), "deny 22/tcp"]
    first = ufw_rules.changes(rules, prune_foreign=False, ours=ours)
    assert [rule.text for rule in first.prepend] == [ours[-1].text]
    assert not ufw_rules.changes([*rules, ours[-1].shown()], prune_foreign=False, ours=ours)
    behind = [*rules, "deny from 2001:db8::/32", ours[-1].shown()]
    assert ufw_rules.changes(behind, prune_foreign=False, ours=ours).delete == (ours[-1].text,)


# --- the policy ---------------------------------------------------------------------------------------

HOST = Interfaces(owners={"203.0.113.5": ("eth0",)}, kinds={"eth0": "public", "lo": "loopback"})
SSHD = Program(unit="ssh.service", executable="/usr/sbin/sshd")


def listener(address: str = "0.0.0.0", **changes: Any) -> Listener:
    plain = Listener(protocol="tcp", address=address, port=22, processes=(Process("sshd", 7),))
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("socket", "program", "state", "verdict"),
    [
        (listener(), SSHD, PublicSshd(), "allowed"),
        (listener("::"), SSHD, PublicSshd(), "allowed"),
        (listener("*"), SSHD, PublicSshd(), "allowed"),
        (listener(), replace(SSHD, executable="/usr/sbin/sshd (deleted)"), PublicSshd(), "allowed"),
        (listener(), SSHD, None, "violation"),
        (listener(), SSHD, PublicSshd("ufw is down."), "violation"),
        (listener(), replace(SSHD, unit="ssh@1.service"), PublicSshd(), "violation"),
        (listener(), replace(SSHD, executable="/tmp/sshd"), PublicSshd(), "violation"),
        (listener(port=2222), SSHD, PublicSshd(), "violation"),
        (listener("203.0.113.5"), SSHD, PublicSshd(), "violation"),
        (listener(zone="eth0"), SSHD, PublicSshd(), "violation"),
        (listener(protocol="udp"), SSHD, PublicSshd(), "violation"),
        (listener(processes=()), SSHD, PublicSshd(), "violation"),
        (listener(processes=(Process("sshd", 7), Process("sshd", 8))), SSHD, PublicSshd(), "violation"),
    ],
)
def test_only_the_declared_sshd_may_be_public(
    socket: Listener, program: Program, state: PublicSshd | None, verdict: str
) -> None:
    judged = judge(socket, HOST, {7: program}, state)
    assert (judged.exposure, judged.verdict) == ("public", verdict)
    assert bool(judged.hint) == (verdict == "violation")
    if state is not None and state.problem:
        assert judged.hint == state.problem


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({}, None),
        ({PUBLIC_SSHD: "yes"}, None),
        ({PUBLIC_SSHD: True}, "No network"),
        (ALLOWED, "ufw does not keep IPv4 closed"),
    ],
)
def test_the_host_asks_its_firewall(
    declared: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "host_settings", lambda: declared)
    monkeypatch.setattr(survey.admission, "read", lambda family: "-P INPUT ACCEPT\n")
    found = survey._public_sshd()
    assert (found is None) == (expected is None)
    assert found is None or expected is None or expected in found.problem


# --- sshd's start -------------------------------------------------------------------------------------


def test_a_start_in_public_needs_the_declaration_and_the_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: dict[str, Any] = {}
    problems = ["ufw does not keep IPv4 closed."]
    monkeypatch.setattr(sshd_wait, "host_settings", lambda: declared)
    monkeypatch.setattr(sshd_wait.admission, "firewall_problem", lambda: problems[0])
    assert "does not say that it may" in sshd_wait.why_not_public()
    declared[PUBLIC_SSHD] = True
    assert sshd_wait.why_not_public() == problems[0]
    problems[0] = ""
    assert sshd_wait.why_not_public() == ""


class Machine(Host):
    """Files below a directory; sshd listens where the drop-in of the candidate says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root, run=self._run)
        self.refuses = False
        self.held = False
        (root / "etc/ssh/sshd_config.d").mkdir(parents=True)
        (root / "etc/ssh/sshd_config").write_text("Include /etc/ssh/sshd_config.d/*.conf\n")
        self.drop_in = root / sshd.DROP_IN.lstrip("/")

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        main = Path(argv[argv.index("-f") + 1])
        text = (main.parent / "sshd_config.d/00-quietport.conf").read_text()
        lines = [line for line in text.splitlines() if line.startswith("ListenAddress")]
        code = 255 if self.refuses else 0
        return subprocess.CompletedProcess(list(argv), code, "\n".join(lines).lower(), "line 3: no")

    @contextmanager
    def hold(self, timeout: float) -> Iterator[None]:
        assert timeout == 0, "who holds the lock may be waiting for sshd"
        if self.held:
            raise HostProgramError("another change is under way.")
        yield


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.drop_in.write_text(sshd.render((), public=sshd.public_listeners()))
    made.drop_in.chmod(0o644)
    return made


def back(machine: Machine, addresses: Sequence[str]) -> tuple[bool, str]:
    said: list[str] = []
    done = sshd_wait.back_to_the_tailnet(
        machine, say=said.append, hold=machine.hold, addresses=lambda: tuple(addresses)
    )
    return done, " ".join(said)


@pytest.mark.parametrize("addresses", [TAILNET, TAILNET[:1], []])
def test_our_own_drop_in_goes_back_to_the_tailnet(machine: Machine, addresses: list[str]) -> None:
    done, said = back(machine, addresses)
    assert done
    assert machine.drop_in.read_text() == sshd.render(addresses)
    assert (addresses or ["127.0.0.1"])[0] in said


def test_what_is_not_ours_or_not_to_be_had_now_is_left(machine: Machine) -> None:
    ours = machine.drop_in.read_text()
    machine.held = True
    assert back(machine, TAILNET) == (False, "another change is under way.")
    machine.held = False
    machine.refuses = True
    done, said = back(machine, TAILNET)
    assert (done, "line 3: no" in said) == (False, True)
    machine.refuses = False
    machine.drop_in.chmod(0o666)
    assert back(machine, TAILNET) == (False, "")
    machine.drop_in.chmod(0o644)
    machine.drop_in.write_text("ListenAddress 0.0.0.0\n")
    assert back(machine, TAILNET) == (False, "")
    machine.drop_in.write_text(ours)
    assert back(machine, TAILNET)[0]
    machine.drop_in.unlink()
    assert back(machine, TAILNET) == (False, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_drop_in_of_another_user_is_left(machine: Machine) -> None:
    os.chown(machine.drop_in, 65534, 65534)
    assert back(machine, TAILNET) == (False, "")
