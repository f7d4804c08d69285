"""Undo: the public way first, then what is ours and nothing else, and a second time nothing at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyinfra.api.command import FunctionCommand
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeState, create_host

from control import guard as there
from control.errors import ReachError
from control.proof import Proof
from control.settings import HostSettings
from operations import guard, publicly, sshd, ufw, undo
from quietport import sshd as pure
from quietport import ufw_rules

MAIN = "Include /etc/ssh/sshd_config.d/*.conf\nPort 2222\n"
STOCK = {pure.MAIN: MAIN}
OURS = pure.wanted_files(STOCK, pure.render(["100.64.0.7"]))
UNIT_TEXT = "# Written by quietport.\n[Unit]\n"
WAY_IN = "allow 2222/tcp comment 'quietport: undo, the way in'"
MARKED = [rule.shown() for rule in ufw_rules.WANTED]
DEFAULTS = dict(ufw_rules.DEFAULTS)


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(publicly, "settings_for", lambda name: HostSettings(address="192.0.2.1"))
    guard.forget()
    undo._restored.clear()
    yield
    undo._restored.clear()
    guard.forget()


def firewall(rules: Sequence[str] = (), *, active: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "installed": True,
        "active": active,
        "defaults": DEFAULTS,
        "ipv6": True,
        "rules": list(rules),
        **changes,
    }


def facts(
    *,
    files: dict[str, str] = OURS,
    unit: str | None = UNIT_TEXT,
    masked: bool = True,
    ufw_state: dict[str, Any] | None = None,
    record: str | None = None,
    converged: bool = True,
    **texts: str | None,
) -> dict[str, Any]:
    state = {"enabled": "masked" if masked else "disabled", "active": "inactive"}
    known = {
        pure.UNIT_DROP_IN: unit,
        ufw.RECORD: record,
        "/etc/quietport/host.json": "{}" if converged else None,
        **texts,
    }
    return {
        "sshd.SshdFiles": files,
        "files.FileText": {f"path={path}": text for path, text in known.items()},
        "units.Units": {f"names={list(pure.SOCKETS)}": {name: dict(state) for name in pure.SOCKETS}},
        "ufw.Ufw": firewall(MARKED) if ufw_state is None else ufw_state,
        "system.System": {"ipv6": True},
    }


def undone(**changes: Any) -> dict[str, Any]:
    return facts(**{"files": STOCK, "unit": None, "masked": False, "ufw_state": firewall([WAY_IN])} | changes)


def commands(operation: Any, found: dict[str, Any], **arguments: Any) -> list[Any]:
    """What an operation yields at prepare."""
    state = FakeState()
    with ctx_state.use(state), ctx_host.use(create_host(state, facts=found)):
        return list(operation._inner(**arguments))


def told(some: Sequence[Any]) -> list[str]:
    return [one.function.__name__ if isinstance(one, FunctionCommand) else str(one) for one in some]


# --- what is found ------------------------------------------------------------------------------------


def test_every_mark_is_found() -> None:
    files = {**OURS, "/etc/ssh/sshd_config.d/60-admin.conf": "# quietport: was: Port 1\n"}
    found = undo.of_sshd(undo.Seen(files, UNIT_TEXT, ("ssh.socket",)))
    assert found == [
        f"{pure.DROP_IN} is ours",
        f"{pure.MAIN} has lines that we commented out or added",
        "/etc/ssh/sshd_config.d/60-admin.conf has lines that we commented out or added",
        f"{pure.UNIT_DROP_IN} is ours",
        "ssh.socket is masked",
    ]
    assert undo.of_sshd(undo.Seen(STOCK, None, ())) == []


# --- the order of the steps ---------------------------------------------------------------------------


def test_the_public_way_is_opened_before_anything_is_proven() -> None:
    some = commands(undo.firewall_opened, facts())
    assert told(some) == ["arm", f"ufw prepend {WAY_IN}"]
    assert some[0].args == (300, "public")
    assert some[1].connector_arguments["_timeout"] == 120


def test_what_was_opened_by_hand_stays_open_for_the_new_reason() -> None:
    rules = ["allow 2222/tcp comment 'quietport: opened by hand'", *MARKED]
    assert told(commands(undo.firewall_opened, facts(ufw_state=firewall(rules)))) == ["arm", f"ufw {WAY_IN}"]


def test_sshd_is_put_back_by_the_host_itself() -> None:
    some = commands(undo.sshd_as_shipped, facts(), login_user="admin")
    assert told(some) == ["arm", "/usr/local/sbin/quietport sshd-restore --user admin --port 2222"]
    assert len(undo._restored) == 1


def test_the_firewall_is_closed_only_behind_a_public_login() -> None:
    some = commands(undo.firewall_as_before, facts(ufw_state=firewall([WAY_IN, *MARKED])))
    assert told(some) == [
        *("_pass_gate", "arm", "ufw delete allow in on tailscale0", "ufw delete allow 41641/udp"),
    ]


def test_a_second_time_nothing_is_to_be_done() -> None:
    found = undone()
    assert commands(undo.programs_ready, found, pyz=b"") == []
    assert commands(undo.firewall_opened, found) == []
    assert commands(undo.sshd_as_shipped, found, login_user="root") == []
    assert commands(undo.firewall_as_before, found) == []
    assert commands(publicly.stays, found) == []
    assert commands(undo.way_forgotten, found) == []


def test_a_host_that_was_never_converged_is_left_alone() -> None:
    """Sockets that somebody masked there, and a firewall that is somebody's, are none of our business."""
    found = facts(
        files=STOCK, unit=None, masked=True, converged=False, ufw_state=firewall(["allow 2222/tcp"])
    )
    for operation, arguments in (
        *((undo.programs_ready, {"pyz": b""}), (undo.firewall_opened, {}), (undo.firewall_as_before, {})),
        (undo.sshd_as_shipped, {"login_user": "root"}),
    ):
        assert commands(operation, found, **arguments) == []


def test_the_programs_are_brought_only_where_they_are_needed() -> None:
    found = facts()
    found["files.FileState"] = {
        "path=/usr/local/lib/quietport": {"kind": "absent"},
        "path=/usr/local/lib/quietport/quietport.pyz": {"kind": "absent"},
        "path=/usr/local/sbin/quietport": {"kind": "absent"},
    }
    assert commands(undo.programs_ready, found, pyz=b"x")


@pytest.mark.parametrize("operation", [undo.firewall_opened, undo.firewall_as_before])
def test_a_plan_that_ends_at_the_first_command_knows_of_the_proof(operation: Any) -> None:
    state = FakeState()
    with ctx_state.use(state), ctx_host.use(create_host(state, facts=facts())):
        assert list(publicly.stays._inner()) == []
        next(operation._inner())
        assert told(list(publicly.stays._inner())) == ["_prove"]


def test_the_way_is_forgotten_where_sshd_was_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    commands(undo.sshd_as_shipped, facts(), login_user="root")
    assert told(commands(undo.way_forgotten, facts())) == ["_forget_way"]


# --- the firewall -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        ([], ["allow 22/tcp", "allow 2222/tcp"]),
        (["allow 22/tcp"], ["allow 2222/tcp"]),
        (["allow 22/tcp comment 'mine'", WAY_IN], []),
        (["limit 22/tcp", "allow 22"], ["allow 22/tcp", "allow 2222/tcp"]),
        (["allow 22/tcp comment 'quietport: opened by hand'", WAY_IN], ["allow 22/tcp"]),
    ],
)
def test_what_opens_the_ports(rules: list[str], missing: list[str]) -> None:
    assert [rule.text for rule in undo.opening(rules, [22, 2222])] == missing


def test_a_rule_of_others_that_says_no_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    state = firewall([*MARKED, "deny 2222/tcp comment 'no ssh'"])
    (refusal,) = commands(undo.firewall_opened, facts(ufw_state=state))
    assert "`ufw delete deny 2222/tcp`" in refusal.args[0]


@pytest.mark.parametrize("state", [firewall([WAY_IN, *MARKED]), firewall([*MARKED], active=False)])
def test_a_firewall_that_is_open_or_off_is_in_nobodys_way(state: dict[str, Any]) -> None:
    assert commands(undo.firewall_opened, facts(ufw_state=state)) == []


RECORDS = {
    "unknown": undo.Before(),
    "off": undo.Before(known=True, active=False, defaults=DEFAULTS),
    "on": undo.Before(known=True, active=True, defaults=DEFAULTS),
    "on and open": undo.Before(known=True, active=True, defaults={**DEFAULTS, "incoming": "allow"}),
}


class Ufw:
    """An ufw that does what it is told, as far as undo tells it anything."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = {**state, "rules": list(state["rules"]), "defaults": dict(state["defaults"])}

    def run(self, line: str) -> None:
        words = line.split()
        if words[:2] == ["ufw", "disable"]:
            self.state["active"] = False
        elif words[:2] == ["ufw", "delete"]:
            self.state["rules"] = [
                rule for rule in self.state["rules"] if ufw_rules.bare(rule) != " ".join(words[2:])
            ]
        elif words[:2] == ["ufw", "default"]:
            self.state["defaults"][words[3]] = words[2]
        elif words[0] == "sh":
            self.state["defaults"]["incoming"] = "allow"
        else:
            assert words[0] in ("iptables-restore", "ip6tables-restore"), line


foreign = ["allow 80/tcp", "deny 25", "allow 22/tcp"]


@pytest.mark.parametrize("record", list(RECORDS))
@pytest.mark.parametrize("active", [True, False])
@given(rules=st.lists(st.sampled_from([*MARKED, WAY_IN, *foreign]), unique=True))
def test_once_is_enough_and_what_is_foreign_stays(record: str, rules: list[str], *, active: bool) -> None:
    before = RECORDS[record]
    machine = Ufw(firewall(rules, active=active))
    for command in undo.closing(machine.state, before, ports=[2222], ipv6=True):
        machine.run(str(command))
    # The record is gone by then, and before it is, nothing is left to do either.
    for known in (before, undo.Before()):
        assert undo.closing(machine.state, known, ports=[2222], ipv6=True) == []
    assert [rule for rule in machine.state["rules"] if rule in foreign] == [
        rule for rule in rules if rule in foreign
    ]
    still_on = active and record != "off"
    assert machine.state["active"] is still_on
    marked = [rule for rule in machine.state["rules"] if ufw_rules.is_ours(rule)]
    assert marked == ([WAY_IN] if still_on and WAY_IN in rules else [])
    if before.known:
        assert machine.state["defaults"] == before.defaults


def test_an_unknown_past_is_told(caplog: pytest.LogCaptureFixture) -> None:
    commands(undo.firewall_as_before, facts(ufw_state=firewall([WAY_IN, *MARKED])))
    assert "It stays on, with the way in open to everybody" in caplog.text


def test_a_known_one_is_gone_back_to(caplog: pytest.LogCaptureFixture) -> None:
    record = ufw.record(firewall([], active=False))
    some = commands(undo.firewall_as_before, facts(ufw_state=firewall([WAY_IN, *MARKED]), record=record))
    assert told(some)[:3] == ["_pass_gate", "arm", "ufw disable"]
    assert len(some) == 3 + 3
    assert "not known" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"schema": 2, "active": false, "defaults": {}}',
        '{"schema": 1, "active": "no"}',
    ],
)
def test_a_record_that_cannot_be_read_tells_nothing(text: str | None) -> None:
    assert undo.parse_record(text) == undo.Before()


def test_the_record_is_what_was_there() -> None:
    blank = firewall([], active=False, defaults={"incoming": "deny", "outgoing": "allow", "routed": "reject"})
    before = undo.parse_record(ufw.record(blank))
    # What ufw calls reject is nothing that could be laid down here.
    assert before == undo.Before(known=True, active=False, defaults={"incoming": "deny", "outgoing": "allow"})
    assert json.loads(ufw.record(blank))["schema"] == 1


def test_a_converge_takes_the_way_in_away() -> None:
    rules = [WAY_IN, "allow 80/tcp"]
    done = ufw_rules.changes(rules, prune_foreign=False)
    assert done.delete == ("allow 2222/tcp",)
    assert [rule.text for rule in done.add] == [rule.text for rule in ufw_rules.WANTED]


# --- units --------------------------------------------------------------------------------------------

UNIT = "/etc/systemd/system/x.service"
DROP_IN = "/etc/systemd/system/y.service.d/quietport.conf"


@pytest.mark.parametrize(
    ("unit", "path", "text", "expected"),
    [
        ("x.service", UNIT, None, []),
        ("x.service", UNIT, "[Unit]\n", []),
        ("x.service", UNIT, UNIT_TEXT, ["systemctl disable --now x.service", f"rm -f -- {UNIT}"]),
        ("y.service", DROP_IN, UNIT_TEXT, [f"rm -f -- {DROP_IN}"]),
    ],
)
def test_units_of_ours_go(unit: str, path: str, text: str | None, expected: list[str]) -> None:
    some = told(commands(undo.unit_gone, facts(**{path: text}), unit=unit, files=[path]))
    assert some == ([*expected, "systemctl daemon-reload"] if expected else [])


def test_all_that_a_converge_writes_begins_with_the_mark() -> None:
    from deploys.firewall import DROP_IN_TEXT

    for text in (sshd.UNIT_DROP_IN_TEXT, *sshd.FOLLOWER_FILES.values(), DROP_IN_TEXT):
        assert text.startswith(pure.OURS)


# --- the gate -----------------------------------------------------------------------------------------


class FakeHost:
    name = "vps1"
    print_prefix = ""
    lost = False

    def __init__(self) -> None:
        self.connector = self
        self.sessions: list[Any] = []
        self.filters = {"4": "-P INPUT ACCEPT\n"}

    @property
    def session(self) -> Any:
        return SimpleNamespace(port=22)

    def get_fact(self, fact: Any) -> dict[str, str]:
        return self.filters

    def switch(self, session: Any) -> None:
        if self.lost:
            raise ReachError("vps1: the lock of this run was lost to anna.")
        self.sessions.append(session)


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> list[Proof]:
    session: Any = SimpleNamespace(close=lambda: None)
    answers = [Proof(ok=True, sentence="vps1: a new key login at the public address.", session=session)]
    for module in (publicly, guard):
        monkeypatch.setattr(module, "prove_public", lambda name: answers[0])
    monkeypatch.setattr(guard, "prove", lambda name, addresses: pytest.fail("the tailnet is not asked"))
    return answers


def passes(host: Any) -> bool:
    return bool(publicly._pass_gate(None, host))


def test_the_run_goes_on_over_the_public_login(proof: list[Proof]) -> None:
    host = FakeHost()
    assert passes(host)
    assert host.sessions == [proof[0].session]


def test_without_it_nothing_is_taken_away(proof: list[Proof], caplog: pytest.LogCaptureFixture) -> None:
    host = FakeHost()
    host.lost = True
    assert not passes(host)
    assert "vps1: refused: the lock of this run was lost to anna." in caplog.text
    proof[0] = Proof(ok=False, sentence="vps1: cannot connect to 192.0.2.1:22: timed out.")
    assert not passes(host)
    assert "vps1: refused: cannot connect to 192.0.2.1:22: timed out." in caplog.text


@pytest.fixture
def confirmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, str]]]:
    """Which sessions confirmed which tokens, of a host that is armed."""
    found: list[tuple[Any, str]] = []
    monkeypatch.setattr(there, "confirm", lambda session, token: found.append((session, token)))
    there.note("vps1", there.Armed(token="a1b2", until=0))
    yield found
    there.note("vps1", None)


def test_the_end_is_proven_in_public(proof: list[Proof], confirmed: list[tuple[Any, str]]) -> None:
    host: Any = FakeHost()
    assert publicly._prove(None, host)
    assert confirmed == [(proof[0].session, "a1b2")]
    assert there.armed("vps1") is None


OPENED = '-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "quietport: opened by hand" -j ACCEPT\n'
DROPS = "-A INPUT -p tcp -m tcp --dport 22 -j DROP\n"


@pytest.mark.parametrize(("rules", "stays"), [(OPENED, True), (OPENED + DROPS, False), ("", True)])
def test_a_way_that_is_open_by_hand_alone_is_no_proof(
    proof: list[Proof],
    confirmed: list[tuple[Any, str]],
    caplog: pytest.LogCaptureFixture,
    rules: str,
    *,
    stays: bool,
) -> None:
    host: Any = FakeHost()
    host.filters = {"4": f"-P INPUT ACCEPT\n{rules}", "6": "-P INPUT ACCEPT\n"}
    assert publicly._prove(None, host) is stays
    assert bool(confirmed) is stays
    assert ("only the rule of `quietport open` lets anybody in at port 22" in caplog.text) is not stays
    assert (there.armed("vps1") is None) is stays
