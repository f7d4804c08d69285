"""`quietport doctor` on the operator's side: hosts by their own word, and what only an outsider can tell."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from control import asking, cli, doctor, outside, proof
from control.errors import QuietportError, ReachError
from control.outside import At, PublicSide, Seen
from control.reach import remember_tailnet
from control.session import Result
from control.settings import HostSettings
from lab import public
from lab.process import LabError
from lab.state import Run, Target
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Server, forget_caches

ADDRESS = "203.0.113.7"
GLOBAL = "9.9.9.9"


def check(name: str, status: str, reason: str, next_step: str = "") -> dict[str, str]:
    return {
        "check": name,
        "status": status,
        "reason": reason,
        "next_step": next_step,
        "at": "2031-05-01T10:00:00Z",
    }


PASS = check("tailnet", "PASS", "It is up.")
WARN = check("reboot", "WARN", "A reboot is due\x1b[2J.", "`systemctl reboot`")
FAIL = check("sshd", "FAIL", "sshd allows passwords.", "`quietport apply a`")
SKIP = check("compose", "SKIP", "no Docker is declared")
UNTOLD = check("disk", "SKIP", "could not tell: df did not answer")
CODES = {"pass": 0, "warn": 0, "fail": 1, "unknown": 3}


def printed(state: str, /, *checks: dict[str, str], code: int | None = None, **changes: Any) -> Result:
    document = {
        "schema": 1,
        "ok": state in ("pass", "warn"),
        "state": state,
        "at": "2031-05-01T10:00:00Z",
        "checks": checks,
        **changes,
    }
    return Result(CODES[state] if code is None else code, json.dumps(document).encode(), b"")


FINE = printed("pass", PASS, SKIP)
WARNS = printed("warn", PASS, WARN)
FAILS = printed("fail", PASS, FAIL, WARN)
UNSURE = printed("unknown", PASS, UNTOLD)
NOBODY = ReachError("a: no answer from 100.64.0.3 in 10 s.", hint="Is the host up?")


def listening(*places: tuple[str, Any]) -> Result:
    listeners = [{"protocol": protocol, "port": port, "verdict": "ok"} for protocol, port in places]
    return Result(0, json.dumps({"schema": 1, "ok": True, "listeners": listeners}).encode(), b"")


@dataclass
class Host:
    """What one host does: how it answers, by which way, and what is seen of it from outside."""

    says: Result | Exception = FINE
    tailnet: Exception | None = None
    public: Exception | None = field(default_factory=lambda: ReachError("a: no answer from 203.0.113.7."))
    sshd: Exception | None = None
    ports: Result = field(default_factory=lambda: listening(("tcp", 22)))
    links: bytes = b"[]"
    seen: Mapping[str, At] | Exception = field(default_factory=lambda: {ADDRESS: At(source="198.51.100.9")})
    keys: str = ""
    scanned: str = ""
    links_seen: list[Any] = field(default_factory=list)


class Opened:
    """A session of such a host."""

    def __init__(self, name: str, way: str, host: Host) -> None:
        self.name = name
        self.way = way
        self.host = host

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, command: str, *, timeout: float) -> Result:
        assert timeout <= asking.ANSWER_S
        if command.endswith("doctor --json"):
            if isinstance(self.host.says, Exception):
                raise self.host.says
            return self.host.says
        return self.host.ports if command.endswith("ports --json") else Result(0, self.host.links, b"")


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command line against such hosts."""

    def run(hosts: dict[str, Host], *arguments: str) -> tuple[int, str]:
        text = "".join(
            f'[hosts.{name}]\naddress = "{name}.example.org"\n{host.keys}\n' for name, host in hosts.items()
        )
        operator.hosts(text)

        def opened(name: str, *, way: str, keys_only: bool = False) -> Opened:
            assert keys_only is (way == "tailnet")
            trouble = hosts[name].tailnet if way == "tailnet" else hosts[name].public
            if trouble:
                raise trouble
            return Opened(name, way, hosts[name])

        def accepted(session: Opened) -> str:
            if session.host.sshd:
                raise session.host.sshd
            return f"{session.name}: a new key login was accepted by sshd."

        def addresses(name: str, links: list[Any]) -> list[str]:
            hosts[name].links_seen = links
            return [ADDRESS]

        def look(name: str, targets: list[str], *, ports: str, timeout: float) -> Seen:
            hosts[name].scanned = ports
            seen = hosts[name].seen
            if isinstance(seen, Exception):
                raise seen
            return Seen("this machine", seen)

        monkeypatch.setattr(doctor, "open_session", opened)
        monkeypatch.setattr(proof, "accepted", accepted)
        monkeypatch.setattr(outside, "addresses", addresses)
        monkeypatch.setattr(outside, "look", look)
        code = cli.main(["doctor", *arguments])
        return code, capsys.readouterr().out

    return run


def rows(out: str) -> dict[str, list[str]]:
    """The table: name = its other cells."""
    lines = out.partition("\n\n")[0].splitlines()
    assert lines[0].split() == ["HOST", "STATE", "FAIL", "WARN", "REACHED", "BY", "PUBLIC", "SIDE"]
    return {line.split()[0]: line.split(maxsplit=5)[1:] for line in lines[1:]}


# --- one table ---


def test_every_host_is_a_row(ask: Ask) -> None:
    lost = Host(tailnet=ReachError("d: no answer from 100.64.0.4.", hint="Is it up?"))
    code, out = ask({"a": Host(FAILS), "b": Host(), "c": Host(WARNS), "d": lost})
    assert code == 1
    assert rows(out) == {
        "a": ["fail", "1", "1", "tailnet", "closed"],
        "b": ["pass", "0", "0", "tailnet", "closed"],
        "c": ["warn", "0", "1", "tailnet", "closed"],
        "d": ["unreachable", "-", "-", "-", "closed"],
    }
    assert "\na: fail\n  FAIL sshd: sshd allows passwords.\n       `quietport apply a`\n" in out
    assert "  WARN reboot: A reboot is due?[2J.\n       `systemctl reboot`" in out
    assert "\nd: unreachable\n  no answer from 100.64.0.4. " in out
    # A host that is well has a row and no more.
    assert "\nb" not in out.partition("\n\n")[2]
    assert "It is up" not in out


@pytest.mark.parametrize(
    ("says", "code"), [(FINE, 0), (WARNS, 0), (UNSURE, 0), (FAILS, 1), (Result(127, b"", b""), 1)]
)
def test_the_exit_code(says: Result, code: int, ask: Ask) -> None:
    assert ask({"a": Host(says)})[0] == code


def test_what_a_host_could_not_tell_is_shown(ask: Ask) -> None:
    _, out = ask({"a": Host(UNSURE)})
    assert rows(out)["a"][0] == "unknown"
    assert "SKIP disk: could not tell: df did not answer" in out
    assert "compose" not in ask({"a": Host(FINE)})[1]


def test_only_those_that_are_named_are_asked(ask: Ask) -> None:
    code, out = ask({"a": Host(FAILS), "b": Host()}, "b")
    assert (code, list(rows(out))) == (0, ["b"])
    assert ask({"a": Host(), "b": Host()}, "a", "c") == (1, "")


def test_at_most_eight_at_the_same_time(operator: Operator) -> None:
    operator.hosts("".join(f'[hosts.h{number}]\naddress = "h{number}.example.org"\n' for number in range(20)))
    now = most = 0
    lock = threading.Lock()
    together = threading.Barrier(2)

    def count(name: str) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        # Nobody gets on alone: two at least are at work at once.
        together.wait(30)
        with lock:
            now -= 1
        return name

    assert asking.everyone([], count) == [f"h{number}" for number in range(20)]
    assert 2 <= most <= asking.AT_ONCE == 8


# --- JSON ---


def test_json(ask: Ask) -> None:
    seen = {ADDRESS: At(open=(22, 80), source="198.51.100.9")}
    code, out = ask({"a": Host(WARNS), "b": Host(seen=seen), "c": Host(tailnet=NOBODY)}, "--json")
    assert code == 1
    document = json.loads(out)
    assert (document["schema"], document["ok"]) == (1, False)
    assert document["hosts"]["a"] == {
        "state": "warn",
        "error": "",
        "tailnet": {"ok": True, "reason": "a new key login was accepted by sshd."},
        "public": {"state": "closed", "open": [], "reason": ""},
        "report": json.loads(WARNS.stdout),
    }
    b, c = document["hosts"]["b"], document["hosts"]["c"]
    assert (b["state"], b["report"]["state"]) == ("fail", "pass")
    assert b["public"] == {"state": "open", "open": [f"tcp {ADDRESS}:22", f"tcp {ADDRESS}:80"], "reason": ""}
    assert (c["state"], c["report"], c["tailnet"]["ok"]) == ("unreachable", None, False)
    assert json.loads(ask({"a": Host(WARNS)}, "--json")[1])["ok"] is True
    # Nobody says that it is ill, and nobody that it is well.
    code, out = ask({"a": Host(UNSURE)}, "--json")
    assert (code, json.loads(out)["ok"]) == (0, False)


# --- the host's word ---


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (TimeoutError("a: a command took longer than 60 s"), "a command took longer than 60 s"),
        (ReachError("a: the connection to 100.64.0.3 is lost."), "is lost"),
        (Result(127, b"", b"sh: not found"), "no quietport program yet. Converge it: `quietport apply a`"),
        (Result(2, b"", b"quietport: no program called 'doctor'."), "another version. Converge it: `quiet"),
        (Result(3, b"", b"quietport doctor: only root."), "could not tell: quietport doctor: only root."),
        (Result(-1, b"", b""), "could not tell: it said nothing"),
        (Result(0, b"", b""), "not understood"),
        (Result(0, b"[]", b""), "not understood"),
        (printed("pass", PASS, schema=2), "not understood"),
        (printed("pass"), "not understood"),
        (printed("pass", {**PASS, "status": "FINE"}), "not understood"),
        (printed("pass", {**PASS, "reason": None}), "not understood"),
        (printed("pass", {"check": "tailnet", "status": "PASS"}), "not understood"),
        (printed("pass", PASS, state=["pass"]), "not understood"),
        (printed("pass", PASS, state="fine"), "not understood"),
        (printed("pass", PASS, ok=False), "not understood"),
        (printed("pass", PASS, code=1), "not understood"),
        (printed("pass", PASS, code=3), "not understood"),
        (printed("pass", PASS, FAIL), "not understood"),
        (printed("pass", PASS, WARN), "not understood"),
        (printed("unknown", PASS, FAIL), "not understood"),
        (printed("fail", PASS), "not understood"),
        (printed("fail", FAIL, code=0), "not understood"),
        (Result(0, b"[" * 100_000, b""), "not understood"),
        (printed("pass", PASS, more=json.loads("[" * 200 + "]" * 200)), "not understood"),
    ],
)
def test_what_is_not_an_answer_is_never_fine(says: Result | Exception, words: str, ask: Ask) -> None:
    code, out = ask({"a": Host(says)})
    assert code == 1
    assert rows(out)["a"][:3] == ["unknown", "-", "-"]
    assert words in out


def test_a_warning_of_a_host_that_could_not_tell_all_is_shown(ask: Ask) -> None:
    _, out = ask({"a": Host(printed("unknown", WARN, UNTOLD))})
    assert rows(out)["a"][:3] == ["unknown", "0", "1"]


# --- the path through the tailnet ---


def test_a_host_that_answers_in_public_alone_fails(ask: Ask) -> None:
    code, out = ask({"a": Host(tailnet=NOBODY, public=None)})
    assert code == 1
    # The host's own doctor finds nothing wrong: what is wrong is found here.
    assert rows(out)["a"] == ["fail", "1", "0", "public", "closed"]
    assert "  FAIL tailnet path: no answer from 100.64.0.3 in 10 s. Is the host up?\n" in f"{out}\n"


def test_a_login_that_sshd_did_not_accept_is_no_path(ask: Ask) -> None:
    host = Host(sshd=ReachError("a: Tailscale SSH answered at 100.64.0.3 instead of sshd.", hint="Mend it."))
    code, out = ask({"a": host}, "--json")
    assert code == 1
    a = json.loads(out)["hosts"]["a"]
    assert a["tailnet"] == {
        "ok": False,
        "reason": "Tailscale SSH answered at 100.64.0.3 instead of sshd. Mend it.",
    }
    assert (a["state"], a["report"]["state"]) == ("fail", "pass")


def test_a_host_that_nobody_reaches_is_told_with_every_way(ask: Ask) -> None:
    host = Host(tailnet=NOBODY, public=ReachError("a: no answer from 203.0.113.7.", hint="Is the host up?"))
    a = json.loads(ask({"a": host}, "--json")[1])["hosts"]["a"]
    assert a["error"] == ("no answer from 100.64.0.3 in 10 s. no answer from 203.0.113.7. Is the host up?")
    assert a["public"]["state"] == "closed"


def test_a_password_that_cannot_be_had_is_a_row(ask: Ask) -> None:
    host = Host(tailnet=NOBODY, public=QuietportError("a: login_password: no such file."))
    code, out = ask({"a": host})
    assert (code, rows(out)["a"][0]) == (1, "unreachable")
    assert "login_password: no such file." in out


# --- the public side ---


def test_open_in_public_fails_whatever_the_host_says(ask: Ask) -> None:
    seen = {ADDRESS: At(open=(22, 8080), source="198.51.100.9"), "2001:db8::7": At(open=(22,), source="::2")}
    code, out = ask({"a": Host(seen=seen)})
    assert code == 1
    assert rows(out)["a"] == ["fail", "1", "0", "tailnet", "open: 22, 8080"]
    assert f"public side: open: tcp {ADDRESS}:22, tcp {ADDRESS}:8080, tcp [2001:db8::7]:22.\n" in out
    assert "`quietport ports a` says whose they are" in out


@pytest.mark.parametrize(
    ("seen", "cell", "words"),
    [
        (QuietportError("the scan failed."), "not asked", "the scan failed."),
        ({}, "not asked", "No public address of it is known."),
        ({ADDRESS: At(problem="no way")}, "not asked", f"{ADDRESS} was not asked: no way."),
        (
            {ADDRESS: At(), "2001:db8::7": At(problem="no way")},
            "not asked everywhere",
            "2001:db8::7 was not asked: no way.",
        ),
    ],
)
def test_what_was_not_asked_is_not_closed(
    seen: Mapping[str, At] | Exception, cell: str, words: str, ask: Ask
) -> None:
    code, out = ask({"a": Host(seen=seen)})
    assert (code, rows(out)["a"]) == (0, ["pass", "0", "0", "tailnet", cell])
    assert f"  public side: {words}" in out
    assert json.loads(ask({"a": Host(seen=seen)}, "--json")[1])["hosts"]["a"]["public"]["state"] == "unknown"


def test_declared_ports_are_open_and_fine(ask: Ask) -> None:
    keys = 'public_listeners = [{port = 443, unit = "caddy.service", reason = "the web site"}]'
    code, out = ask({"a": Host(keys=keys, seen={ADDRESS: At(open=(443,), source=GLOBAL)})})
    assert (code, rows(out)["a"][4]) == (0, "closed")
    assert f"tcp {ADDRESS}:443 is open: declared, the web site." in out


def test_the_ports_asked_are_the_usual_ones_and_the_hosts_own(ask: Ask) -> None:
    host = Host(
        keys="port = 2200",
        ports=listening(("tcp", 41234), ("udp", 41235), ("tcp", 0), ("tcp", None), ("tcp", True)),
        links=b'[{"ifname": "eth0"}, 7]',
    )
    ask({"a": host})
    asked = host.scanned.split(",")
    assert len(asked) == len(set(asked))
    assert {"22", "80", "1024", "8080", "2200", "41234"} < set(asked)
    assert not {"0", "41235"} & set(asked)
    assert host.links_seen == [{"ifname": "eth0"}]
    # A host that does not say what listens, or what addresses it has, is looked at all the same.
    mute = Host(ports=Result(3, b"", b""), links=b"ip: not found")
    assert ask({"a": mute})[0] == 0
    assert "22" in mute.scanned.split(",")
    assert mute.links_seen == []


@pytest.mark.parametrize(
    "links",
    [
        b"[" * 100_000,
        b"ip: not found",
        b"7",
        b"{}",
        b'[{"ifname": "e", "addr_info": null}]',
        b'[{"ifname": "e", "addr_info": [7]}]',
        b'[{"ifname": "e", "addr_info": ["local"]}]',
        b'[{"ifname": "e", "addr_info": [{"local": null}]}]',
        b'[{"ifname": "e", "addr_info": [{"local": "1.2.3"}]}]',
    ],
    ids=lambda links: links[:60].decode(),
)
def test_what_one_host_says_of_its_addresses_is_its_own_row(links: bytes, ask: Ask) -> None:
    """And its public side is looked at by what is declared: nobody gets around that by talking nonsense."""
    odd = Host(links=links)
    code, out = ask({"a": Host(FAILS), "b": odd, "c": Host()})
    assert code == 1
    assert rows(out) == {
        "a": ["fail", "1", "1", "tailnet", "closed"],
        "b": ["pass", "0", "0", "tailnet", "not asked everywhere"],
        "c": ["pass", "0", "0", "tailnet", "closed"],
    }
    words = "could not tell its own addresses: what `ip` says there is not understood."
    assert out.count(words) == 1
    assert (odd.links_seen, "22" in odd.scanned.split(",")) == ([], True)
    seen = {ADDRESS: At(open=(22,), source="198.51.100.9")}
    b = json.loads(ask({"b": Host(links=links, seen=seen)}, "--json")[1])["hosts"]["b"]
    assert (b["state"], b["public"]["state"]) == ("fail", "open")
    assert words in b["public"]["reason"]


# --- what may be open, by who asks ---

BREAK_GLASS = ("198.51.100.0/24", "2001:db8:7::/48")


def judged(address: str, port: int, source: str, **values: Any) -> PublicSide:
    settings = HostSettings(address=address, **values)
    return outside.judge(settings, Seen("x", {address: At(open=(port,), source=source)}))


@pytest.mark.parametrize(
    ("address", "port", "source", "networks", "state", "words"),
    [
        (GLOBAL, 22, "198.51.100.9", BREAK_GLASS, "closed", "break_glass_cidrs lists 198.51.100.9."),
        ("2001:db8::1", 22, "2001:db8:7::9", BREAK_GLASS, "closed", "lists 2001:db8:7::9."),
        (GLOBAL, 22, "8.8.8.8", BREAK_GLASS, "open", ""),
        ("2001:db8::1", 22, "2001:db8:8::9", BREAK_GLASS, "open", ""),
        (GLOBAL, 23, "198.51.100.9", BREAK_GLASS, "open", ""),
        (GLOBAL, 22, "198.51.100.9", (), "open", ""),
        # Behind NAT nobody knows here what address the host sees; within a private network it is this one.
        (GLOBAL, 22, "192.168.1.5", BREAK_GLASS, "closed", "is not known here"),
        ("192.168.1.7", 22, "192.168.1.5", BREAK_GLASS, "open", ""),
        ("192.168.1.7", 22, "192.168.1.5", ("192.168.1.0/24",), "closed", "lists 192.168.1.5."),
    ],
)
def test_break_glass_is_for_the_listed_networks(
    address: str, port: int, source: str, networks: tuple[str, ...], state: str, words: str
) -> None:
    side = judged(address, port, source, break_glass_cidrs=networks)
    assert side.state == state
    assert words in side.reason
    assert bool(side.open) is (state == "open")


def test_a_declared_port_is_for_its_protocol() -> None:
    def listener(protocol: str) -> dict[str, Any]:
        return {"port": 443, "protocol": protocol, "reason": "the web site."}

    assert judged(GLOBAL, 443, GLOBAL, public_listeners=[listener("tcp")]).state == "closed"
    assert judged(GLOBAL, 443, GLOBAL, public_listeners=[listener("udp")]).state == "open"
    assert judged(GLOBAL, 444, GLOBAL, public_listeners=[listener("tcp")]).open == (f"tcp {GLOBAL}:444",)


# --- looking, with real sockets ---


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.2", 0)) as server:
        yield int(server.getsockname()[1])


def closed_port() -> int:
    with socket.create_server(("127.0.0.2", 0)) as server:
        return int(server.getsockname()[1])


def test_an_open_port_is_found(operator: Operator, open_port: int) -> None:
    operator.host(address="127.0.0.2")
    closed = closed_port()
    seen = outside.look("vps1", ["127.0.0.2"], ports=f"{closed},{open_port}", timeout=30)
    assert seen.at == {"127.0.0.2": At(open=(open_port,), source="127.0.0.1")}
    nothing = outside.look("vps1", ["127.0.0.2"], ports=str(closed), timeout=30)
    assert nothing.open == {"127.0.0.2": []}
    settings = HostSettings(address="127.0.0.2")
    assert outside.judge(settings, seen).open == (f"tcp 127.0.0.2:{open_port}",)
    assert outside.judge(settings, nothing) == PublicSide("closed", asked=("127.0.0.2",))


def test_what_cannot_be_asked_from_here_is_not_asked(operator: Operator, open_port: int) -> None:
    operator.host(address="127.0.0.2")
    remember_tailnet("vps1", ["127.0.0.3"])
    targets = ["127.0.0.1", "127.0.0.3", "255.255.255.255", "127.0.0.2"]
    seen = outside.look("vps1", targets, ports=str(open_port), timeout=30)
    assert seen.at["127.0.0.1"].problem == "it is this machine's own address"
    assert seen.at["127.0.0.3"].problem == "the way there leads over the tailnet"
    assert seen.at["255.255.255.255"].problem.startswith("this machine has no way there (")
    assert seen.open == {"127.0.0.2": [open_port]}
    assert outside.judge(HostSettings(address="127.0.0.2"), seen).state == "open"
    none = outside.look("vps1", targets[:3], ports=str(open_port), timeout=30)
    assert outside.judge(HostSettings(address="127.0.0.2"), none).state == "unknown"


def test_addresses_of_the_tailnet_are_never_public(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.host(address="127.0.0.2")

    class Probe(socket.socket):
        """A machine with a way everywhere, and the address of `source`."""

        source = GLOBAL

        def connect(self, address: Any) -> None:
            return None

        def getsockname(self) -> Any:
            return (self.source, 1)

    monkeypatch.setattr(outside.socket, "socket", Probe)
    assert outside._way("198.51.100.7", set()) == At(source=GLOBAL)
    tailnet = At(problem="the way there leads over the tailnet")
    assert outside._way("100.64.0.7", set()) == tailnet
    assert outside._way("fd7a:115c:a1e0::7", set()) == tailnet
    # By an exit node of the tailnet.
    Probe.source = "100.64.0.2"
    assert outside._way("198.51.100.7", set()) == tailnet


def test_a_router_that_turns_everything_away_tells_nothing() -> None:
    none = {"open": [], "refused": 0, "unreachable": 9, "silent": 0}
    assert outside._judged(none, GLOBAL).problem
    assert outside._judged({**none, "silent": 1}, GLOBAL) == At(source=GLOBAL)
    assert outside._judged({**none, "open": [22]}, GLOBAL) == At(open=(22,), source=GLOBAL)


def test_a_scan_that_fails_is_a_sentence(operator: Operator) -> None:
    operator.host(address="127.0.0.2")
    with pytest.raises(QuietportError, match=r"the scan of 127\.0\.0\.2 failed: .*invalid parse_ports value"):
        outside.look("vps1", ["127.0.0.2"], ports="0", timeout=30)
    with pytest.raises(QuietportError, match="took longer than 0 s"):
        outside.look("vps1", ["127.0.0.2"], ports="22", timeout=0.001)


# --- which addresses ---


def test_the_addresses_are_the_declared_and_the_hosts_own(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(address: str, *_: object, **__: object) -> list[Any]:
        if address == "nowhere.example.org":
            raise socket.gaierror(-2, "Name or service not known")
        assert address == "vps1.example.org"
        places = [(ADDRESS, 0), ("2001:db8::7", 0, 0, 0), (ADDRESS, 0), (f"::ffff:{GLOBAL}", 0, 0, 0)]
        return [(None, None, None, "", place) for place in places]

    monkeypatch.setattr(outside.socket, "getaddrinfo", found)
    operator.host(address="vps1.example.org")
    links = [
        {
            "ifname": "eth0",
            "addr_info": [{"local": "10.0.0.5"}, {"local": "2606:4700::5"}, {"broadcast": ""}],
        },
        {"ifname": "tailscale0", "addr_info": [{"local": "8.8.8.8"}]},
        {"ifname": "eth1"},
    ]
    declared = [ADDRESS, "2001:db8::7", GLOBAL]
    assert outside.addresses("vps1") == declared
    assert outside.addresses("vps1", links) == [*declared, "2606:4700::5"]
    for odd in ({"addr_info": None}, {"addr_info": [7]}, {"addr_info": [{"local": []}]}, 7):
        with pytest.raises(QuietportError, match=r"vps1: what `ip` says of its addresses is not understood"):
            outside.addresses("vps1", [*links, odd])
    operator.host(address="nowhere.example.org")
    with pytest.raises(QuietportError, match=r"vps1: cannot resolve nowhere\.example\.org: Name or service"):
        outside.addresses("vps1")


def test_an_address_behind_a_jump_host_is_not_asked_from_here(operator: Operator) -> None:
    (operator.home / ".ssh/config").write_text("Host inner\n  HostName 127.0.0.2\n")
    operator.host(address="inner")
    assert outside.addresses("vps1") == ["127.0.0.2"]
    (operator.home / ".ssh/config").write_text(
        "Host inner\n  HostName 127.0.0.2\n  ProxyJump j.example.org\n"
    )
    forget_caches()
    assert outside.addresses("vps1") == []
    assert outside.judge(HostSettings(address="inner"), Seen("here", {})).state == "unknown"


# --- a lab's target ---

TARGET = Target(
    name="vps1",
    kind="container",
    distro="trixie",
    public_ip="10.213.7.13",
    public_ip6="fd71:7069:6574:7::13",
    bridge="qpc-00c0ffee",
    namespace="qpp-00c0ffee-unit",
    peer_ip="10.213.7.113",
    peer_ip6="fd71:7069:6574:7::113",
)


@pytest.fixture
def a_lab(operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run("unit", root=tmp_path)
    run.create()
    run.save_target(TARGET)
    run.hosts_file.write_text(
        f'[hosts.vps1]\naddress = "{TARGET.public_ip}"\n[hosts.other]\naddress = "127.0.0.2"\n'
    )
    monkeypatch.setenv("QUIETPORT_HOSTS", str(run.hosts_file))
    forget_caches()
    return run


@pytest.mark.parametrize(("kind", "parts"), [("container", 2), ("vm", 1)])
def test_a_labs_target_is_looked_at_by_its_neighbour(
    a_lab: Run, kind: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_lab.save_target(Target(**{**TARGET.__dict__, "kind": kind}))
    asked: list[list[str]] = []

    def scan(target: Target, part: list[str], *, ports: str, timeout: float) -> dict[str, public.Ports]:
        assert (target.name, ports) == ("vps1", "22,80")
        asked.append(part)
        return {address: public.Ports((22,), 0, 0, 1) for address in part}

    monkeypatch.setattr(public, "scan", scan)
    seen = outside.look("vps1", ["192.0.2.1"], ports="22,80")
    assert seen.at == {
        TARGET.public_ip: At(open=(22,), source=TARGET.peer_ip),
        TARGET.public_ip6: At(open=(22,), source=TARGET.peer_ip6),
    }
    assert len(asked) == parts


def test_a_neighbour_that_is_not_there_is_no_crash(a_lab: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: object, **__: object) -> dict[str, public.Ports]:
        raise LabError("vps1 has no public side here.", hint="Mend it.")

    monkeypatch.setattr(public, "scan", scan)
    side = doctor._public_side("vps1", [], [])
    assert side == PublicSide("unknown", reason="vps1 has no public side here. Mend it.")


def test_another_host_of_a_labs_file_is_looked_at_from_here(a_lab: Run, open_port: int) -> None:
    assert outside.neighbour("vps1") == TARGET
    assert outside.neighbour("other") is None
    seen = outside.look("other", ["127.0.0.2"], ports=str(open_port), timeout=30)
    assert (seen.where, seen.open) == ("this machine", {"127.0.0.2": [open_port]})


# --- all of it, over a real connection ---


@NEEDS_ROOT
def test_over_a_real_connection(
    operator: Operator,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "quiet port"
    monkeypatch.setattr(asking, "LAUNCHER", str(program))
    # Loopback stands in for the tailnet's interface, and 127.0.0.2 for the public address.
    monkeypatch.setattr(proof, "INTERFACE", "lo")
    monkeypatch.setattr(doctor, "LINKS", "echo []")
    monkeypatch.setattr(doctor, "WELL_KNOWN", str(closed_port()))
    operator.host(address="127.0.0.2", port=server.port)
    remember_tailnet("vps1", ["127.0.0.1"])

    def run() -> tuple[int, dict[str, Any]]:
        code = cli.main(["doctor", "--json"])
        return code, json.loads(capsys.readouterr().out)["hosts"]["vps1"]

    # sshd at every address, and no program: a blank host.
    code, blank = run()
    assert (code, blank["state"], blank["report"]) == (1, "fail", None)
    assert blank["error"].startswith("it has no quietport program yet.")
    assert blank["public"]["open"] == [f"tcp 127.0.0.2:{server.port}"]

    program.write_text(
        f"#!/bin/sh\ncase $1 in doctor) echo '{WARNS.stdout.decode()}';;\n"
        f"ports) echo '{listening(('tcp', server.port)).stdout.decode()}';; esac\n"
    )
    program.chmod(0o755)
    server.stop()
    server.addresses = ("127.0.0.1",)
    server.start()
    before = server.log.count("Accepted publickey")
    code, private = run()
    assert (code, private["state"], private["error"]) == (0, "warn", "")
    assert private["tailnet"] == {
        "ok": True,
        "reason": "a new key login over the tailnet (127.0.0.1) was accepted by sshd.",
    }
    assert private["public"] == {"state": "closed", "open": [], "reason": ""}
    # One login is the proof and the examination.
    assert server.log.count("Accepted publickey") == before + 1

    server.stop()
    server.addresses = ("127.0.0.2",)
    server.start()
    code, public_alone = run()
    assert (code, public_alone["state"], public_alone["report"]["state"]) == (1, "fail", "warn")
    assert not public_alone["tailnet"]["ok"]
    assert "127.0.0.1" in public_alone["tailnet"]["reason"]

    server.stop()
    code, gone = run()
    assert (code, gone["state"], gone["report"]) == (1, "unreachable", None)
    assert gone["public"]["state"] == "closed"
