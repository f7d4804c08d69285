"""Every path of the operations on units, secrets, timers, the firewall and sshd.

Fixtures as in fixtures.py, which declares their tags; here besides: `!secret`, the secret
on standard input, `!write` the command that writes a file (path, mode, content), `!unit` the text of the
example timer's unit, `!unit-sha256` its digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyinfra.api.command import FunctionCommand
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeState, create_host

from control.secret import Secret
from control.settings import HostSettings
from operations import files, gate, guard, secret, sshd, timers, ufw
from quietport import sshd as pure
from quietport import ufw_rules
from tests.operations import fixtures
from tests.operations.fixtures import digest, scalar

HERE = Path(__file__).parent
MODULES = ("units", "ufw", "secret", "timers", "agent_access")


def unit(kind: str) -> str:
    """The text of the unit of the timer that the fixtures declare."""
    timer = timers.Timer(name="tidy", schedule="daily", program=("/usr/bin/true", "a b"), user="nobody")
    return timers.unit_files(timer)[f"/etc/systemd/system/quietport-tidy.{kind}"]


def _secret(loader: yaml.SafeLoader, node: yaml.Node) -> Secret:
    return Secret(scalar(loader, node).encode(), source="env:X")


def _write(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.SequenceNode)
    path, mode, content = loader.construct_sequence(node, deep=True)
    return files.write(path, content, mode=mode).get_raw_value()


yaml.SafeLoader.add_constructor("!secret", _secret)
yaml.SafeLoader.add_constructor("!write", _write)
yaml.SafeLoader.add_constructor("!unit", lambda loader, node: unit(scalar(loader, node)).encode())
yaml.SafeLoader.add_constructor("!unit-sha256", lambda loader, node: digest(unit(scalar(loader, node))))


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_TEST_SECRET", "a secret\n")
    monkeypatch.delenv("QUIETPORT_TEST_ABSENT", raising=False)
    secret.resolved.cache_clear()


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator declared of the host: nothing but its address."""
    monkeypatch.setattr(gate, "settings_for", lambda name: HostSettings(address="192.0.2.1"))


globals().update(fixtures.tests_of(MODULES))


def test_every_operation_has_fixtures() -> None:
    assert fixtures.without_fixtures(MODULES) == set()


# --- firewall -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        [],
        ["deny in on tailscale0", "allow 41641/udp"],
        ["limit 22/tcp", *(rule.shown() for rule in reversed(ufw_rules.WANTED))],
        ["allow log 41641/udp", "reject from any", "allow 22"],
        ["allow 'Nginx Full'", "deny out 25", "route deny in on a", "allow 1/udp comment 'quietport: old'"],
    ],
)
@pytest.mark.parametrize("prune", [False, True])
def test_after_the_changes_there_is_nothing_left_to_change(rules: list[str], *, prune: bool) -> None:
    wanted = ufw_rules.changes(rules, prune_foreign=prune)
    assert wanted
    after = [rule for rule in rules if ufw_rules.bare(rule) not in wanted.delete]
    texts = {rule.text: rule for rule in wanted.add}
    after = [
        texts.pop(ufw_rules.bare(rule)).shown() if ufw_rules.bare(rule) in texts else rule for rule in after
    ]
    after = [rule.shown() for rule in wanted.prepend] + after + [rule.shown() for rule in texts.values()]
    assert not ufw_rules.changes(after, prune_foreign=prune)
    if prune:
        assert sorted(after) == sorted(rule.shown() for rule in ufw_rules.WANTED)


def test_an_open_default_outwards_is_laid_down_as_ufw_does() -> None:
    assert ufw.live_policy("outgoing", "allow", family="6") == (
        "*filter\n:OUTPUT ACCEPT [0:0]\n-F ufw6-reject-output\n-F ufw6-track-output\n"
        "-F ufw6-skip-to-policy-output\n-A ufw6-skip-to-policy-output -j ACCEPT\n"
        "-A ufw6-track-output -p tcp -m conntrack --ctstate NEW -j ACCEPT\n"
        "-A ufw6-track-output -p udp -m conntrack --ctstate NEW -j ACCEPT\nCOMMIT\n"
    )


# --- timers -------------------------------------------------------------------------------------------


def test_arguments_of_a_timer_reach_the_program_as_they_are() -> None:
    assert timers.command_line(("/bin/echo", "a b", "100%", "$HOME", 'say "x"', "plain=1")) == (
        '/bin/echo "a b" "100%%" "$$HOME" "say \\"x\\"" plain=1'
    )


@pytest.mark.parametrize("program", [(), ("echo",), ("/bin/echo", "two\nlines")])
def test_programs_a_timer_cannot_have(program: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a timer's program"):
        timers.command_line(program)


def test_only_a_timer_that_talks_to_other_hosts_may() -> None:
    quiet = timers.Timer(name="tidy", schedule="daily", program=("/usr/bin/true",), user="root")
    texts = [
        timers.unit_files(one)["/etc/systemd/system/quietport-tidy.service"]
        for one in (quiet, replace(quiet, network=True))
    ]
    assert ["IPAddressDeny=any\n" in text for text in texts] == [True, False]
    assert texts[0].replace("IPAddressDeny=any\n", "") == texts[1]


def test_a_timer_that_needs_nothing_gets_nothing() -> None:
    text = unit("service")
    shut = ("CapabilityBoundingSet=", "RestrictAddressFamilies=none", "PrivateNetwork=true")
    for line in (*shut, "User=nobody"):
        assert f"\n{line}\n" in text
    assert "ReadWritePaths" not in text


# --- sshd ---------------------------------------------------------------------------------------------

MAIN = "Include /etc/ssh/sshd_config.d/*.conf\n"
KEYS_ONLY = {
    "passwordauthentication": ["no"],
    "kbdinteractiveauthentication": ["no"],
    "authenticationmethods": ["publickey"],
    "pubkeyauthentication": ["yes"],
}
ADDRESSES = ["100.64.0.7", "fd7a:115c:a1e0::7"]


OURS = {"kind": "file", "mode": "0644", "user": "root", "group": "root", "sha256": "known"}


def converged() -> dict[str, Any]:
    """Facts of a host whose sshd is as wanted."""
    names = [pure.UNIT, *pure.SOCKETS]
    sockets = {name: {"enabled": "masked", "active": "inactive"} for name in pure.SOCKETS}
    service = {"enabled": "enabled", "active": "active", "need_reload": False, "main_pid": 77}
    asked = [f"user=admin, addr={address}" for address in pure.ASKED_FROM]
    return {
        "sshd.SshdFiles": {pure.MAIN: MAIN, pure.DROP_IN: pure.render(ADDRESSES)},
        "files.FileText": {f"path={pure.UNIT_DROP_IN}": sshd.UNIT_DROP_IN_TEXT},
        "files.FileState": {f"path={path}": dict(OURS) for path in sshd.OUR_FILES},
        "tailnet.Tailnet": {"addresses": ADDRESSES},
        "units.Units": {f"names={names}": {pure.UNIT: service, **sockets}},
        "sockets.ListeningSockets": [
            {"protocol": "tcp", "address": address, "port": 22, "pid": 77, "unit": pure.UNIT}
            for address in ADDRESSES
        ],
        "sshd.SshdProcess": {"stale": False},
        "sshd.SshdEffective": {f"addr={a}, user=admin": KEYS_ONLY for a in pure.ASKED_FROM}
        | dict.fromkeys(asked, KEYS_ONLY),
    }


def commands(facts: dict[str, Any]) -> list[Any]:
    """What the operation yields at prepare."""
    state = FakeState()
    with ctx_state.use(state), ctx_host.use(create_host(state, facts=facts)):
        return list(sshd.tailnet_only._inner(login_user="admin", users=["root", "admin"]))


@pytest.mark.parametrize(
    ("sha256", "state", "expected"),
    [
        ("as wanted", {"enabled": "enabled", "active": "active"}, []),
        ("as wanted", {"enabled": "enabled", "active": "inactive"}, ["systemctl start"]),
        ("as wanted", {"enabled": "disabled", "active": "active"}, ["systemctl enable"]),
        (
            "older",
            {"enabled": "enabled", "active": "active"},
            ["install -d", "", "systemctl daemon-reload", "systemctl try-restart"],
        ),
        (
            None,
            {"enabled": "", "active": "inactive"},
            [
                *("install -d", "", "systemctl daemon-reload", "systemctl try-restart"),
                *("systemctl enable", "systemctl start"),
            ],
        ),
    ],
)
def test_the_follower(sha256: str | None, state: dict[str, str], expected: list[str]) -> None:
    ((path, text),) = sshd.FOLLOWER_FILES.items()
    found = {"kind": "absent"}
    if sha256 is not None:
        wanted = digest(text if sha256 == "as wanted" else "older")
        found = {"kind": "file", "mode": "0644", "user": "root", "group": "root", "sha256": wanted}
    facts = {
        "files.FileState": {f"path={path}": found},
        "files.FileText": {f"path={path}": "older"},
        "units.Units": {f"names=['{sshd.FOLLOWER}']": {sshd.FOLLOWER: {**state, "need_reload": False}}},
    }
    made = FakeState()
    with ctx_state.use(made), ctx_host.use(create_host(made, facts=facts)):
        told = [str(command) for command in sshd.followed._inner()]
    assert len(told) == len(expected)
    assert all(line.startswith(beginning) for line, beginning in zip(told, expected, strict=True))


def test_sshd_as_wanted() -> None:
    assert commands(converged()) == []


def _spoil(facts: dict[str, Any], what: str) -> None:
    units = next(iter(facts["units.Units"].values()))
    files = facts["sshd.SshdFiles"]
    spoil: dict[str, Any] = {
        "drop-in": lambda: files.update({pure.DROP_IN: "Port 22\n"}),
        "foreign listen": lambda: files.update({pure.MAIN: f"{MAIN}ListenAddress 0.0.0.0\n"}),
        "no include": lambda: files.update({pure.MAIN: ""}),
        "unit drop-in": lambda: facts.update({"files.FileText": {f"path={pure.UNIT_DROP_IN}": None}}),
        "others may write": lambda: facts["files.FileState"][f"path={pure.DROP_IN}"].update(mode="0666"),
        "another's": lambda: facts["files.FileState"][f"path={pure.UNIT_DROP_IN}"].update(user="nobody"),
        "socket": lambda: units["ssh.socket"].update(enabled="disabled"),
        "template": lambda: units["ssh@.socket"].update(enabled="static"),
        "running socket": lambda: units["sshd-vsock.socket"].update(active="active"),
        "disabled": lambda: units[pure.UNIT].update(enabled="disabled"),
        "reload due": lambda: units[pure.UNIT].update(need_reload=True),
        "restart due": lambda: facts["sshd.SshdProcess"].update(stale=True),
        "one address": lambda: facts["sockets.ListeningSockets"].pop(),
        "another address": lambda: facts["sockets.ListeningSockets"].append(
            {"protocol": "tcp", "address": "0.0.0.0", "port": 2222, "pid": 77, "unit": pure.UNIT}
        ),
        "an instance": lambda: facts["sockets.ListeningSockets"].append(
            {"protocol": "tcp", "address": "0.0.0.0", "port": 23, "pid": 1, "unit": "ssh@23.socket"}
        ),
        "an instance at work": lambda: facts["sockets.ListeningSockets"].append(
            {"protocol": "tcp", "address": "::", "port": 23, "pid": 1, "unit": "ssh@23.socket, ssh@1.service"}
        ),
        "passwords": lambda: facts["sshd.SshdEffective"].update(
            dict.fromkeys(facts["sshd.SshdEffective"], KEYS_ONLY | {"passwordauthentication": ["yes"]})
        ),
        "new address": lambda: facts["tailnet.Tailnet"].update(addresses=["100.64.0.8"]),
    }
    spoil[what]()


@pytest.mark.parametrize(
    "what",
    [
        *("drop-in", "foreign listen", "no include", "unit drop-in", "socket", "template", "running socket"),
        *("disabled", "reload due", "restart due", "one address", "another address", "an instance"),
        "an instance at work",
        *("passwords", "new address", "others may write", "another's"),
    ],
)
def test_sshd_otherwise_than_wanted_passes_the_gate_and_is_applied_whole(what: str) -> None:
    facts = converged()
    _spoil(facts, what)
    first, arm, second = commands(facts)
    assert isinstance(first, FunctionCommand)
    assert first.function is gate._pass_gate
    assert isinstance(arm, FunctionCommand)
    assert (arm.function, arm.args) == (guard.arm, (300,))
    assert str(second) == "/usr/local/sbin/quietport sshd-apply"
    assert second.connector_arguments["_timeout"] == gate.RISKY_TIMEOUT_S
    plan = json.loads(second.connector_arguments["_stdin"])
    assert plan["users"] == ["admin", "root"]
    assert plan["mask"] == list(pure.SOCKETS)
    assert plan["listeners"] == [[address, 22] for address in facts["tailnet.Tailnet"]["addresses"]]
    assert plan["files"][pure.UNIT_DROP_IN]["text"] == sshd.UNIT_DROP_IN_TEXT
    # Files of others are in the plan only when something is to be written into them.
    old = facts["sshd.SshdFiles"][pure.MAIN]
    changed = {pure.MAIN} if what in ("foreign listen", "no include") else set()
    assert plan["files"].keys() == {pure.DROP_IN, pure.UNIT_DROP_IN} | changed
    if changed:
        assert plan["files"][pure.MAIN]["old_sha256"] == hashlib.sha256(old.encode()).hexdigest()


def test_what_others_wrote_and_is_undone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    facts = converged()
    foreign = f"{pure.FOLDER}/60-admin.conf"
    facts["sshd.SshdFiles"] |= {
        pure.MAIN: "Port 2222\nMatch User bob\n  PasswordAuthentication yes\x1b[31m\nPort 2222\n",
        foreign: "ListenAddress 0.0.0.0\n",
    }
    next(iter(facts["units.Units"].values()))["ssh.socket"]["active"] = "active"
    commands(facts)
    # The folder is not read, so its lines are nobody's: only what the main file says counts.
    assert (
        f"commented out with a mark, because they win or stay active: {pure.MAIN}: Port 2222; "
        f"{pure.MAIN}: PasswordAuthentication yes?[31m"
    ) in caplog.text
    assert foreign not in caplog.text
    assert f"{pure.MAIN} does not read {pure.DROP_IN}: it gets an Include line for it" in caplog.text
    assert "ssh.socket listens in sshd's place: masked, ssh.service takes over" in caplog.text


def test_of_many_lines_some_are_named(caplog: pytest.LogCaptureFixture) -> None:
    facts = converged()
    facts["sshd.SshdFiles"][pure.MAIN] = MAIN + "".join(f"Port {port}\n" for port in range(2220, 2230))
    commands(facts)
    assert "Port 2225 and 4 more" in caplog.text
    assert "Port 2226" not in caplog.text


def test_a_host_as_it_is_meant_to_be_gets_no_remarks(caplog: pytest.LogCaptureFixture) -> None:
    facts = converged()
    facts["sshd.SshdProcess"].update(stale=True)
    assert commands(facts)
    assert "ssh:" not in caplog.text


def test_a_forwarded_port_of_a_session_is_not_sshds() -> None:
    facts = converged()
    facts["sockets.ListeningSockets"].append(
        {"protocol": "tcp", "address": "127.0.0.1", "port": 6010, "pid": 90, "unit": "session-1.scope"}
    )
    assert commands(facts) == []


def test_a_blank_host_is_a_change_too() -> None:
    """Before the join there is no address: the plan says change, and apply writes the addresses of then."""
    facts = converged()
    facts["tailnet.Tailnet"] = {"addresses": []}
    facts["sshd.SshdFiles"] = {pure.MAIN: MAIN}
    assert len(commands(facts)) == 3


def test_the_penalties_are_named_where_sshd_has_them() -> None:
    facts = converged()
    known = KEYS_ONLY | {"persourcepenalties": ["crash:90"]}
    facts["sshd.SshdEffective"] = dict.fromkeys(facts["sshd.SshdEffective"], known)
    plan = json.loads(commands(facts)[2].connector_arguments["_stdin"])
    assert "PerSourcePenaltyExemptList" in plan["files"][pure.DROP_IN]["text"]


def test_an_sshd_that_reloads_just_then_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["sshd listens on nothing"], []]
    monkeypatch.setattr(sshd, "_look", lambda user, break_glass=(): None)
    monkeypatch.setattr(sshd, "wanted", lambda seen, login_user: None)
    monkeypatch.setattr(sshd, "differences", lambda seen, target: answers.pop(0))
    monkeypatch.setattr(sshd.time, "sleep", lambda seconds: None)
    assert sshd.not_as_wanted("root") == []
    # And not for ever.
    monkeypatch.setattr(sshd, "SETTLED_WITHIN_S", -1.0)
    answers[:] = [["sshd listens on nothing"], []]
    assert sshd.not_as_wanted("root") == ["sshd listens on nothing"]
