"""The doctor's checks of tailnet, firewall, listeners and ssh: what is wrong has its row and next step."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import sshd, sshd_apply
from quietport.containers import Published
from quietport.doctor import firewall, listeners, ssh, tailnet
from quietport.doctor.model import Check, Finding
from quietport.doctor.run import run, state_of
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_NETWORKS, PUBLIC_SSHD
from quietport.net import Interfaces
from quietport.ports import Evidence, PublicSshd, judge_host
from quietport.processes import Program
from quietport.serve import Served
from quietport.ss import Listener, Process
from quietport.ufw_rules import WANTED
from tests.unit.test_ufw_rules import USER6_RULES, USER_RULES

DECLARED = {
    "schema": 1,
    "name": "vps1",
    "hostname": "vps1",
    "users": ["admin", "agent"],
    "login_server": "https://ts",
}
APPLY = "On your machine: `quietport apply vps1`."
NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


def steps(found: Sequence[Finding], status: str = "FAIL") -> dict[str, str]:
    """Reason = next step; every finding has that status, and something to do."""
    assert {one.status for one in found} == {status}, found
    assert all(one.next_step for one in found)
    return {one.reason: one.next_step for one in found}


def passes(found: Sequence[Finding]) -> None:
    assert [(one.status, one.next_step) for one in found] == [("PASS", "")], found
    assert found[0].reason.endswith(".")


# --- tailnet ---

NODE = {"TailscaleIPs": ["100.64.0.5", "fd7a:115c:a1e0::5"], "DNSName": "vps1.ts.example.", "Online": True}
ASSIGNED = ("100.64.0.5", "fd7a:115c:a1e0::5")
PREFS = {"RunSSH": False, "ShieldsUp": False, "CorpDNS": True}


def on_tailnet(
    node: Mapping[str, Any] = NODE,
    assigned: Sequence[str] = ASSIGNED,
    prefs: Mapping[str, Any] | None = PREFS,
    families: Sequence[int] = (4, 6),
) -> list[Finding]:
    return tailnet.judge(node, assigned, prefs, DECLARED, families=families)


def test_a_host_on_its_tailnet() -> None:
    passes(on_tailnet())
    passes(on_tailnet(assigned=ASSIGNED[:1], families=(4,)))


@pytest.mark.parametrize(
    ("found", "says", "step"),
    [
        (
            on_tailnet(assigned=ASSIGNED[:1]),
            "fd7a:115c:a1e0::5 is not on tailscale0",
            "systemctl restart tailscaled",
        ),
        (on_tailnet(assigned=()), "100.64.0.5, fd7a", "systemctl restart tailscaled"),
        (on_tailnet(node={**NODE, "TailscaleIPs": None}), "no address", "systemctl restart tailscaled"),
        (on_tailnet(prefs={**PREFS, "RunSSH": True}), "Tailscale SSH", "--ssh=false`"),
        (on_tailnet(prefs={**PREFS, "ShieldsUp": True}), "shields-up", "--shields-up=false`"),
        ([tailnet.not_running("Stopped", DECLARED)], "switched off", "`tailscale up`"),
        ([tailnet.not_running("NeedsLogin", DECLARED)], "logged out", APPLY),
        ([tailnet.not_running("NeedsMachineAuth", DECLARED)], "approval", "admin console"),
        ([tailnet.not_running("Starting", DECLARED)], "Starting", "systemctl restart tailscaled"),
    ],
)
def test_what_is_wrong_with_the_tailnet(found: list[Finding], says: str, step: str) -> None:
    ((reason, next_step),) = steps(found).items()
    assert says in reason
    assert step in next_step


def test_what_works_but_is_not_as_it_should_be() -> None:
    renamed = steps(on_tailnet(node={**NODE, "DNSName": "vps1-1.ts.example."}), "WARN")
    assert "Its name on the tailnet is vps1-1, not vps1." in renamed
    assert "control server" in next(iter(steps(on_tailnet(node={**NODE, "Online": False}), "WARN")))


def test_preferences_that_are_not_told_are_not_believed() -> None:
    with pytest.raises(HostProgramError):
        on_tailnet(prefs=None)


@pytest.mark.parametrize("silent", [False, True])
def test_an_address_that_is_missing_is_told_also_when_preferences_are_not(
    monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    def mute(machine: object, *, timeout: float) -> None:
        if silent:
            raise HostProgramError("tailscale debug prefs took longer than 30 s.")

    monkeypatch.setattr(tailnet, "is_installed", lambda name: True)
    monkeypatch.setattr(tailnet, "status", lambda: {"BackendState": "Running", "Self": NODE})
    monkeypatch.setattr(tailnet, "addresses_on", lambda interface: ASSIGNED[:1])
    monkeypatch.setattr(tailnet.preferences, "look", mute)
    monkeypatch.setattr(tailnet.admission, "families", lambda: (4, 6))
    rows = run([Check("tailnet", tailnet.look)], DECLARED)["tailnet"]
    assert [(one.status, one.told) for one in rows] == [("FAIL", True), ("SKIP", False)]
    assert "fd7a:115c:a1e0::5 is not on tailscale0" in rows[0].reason
    assert rows[1].reason.startswith("could not tell: tailscaled does not tell its preferences")
    assert state_of(rows) == "fail"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"BackendState": 1}', "not json"])
def test_a_status_that_is_none(text: str) -> None:
    with pytest.raises(HostProgramError):
        tailnet.parse_status(text)
    assert tailnet.parse_status('{"BackendState": "Running"}')["BackendState"] == "Running"


@given(
    st.dictionaries(st.sampled_from(["TailscaleIPs", "DNSName", "Online"]), st.none() | st.lists(st.text()))
)
def test_any_node_is_judged_or_refused(node: dict[str, Any]) -> None:
    try:
        found = on_tailnet(node=node)
    except HostProgramError:
        return
    assert found


def test_a_tailscaled_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailnet, "is_installed", lambda name: False)
    assert steps(tailnet.look(DECLARED)) == {"tailscale is not installed.": APPLY}
    monkeypatch.setattr(tailnet, "is_installed", lambda name: True)
    monkeypatch.setattr(tailnet, "status", lambda: None)
    assert "does not answer" in next(iter(steps(tailnet.look(DECLARED))))
    with pytest.raises(HostProgramError):
        tailnet.look_at_expiry(DECLARED)


@pytest.mark.parametrize(
    ("left", "accepted", "status"),
    [
        (None, False, "PASS"),
        (timedelta(days=31), True, "PASS"),
        (timedelta(days=31), False, "WARN"),
        (timedelta(days=30), True, "WARN"),
        (timedelta(days=4), True, "WARN"),
        (timedelta(days=3), True, "FAIL"),
        (timedelta(seconds=-1), True, "FAIL"),
    ],
)
def test_key_expiry_warns_thirty_days_before(left: timedelta | None, accepted: bool, status: str) -> None:
    expiry = None if left is None else (NOW + left).isoformat().replace("+00:00", "Z")
    for declared in ({**DECLARED, "accept_key_expiry": accepted}, {**DECLARED, PUBLIC_SSHD: accepted}):
        found = tailnet.judge_expiry(expiry, False, declared, now=NOW)
        assert found.status == status
        assert bool(found.next_step) == (status != "PASS")
        assert "https://ts" in found.next_step or status == "PASS"


def test_a_key_that_has_expired_whatever_its_time_says() -> None:
    assert tailnet.judge_expiry("2030-01-01T00:00:00Z", True, DECLARED, now=NOW).status == "FAIL"
    # As Go writes it: nanoseconds.
    assert tailnet.judge_expiry("2026-05-02T00:00:00.123456789Z", False, DECLARED, now=NOW).status == "FAIL"
    with pytest.raises(HostProgramError):
        tailnet.judge_expiry("soon", False, DECLARED, now=NOW)


@pytest.mark.parametrize("state", ["NeedsLogin", "Stopped", "NoState", "Starting", "NeedsMachineAuth"])
def test_a_key_that_nothing_is_known_of_is_not_one_that_never_expires(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expiry(**node: Any) -> Finding:
        monkeypatch.setattr(tailnet, "status", lambda: {"BackendState": state, "Self": node})
        (found,) = tailnet.look_at_expiry(DECLARED)
        return found

    monkeypatch.setattr(tailnet, "is_installed", lambda name: True)
    for node in ({}, {"KeyExpiry": None, "Expired": False}):
        with pytest.raises(HostProgramError, match=rf"no key's expiry .*\(state {state}\)"):
            expiry(**node)
    # What it does tell is believed.
    assert expiry(Expired=True).status == "FAIL"
    assert expiry(KeyExpiry="2001-01-01T00:00:00Z").status == "FAIL"


# --- firewall ---

DEFAULTS = (
    'IPV6=yes\nDEFAULT_INPUT_POLICY="DROP"\nDEFAULT_OUTPUT_POLICY="ACCEPT"\nDEFAULT_FORWARD_POLICY="DROP"\n'
)


def ours_alone(text: str) -> str:
    """Of a rules file, our two rules."""
    return text[text.index("### tuple") : text.index("### tuple ### allow tcp 22")] + "### END RULES ###\n"


def kernel(family: str = "") -> str:
    return (
        "-P INPUT DROP\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N ts-input\n"
        f"-N ufw{family}-before-input\n-N ufw{family}-user-input\n"
        f"-A INPUT -j ts-input\n-A INPUT -j ufw{family}-before-input\n"
        f"-A ufw{family}-user-input -i tailscale0 -j ACCEPT\n"
        f"-A ufw{family}-user-input -p udp -m udp --dport 41641 -j ACCEPT\n"
    )


GOOD = firewall.Seen(
    config="ENABLED=yes\n",
    defaults=DEFAULTS,
    rules={4: ours_alone(USER_RULES), 6: ours_alone(USER6_RULES)},
    kernel={4: kernel(), 6: kernel("6")},
)


def test_a_firewall_as_declared() -> None:
    passes(firewall.judge(GOOD, DECLARED))
    alone = replace(GOOD, rules={4: ours_alone(USER_RULES)}, kernel={4: kernel()})
    passes(firewall.judge(alone, DECLARED))


def without(text: str, part: str) -> str:
    assert part in text
    return "\n".join(line for line in text.splitlines() if part not in line)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (replace(GOOD, installed=False), {"ufw is not installed.": APPLY}),
        (
            replace(GOOD, kernel={4: "-P INPUT ACCEPT\n", 6: "-P INPUT ACCEPT\n"}),
            {"The firewall is not active: everybody reaches everything.": "`ufw --force enable`"},
        ),
        (
            replace(GOOD, at_boot=False),
            {"ufw.service is not started at boot.": "`systemctl enable ufw.service`"},
        ),
        (
            replace(GOOD, config="ENABLED=no\n"),
            {
                "/etc/ufw/ufw.conf says that it does not come back after a boot.": (
                    "`sed -i 's/^ENABLED=.*/ENABLED=yes/' /etc/ufw/ufw.conf`"
                )
            },
        ),
        (
            replace(GOOD, defaults=DEFAULTS.replace('INPUT_POLICY="DROP"', 'INPUT_POLICY="ACCEPT"')),
            {
                "Incoming is allow by default, not deny.": APPLY,
            },
        ),
        (
            replace(GOOD, kernel={4: kernel().replace("INPUT DROP", "INPUT ACCEPT"), 6: kernel("6")}),
            {"The kernel does not deny what is incoming by default, over ipv4.": APPLY},
        ),
        (
            replace(GOOD, rules={4: without(GOOD.rules[4], "41641"), 6: without(GOOD.rules[6], "41641")}),
            {f"Rule missing: {WANTED[1].text}.": APPLY},
        ),
        (
            replace(GOOD, kernel={4: kernel(), 6: without(kernel("6"), "-i tailscale0")}),
            {
                "IPv6: ufw has a rule that the kernel has lost: allow in on tailscale0.": (
                    "`ip6tables -A ufw6-user-input -i tailscale0 -j ACCEPT`"
                )
            },
        ),
        (
            replace(GOOD, kernel={4: without(kernel(), "-A INPUT -j ufw-before-input"), 6: kernel("6")}),
            {
                "IPv4: the kernel's INPUT chain does not lead to ufw's rules.": (
                    "`ufw reload`, which opens the firewall for a moment."
                )
            },
        ),
    ],
)
def test_what_is_wrong_with_the_firewall(now: firewall.Seen, expected: dict[str, str]) -> None:
    assert steps(firewall.judge(now, DECLARED)) == expected


def test_a_firewall_that_is_off_and_wrong_is_the_converges() -> None:
    off = {4: "-P INPUT ACCEPT\n", 6: "-P INPUT ACCEPT\n"}
    found = steps(firewall.judge(replace(GOOD, kernel=off, rules={4: "", 6: ""}), DECLARED))
    assert set(found.values()) == {APPLY}
    assert len(found) == 3


def test_who_lets_others_in_past_ufw_is_named() -> None:
    rule = "-A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT"
    others = "-A INPUT -j sshguard\n-A INPUT -s 192.0.2.1/32 -j DROP\n-A INPUT -i lo -j ACCEPT\n"
    listing = kernel() + others
    passes(firewall.judge(replace(GOOD, kernel={4: listing, 6: kernel("6")}), DECLARED))
    found = steps(
        firewall.judge(replace(GOOD, kernel={4: f"{listing}{rule}\n", 6: kernel("6")}), DECLARED), "WARN"
    )
    assert list(found.values()) == ["`iptables -D INPUT -p tcp -m tcp --dport 8080 -j ACCEPT`"]


def test_rules_of_others_are_counted_and_with_prune_foreign_wrong() -> None:
    foreign = "\n### tuple ### allow tcp 80 0.0.0.0/0 any 0.0.0.0/0 in\n-A ufw-user-input -p tcp -j ACCEPT\n"
    now = replace(GOOD, rules={4: GOOD.rules[4] + foreign, 6: GOOD.rules[6]})
    found = firewall.judge(now, DECLARED)
    passes(found)
    assert "1 of others" in found[0].reason
    pruned = steps(firewall.judge(now, {**DECLARED, "prune_foreign": True}))
    assert pruned == {"Rule that is not ours: allow 80/tcp.": APPLY}


def test_break_glass_has_its_rules_and_a_host_opened_by_hand_is_closed_first() -> None:
    now = replace(
        GOOD,
        rules={4: USER_RULES[: USER_RULES.index("### tuple ### deny")], 6: USER6_RULES},
        kernel={
            4: kernel() + "-A ufw-user-input -s 203.0.113.0/24 -p tcp -m tcp --dport 22 -j ACCEPT\n",
            6: kernel("6") + "-A ufw6-user-input -s 2001:db8:7::/48 -p tcp -m tcp --dport 22 -j ACCEPT\n",
        },
    )
    passes(firewall.judge(now, {**DECLARED, PUBLIC_NETWORKS: ["203.0.113.0/24", "2001:db8:7::/48"]}))
    assert set(steps(firewall.judge(now, DECLARED)).values()) == {APPLY}
    assert set(steps(firewall.judge(now, DECLARED, by_hand=True)).values()) == {"`quietport close`"}


def test_rules_that_are_not_understood_are_not_called_fine() -> None:
    with pytest.raises(HostProgramError):
        firewall.judge(replace(GOOD, rules={4: "### tuple ### allow what", 6: ""}), DECLARED)


# --- listeners ---

HOST = Interfaces(
    owners={"100.64.0.5": ("tailscale0",), "192.0.2.7": ("eth0",)},
    kinds={"lo": "loopback", "eth0": "public", "tailscale0": "tailnet"},
)
PROGRAMS = {
    1: Program("", "/usr/lib/systemd/systemd"),
    10: Program("nginx.service", "/usr/sbin/nginx"),
    11: Program("ssh.service", "/usr/sbin/sshd"),
    12: Program("session-3.scope", "/usr/bin/python3"),
    13: Program("tailscaled.service", "/usr/sbin/tailscaled"),
    14: Program("docker.service", "/usr/bin/docker-proxy"),
}


def listening(pid: int, name: str, *, address: str = "0.0.0.0", port: int = 80) -> Listener:
    return Listener("tcp", address, port, processes=(Process(name, pid),))


def judged(*found: Listener, **more: Any) -> list[Finding]:
    evidence = Evidence(list(found), HOST, PROGRAMS, **more)
    return listeners.judge(judge_host(evidence), DECLARED, transient=Path("/nonexistent"))


def test_nothing_in_public_that_may_not() -> None:
    passes(judged(listening(11, "sshd", address="100.64.0.5", port=22), listening(13, "tailscaled")))


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (listening(10, "nginx"), "`systemctl disable --now nginx.service`"),
        (listening(11, "sshd", port=22), APPLY),
        (listening(11, "sshd", port=2222), APPLY),
        (listening(12, "python3"), "`kill 12`"),
        (listening(12, "tailscaled"), "`kill 12`"),
    ],
)
def test_each_violation_has_its_next_step(found: Listener, step: str) -> None:
    ((reason, next_step),) = steps(judged(found)).items()
    assert f"tcp 0.0.0.0 port {found.port} is public and may not be" in reason
    assert step in next_step


def test_a_container_and_funnel() -> None:
    port = Published("web", "0.0.0.0", 8080, 80, "tcp")
    assert "`docker stop web`" in next(iter(steps(judged(published=[port])).values()))
    funnel = next(iter(steps(judged(served=[Served(443, True, "vps1.ts.example")])).values()))
    assert "`tailscale funnel --https=443 off`" in funnel


def test_a_unit_without_a_file_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "nginx.service").touch()
    found = judge_host(Evidence([listening(10, "nginx")], HOST, PROGRAMS))
    (one,) = listeners.judge(found, DECLARED, transient=tmp_path)
    assert one.next_step == "`systemctl stop nginx.service`"


def test_what_was_opened_by_hand_is_closed_by_hand() -> None:
    opened = PublicSshd("sshd was opened by hand. `quietport close` closes it.")
    found = judge_host(Evidence([listening(11, "sshd", port=22)], HOST, PROGRAMS, public_sshd=opened))
    (one,) = listeners.judge(found, DECLARED, by_hand=True)
    assert (one.status, one.next_step) == ("FAIL", "`quietport close`")


# --- ssh sockets ---

PLAIN = [name for name in sshd.SOCKETS if "@." not in name]
TEMPLATES = {name for name in sshd.SOCKETS if "@." in name}


def shown(*changed: str) -> str:
    """What `systemctl show` prints of sockets that are masked, but for `changed` (a block each)."""
    names = {block.split("Names=")[1].split("\n")[0] for block in changed}
    usual = [f"Names={name}\nLoadState=masked\nActiveState=inactive" for name in PLAIN if name not in names]
    return "\n\n".join([*usual, *changed]) + "\n"


def test_masked_sockets() -> None:
    passes(ssh.judge_sockets(shown(), TEMPLATES, [], DECLARED))


def test_sockets_that_could_start_an_sshd() -> None:
    unmasked = "Names=ssh.socket\nLoadState=loaded\nActiveState=inactive"
    reason = "ssh.socket is not masked: it can start an sshd of its own."
    found = steps(ssh.judge_sockets(shown(unmasked), TEMPLATES, [], DECLARED))
    assert found == {reason: "`systemctl mask ssh.socket`"}
    holding = unmasked.replace("inactive", "active")
    assert steps(ssh.judge_sockets(shown(holding), TEMPLATES, [], DECLARED)) == {reason: APPLY}
    link = sshd.SOCKET_LINKS[0]
    assert steps(ssh.judge_sockets(shown(unmasked), TEMPLATES, [link], DECLARED)) == {reason: APPLY}
    pulled = next(iter(steps(ssh.judge_sockets(shown(), TEMPLATES, [link], DECLARED)).values()))
    assert pulled == f"`rm {link}`, `systemctl daemon-reload`"
    template = steps(ssh.judge_sockets(shown(), TEMPLATES - {"ssh@.socket"}, [], DECLARED))
    assert list(template.values()) == ["`systemctl mask ssh@.socket`"]
    stray = "Names=ssh@7.socket\nLoadState=loaded\nActiveState=active"
    assert steps(ssh.judge_sockets(shown(stray), TEMPLATES, [], DECLARED)) == {
        "ssh@7.socket is active.": "`systemctl stop ssh@7.socket`"
    }
    left = "Names=ssh.socket\nLoadState=masked\nActiveState=active"
    assert list(steps(ssh.judge_sockets(shown(left), TEMPLATES, [], DECLARED)).values()) == [
        "`systemctl stop ssh.socket`"
    ]


def test_a_socket_that_systemd_does_not_tell_of_is_not_masked() -> None:
    found = ssh.judge_sockets("", set(), [], DECLARED)
    assert len(steps(found)) == len(sshd.SOCKETS)


@pytest.mark.parametrize(
    ("kind", "masked"), [("link", True), ("other", False), ("empty", True), ("unit", False)]
)
def test_what_a_mask_is(tmp_path: Path, kind: str, masked: bool) -> None:
    file = tmp_path / "ssh@.socket"
    if kind in ("link", "other"):
        file.symlink_to("/dev/null" if kind == "link" else "/usr/lib/systemd/system/ssh@.socket")
    else:
        file.write_text("" if kind == "empty" else "[Socket]\n")
    assert ssh._is_mask(file) is masked


# --- sshd ---

KEYS_ONLY = """\
port 22
listenaddress 100.64.0.5:22
passwordauthentication no
kbdinteractiveauthentication no
authenticationmethods publickey
pubkeyauthentication yes
"""
AT = frozenset({("100.64.0.5", 22)})
RUNNING = {"ActiveState": "active", "UnitFileState": "enabled", "LoadState": "loaded", "MainPID": "7"}
FINE = ssh.Seen(
    unit=RUNNING,
    wanted=AT,
    listeners=AT,
    effective=[("admin", "203.0.113.9", sshd.parse_effective(KEYS_ONLY))],
)


def asked(text: str) -> list[tuple[str, str, Mapping[str, list[str]]]]:
    return [("admin", "203.0.113.9", sshd.parse_effective(text))]


def test_an_sshd_as_declared() -> None:
    passes(ssh.judge(FINE, DECLARED))


@pytest.mark.parametrize(
    ("now", "says", "step"),
    [
        (
            replace(FINE, unit={**RUNNING, "ActiveState": "inactive"}),
            "inactive",
            "`systemctl restart ssh.service`",
        ),
        (
            replace(FINE, unit={**RUNNING, "ActiveState": "failed"}),
            "failed",
            "`systemctl restart ssh.service`",
        ),
        (
            replace(FINE, unit={**RUNNING, "ActiveState": "activating"}),
            "waits",
            "`systemctl start tailscaled",
        ),
        (
            replace(FINE, unit={**RUNNING, "ActiveState": "inactive", "LoadState": "masked"}),
            "masked",
            "`systemctl unmask ssh.service`, `systemctl enable --now ssh.service`",
        ),
        (
            replace(FINE, unit={**RUNNING, "UnitFileState": "disabled"}),
            "boot",
            "`systemctl enable ssh.service`",
        ),
        (
            replace(
                FINE,
                effective=asked(KEYS_ONLY.replace("passwordauthentication no", "passwordauthentication yes")),
            ),
            "passwordauthentication is yes, not no (admin from 203.0.113.9)",
            APPLY,
        ),
        (replace(FINE, refused="line 3: Bad option"), "line 3: Bad option", "/usr/sbin/sshd -t"),
        (
            replace(FINE, behind="its drop-in names other addresses."),
            "other addresses",
            "`quietport sshd-follow --once`",
        ),
        (replace(FINE, listeners=frozenset()), "listens on nothing", "`quietport sshd-follow --once`"),
        (
            replace(FINE, listeners=AT | {("0.0.0.0", 2222)}),
            "sshd listens on 0.0.0.0:2222, 100.64.0.5:22, not on 100.64.0.5:22.",
            APPLY,
        ),
        (replace(FINE, stale=True), "older configuration", "`systemctl reload ssh.service`"),
        (replace(FINE, wanted=None, why="There is no drop-in."), "There is no drop-in", APPLY),
    ],
)
def test_what_is_wrong_with_sshd(now: ssh.Seen, says: str, step: str) -> None:
    ((reason, next_step),) = steps(ssh.judge(now, DECLARED)).items()
    assert says in reason
    assert step in next_step


def test_a_pause_is_a_warning() -> None:
    paused = replace(FINE, wanted=None, why="Paused: by hand.", paused=True)
    assert list(steps(ssh.judge(paused, DECLARED), "WARN").values()) == ["`rm /etc/quietport/follow-paused`"]


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n# Match all\n", False),
        ("Include sshd_config.d/*.conf\n", False),
        ("Include /etc/ssh/more/*.conf\n", True),
        ("Include /etc/ssh/sshd_config.d/*\n", True),
        ("Match User bob\nPasswordAuthentication yes\n", True),
    ],
)
def test_where_one_login_may_be_treated_otherwise(text: str, differs: bool) -> None:
    assert ssh.may_differ({sshd.MAIN: text}) is differs


class Machine(sshd_apply.Host):
    """A host in a directory, whose sshd and systemd answer as told."""

    def __init__(self, root: Path, *, effective: Mapping[str, str], unit: str) -> None:
        self.asked: list[str] = []

        def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
            if argv[0] == "systemctl":
                return subprocess.CompletedProcess(list(argv), 0, unit, "")
            assert argv[1:3] == ["-T", "-C"]
            self.asked.append(argv[3])
            user = argv[3].partition(",")[0].removeprefix("user=")
            return subprocess.CompletedProcess(list(argv), 0, effective.get(user, KEYS_ONLY), "")

        super().__init__(root=root, run=answer)


def machine(tmp_path: Path, main: str, **effective: str) -> Machine:
    folder = tmp_path / "etc/ssh/sshd_config.d"
    folder.mkdir(parents=True)
    (tmp_path / "run/sshd").mkdir(parents=True)
    (tmp_path / "etc/ssh/sshd_config").write_text(main)
    (folder / "00-quietport.conf").write_text(sshd.render(["100.64.0.5"]))
    (folder / "00-quietport.conf").chmod(0o600)
    return Machine(
        tmp_path, effective=effective, unit="ActiveState=active\nUnitFileState=enabled\nMainPID=0\n"
    )


def test_a_match_block_makes_it_ask_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh.sshd_follow, "addresses_on", lambda interface: ("100.64.0.5",))
    plain = machine(tmp_path / "plain", "Include /etc/ssh/sshd_config.d/*.conf\n")
    seen = ssh.seen(plain, DECLARED)
    assert len(plain.asked) == 1
    assert (seen.wanted, seen.behind, seen.refused) == (AT, "", "")
    loose = KEYS_ONLY.replace("passwordauthentication no", "passwordauthentication yes")
    matched = machine(tmp_path / "matched", "Match User agent\nPasswordAuthentication yes\n", agent=loose)
    found = ssh._keys(ssh.seen(matched, DECLARED), DECLARED)
    assert len(matched.asked) == 3 * len(sshd.ASKED_FROM)
    assert "(agent from " in found[0].reason
    # A link is not read by us, and may hold a Match block.
    linked = machine(tmp_path / "linked", "Port 22\n")
    (tmp_path / "linked/etc/ssh/sshd_config.d/50-x.conf").symlink_to("/etc/ssh/x")
    ssh.seen(linked, DECLARED)
    assert len(linked.asked) > 1


def test_an_address_that_moved_is_the_followers_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh.sshd_follow, "addresses_on", lambda interface: ("100.64.0.9",))
    seen = ssh.seen(machine(tmp_path, "Port 22\n"), DECLARED)
    assert "100.64.0.9" in seen.behind
    assert any("sshd-follow --once" in one.next_step for one in ssh.judge(seen, DECLARED))


def test_break_glass_wants_every_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh.sshd_follow, "addresses_on", lambda interface: ("100.64.0.5",))
    monkeypatch.setattr(ssh.admission, "families", lambda: (4,))
    seen = ssh.seen(machine(tmp_path, "Port 22\n"), {**DECLARED, PUBLIC_SSHD: True})
    assert seen.wanted == {("0.0.0.0", 22)}
    (one,) = ssh.judge(replace(seen, stale=False), {**DECLARED, PUBLIC_SSHD: True})
    assert (one.status, one.next_step) == ("FAIL", APPLY)


def test_json_of_tailscale_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"BackendState": "Running", "Self": {**NODE, "KeyExpiry": None}}
    monkeypatch.setattr(tailnet, "is_installed", lambda name: True)
    monkeypatch.setattr(tailnet, "status", lambda: tailnet.parse_status(json.dumps(document)))
    monkeypatch.setattr(tailnet, "addresses_on", lambda interface: ASSIGNED)
    monkeypatch.setattr(tailnet.preferences, "look", lambda machine, timeout: PREFS)
    monkeypatch.setattr(tailnet.admission, "families", lambda: (4, 6))
    passes(tailnet.look(DECLARED))
    passes(tailnet.look_at_expiry(DECLARED))
