"""The policy on a host: declared exceptions, Docker's ports, Funnel and serve, sockets of systemd, vsock."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import containers, serve, survey
from quietport.cli import main
from quietport.commands import Done
from quietport.containers import Published, parse_published
from quietport.errors import HostProgramError
from quietport.net import Interfaces
from quietport.ports import Declared, Evidence, Judged, PublicSshd, judge_host, parse_declared, report
from quietport.processes import SHOW_SOCKET_UNITS, Program, is_running, parse_socket_units, shell_is_running
from quietport.serve import Served, parse_serve
from quietport.ss import Listener, Process, parse_vsock

HOST = Interfaces(
    owners={"127.0.0.1": ("lo",), "203.0.113.5": ("eth0",), "100.64.0.7": ("tailscale0",)},
    kinds={"lo": "loopback", "eth0": "public", "tailscale0": "tailnet"},
)
PROXY = Program("docker.service", "/usr/sbin/docker-proxy")
CADDY = Program("caddy.service", "/usr/bin/caddy")
SSHD = Program("ssh.service", "/usr/sbin/sshd")


def held(name: str, *pids: int, port: int = 443, **changes: Any) -> Listener:
    processes = tuple(Process(name, pid) for pid in pids)
    return replace(Listener("tcp", "0.0.0.0", port, processes=processes), **changes)


def judged(*listeners: Listener, **evidence: Any) -> list[Judged]:
    return judge_host(Evidence(listeners, HOST, **evidence))


def port_of(container: str, ip: str = "0.0.0.0", port: int = 8080, protocol: Any = "tcp") -> Published:
    return Published(container, ip, port, 80, protocol)


# --- declared exceptions ------------------------------------------------------------------------------

WEB = Declared("tcp", 443, "the web site", "caddy.service")
WIREGUARD = Declared("udp", 51820, "a tunnel home")


@pytest.mark.parametrize(
    ("listener", "programs", "verdict"),
    [
        (held("caddy", 10), {10: CADDY}, "allowed"),
        (held("caddy", 10, 11), {10: CADDY, 11: CADDY}, "allowed"),
        (held("caddy", 10, address="203.0.113.5"), {10: CADDY}, "allowed"),
        (held("caddy", 10), {10: replace(CADDY, unit="session-3.scope")}, "violation"),
        (held("caddy", 10, 11), {10: CADDY, 11: replace(CADDY, unit="")}, "violation"),
        (held("caddy", 10, 11), {10: CADDY}, "violation"),
        (held("caddy"), {}, "violation"),
        (held("caddy", 10, port=444), {10: CADDY}, "violation"),
        (held("caddy", 10, protocol="udp"), {10: CADDY}, "violation"),
        (held("", port=51820, protocol="udp"), {}, "allowed"),
        (held("x", 10, port=51820, protocol="udp"), {10: Program()}, "violation"),
        (held("x", 10, port=51820, protocol="udp"), {}, "violation"),
        (held("x", 10, port=51820, protocol="udp"), {10: CADDY}, "violation"),
    ],
)
def test_what_hosts_toml_excuses(listener: Listener, programs: dict[int, Program], verdict: str) -> None:
    (entry,) = judged(listener, programs=programs, declared=(WEB, WIREGUARD))
    assert (entry.exposure, entry.verdict) == ("public", verdict)
    assert entry.hint.startswith("Declared in hosts.toml: ") == (verdict == "allowed")
    (bare,) = judged(listener, programs=programs)
    assert bare.verdict == "violation", "the positive control"
    declared_for = {443: "caddy.service", 51820: "the kernel"}.get(listener.port, "")
    if listener.protocol == ("udp" if listener.port == 51820 else "tcp") and declared_for:
        assert (f"declares this port for {declared_for} alone" in entry.hint) == (verdict == "violation")
    else:
        assert "declares this port" not in entry.hint


@pytest.mark.parametrize("unit", ["ssh.service", "ssh.socket", "sshd@7.service"])
def test_sshd_is_excused_by_break_glass_alone(unit: str) -> None:
    listener, programs = held("sshd", 10, port=2222), {10: replace(SSHD, unit=unit)}
    (entry,) = judged(listener, programs=programs, declared=[Declared("tcp", 2222, "x", unit)])
    assert entry.verdict == "violation"
    other = {10: CADDY}
    declared = [Declared("tcp", port, "x", CADDY.unit) for port in (22, 23)]
    verdicts = [judged(held("x", 10, port=port), programs=other, declared=declared) for port in (22, 23)]
    assert [found[0].verdict for found in verdicts] == ["violation", "allowed"]
    allowed = judged(held("sshd", 10, port=22), programs={10: SSHD}, public_sshd=PublicSshd())
    assert allowed[0].verdict == "allowed"


def test_an_exception_that_is_not_understood_excuses_nothing() -> None:
    good = {"protocol": "tcp", "port": 443, "unit": "caddy.service", "reason": "the web site"}
    assert parse_declared([good, {**good, "unit": None}]) == (WEB, replace(WEB, unit=""))
    for change in ({"protocol": "sctp"}, {"port": "443"}, {"reason": " "}, {"reason": 1}, {"unit": 1}):
        assert parse_declared([{**good, **change}]) == ()
    for other in (None, {}, "x", [None], ["x"], 3):
        assert parse_declared(other) == ()


# --- Docker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docker-proxy", "dockerd"])
def test_a_proxy_is_shown_with_its_container(name: str) -> None:
    (entry,) = judged(held(name, 10, port=8080), programs={10: PROXY}, published=[port_of("web")])
    assert entry.to_json()["process"] == f"{name} (web)"
    assert (entry.verdict, entry.unit) == ("violation", "docker.service")
    assert "DOCKER-USER" in entry.hint


@pytest.mark.parametrize(
    ("address", "ip", "named"),
    [
        ("0.0.0.0", "0.0.0.0", True),
        ("::", "::", True),
        ("*", "::", True),
        ("*", "0.0.0.0", True),
        ("::", "", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", True),
    ],
)
def test_a_proxy_answers_for_the_same_place(address: str, ip: str, named: bool) -> None:
    listener = held("docker-proxy", 10, port=8080, address=address)
    found = judged(listener, programs={10: PROXY}, published=[port_of("web", ip)])
    assert found[0].container == ("web" if named else "")
    assert len(found) == (1 if named else 2)


def test_a_port_without_a_proxy_is_found() -> None:
    ports = [
        port_of("web"),
        port_of("home", "127.0.0.1", 8081),
        port_of("vpn", "100.64.0.7", 8082),
        port_of("every", "", 8083),
        port_of("voice", "::", 8084, "udp"),
        port_of("sctp", "203.0.113.5", 8085, "sctp"),
        port_of("none", "0.0.0.0", 0),
    ]
    found = judged(published=ports)
    assert [(one.process, one.listener.where, one.exposure, one.verdict) for one in found] == [
        ("docker (web)", "0.0.0.0", "public", "violation"),
        ("docker (home)", "127.0.0.1", "loopback", "ok"),
        ("docker (vpn)", "100.64.0.7", "tailnet", "ok"),
        ("docker (every)", "*", "public", "violation"),
        ("docker (voice)", "::", "public", "violation"),
        ("docker (sctp)", "203.0.113.5", "public", "violation"),
    ]
    assert all(("DOCKER-USER" in one.hint) == (one.verdict == "violation") for one in found)
    exception = Declared("tcp", 8080, "for the tailnet, the chain shields it", "docker.service")
    assert judged(published=ports, declared=[exception])[0].verdict == "allowed"


def test_who_calls_itself_docker_proxy_hides_no_port() -> None:
    """It listens where a container's port is forwarded without a proxy: both are shown."""
    stranger = Program("session-3.scope", "/tmp/docker-proxy")
    found = judged(held("docker-proxy", 10, port=8080), programs={10: stranger}, published=[port_of("web")])
    assert [one.process for one in found] == ["docker-proxy", "docker (web)"]
    assert "find out what it is" in found[0].hint


INSPECTED = (
    '"/web" {"443/tcp":null,"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"}],'
    '"53/udp":[{"HostIp":"","HostPort":""}]}\nWARNING: something\n"/odd" null\n"/host net" {}\n'
)


def test_what_inspect_prints() -> None:
    assert parse_published(INSPECTED) == [
        Published("web", "0.0.0.0", 8080, 80, "tcp"),
        Published("web", "", 0, 53, "udp"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '"/web"',
        '"/web" {',
        '"/web" []x',
        '"/web" [1]',
        '"/web" {"80/x":[{}]}',
        '"/web" {"80/tcp":[{"HostIp":"x"}]}',
        '"/w" {"80/tcp":[1]}',
    ],
)
def test_a_container_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises((ValueError, LookupError, AttributeError)):
        parse_published(text)


def answers(*, running: Sequence[str] = (), **outputs: Done) -> Any:
    """Stand-ins for what runs on the host, and for its programs by their second word."""

    def run(argv: Sequence[str], **_: Any) -> Done:
        return outputs[argv[1]]

    return run, lambda name: name in running


def use(monkeypatch: pytest.MonkeyPatch, module: Any, **world: Any) -> None:
    run, running = answers(**world)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "is_running", running)


ONE = Done(0, "abc\n", "")


def test_docker_is_asked_only_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, containers)
    assert containers.published() == []
    use(monkeypatch, containers, running=["dockerd"], ps=Done(0, "", ""))
    assert containers.published() == []
    use(monkeypatch, containers, running=["dockerd"], ps=ONE, inspect=Done(0, INSPECTED, ""))
    assert [port.container for port in containers.published()] == ["web", "web"]


@pytest.mark.parametrize(
    "world",
    [
        {"running": ["containerd-shim"]},
        {"running": ["dockerd"], "ps": Done(1, "", "no socket"), "inspect": Done(1, "", "")},
        {"running": ["dockerd"], "ps": ONE, "inspect": Done(1, INSPECTED, "No such object")},
        {"running": ["dockerd"], "ps": ONE, "inspect": Done(0, '"/web" x', "")},
    ],
)
def test_a_docker_that_does_not_say_is_not_a_quiet_one(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, containers, **world)
    with pytest.raises(HostProgramError) as caught:
        containers.published()
    assert caught.value.code == 3


def test_a_container_that_ends_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inspected = iter([Done(1, "", "No such object: abc"), Done(0, INSPECTED, "")])
    monkeypatch.setattr(containers, "is_running", lambda name: name == "dockerd")
    monkeypatch.setattr(containers, "run", lambda argv, **_: ONE if argv[1] == "ps" else next(inspected))
    assert len(containers.published()) == 2


# --- Funnel and serve ---------------------------------------------------------------------------------

# As in ipn/serve.go and in what tailscale 1.92 printed (tailscale/tailscale#18289).
SERVING: dict[str, Any] = {
    "TCP": {"443": {"HTTPS": True}, "80": {"HTTP": True}, "2222": {"TCPForward": "127.0.0.1:22"}},
    "Web": {"vps1.tail.ts.net:443": {"Handlers": {"/": {"Proxy": "http://user:canary@127.0.0.1:3000"}}}},
    "Services": {
        "svc:chat": {"TCP": {"27224": {"TCPForward": "localhost:27224"}}},
        "svc:vpn": {"Tun": True},
    },
}
FUNNEL = {**SERVING, "AllowFunnel": {"vps1.tail.ts.net:443": True}}
AWAY = {"Foreground": {"abc": {"TCP": {"8443": {"TerminateTLS": "x", "TCPForward": "127.0.0.1:1"}}}}}


def test_serve_entries_are_listed() -> None:
    found = judged(served=parse_serve(json.dumps(SERVING)))
    assert {(one.listener.where, one.listener.port) for one in found} == {
        ("*%tailscale0", 443),
        ("*%tailscale0", 80),
        ("*%tailscale0", 2222),
        ("svc:chat", 27224),
        ("svc:vpn", 0),
    }
    assert {(one.exposure, one.verdict, one.process) for one in found} == {
        ("tailnet", "ok", "tailscale serve")
    }
    assert "canary" not in json.dumps(report(found))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FUNNEL, "tailscale funnel --https=443 off"),
        ({"AllowFunnel": {"vps1.tail.ts.net:443": True}}, "--https=443 off"),
        ({"TCP": {"443": {"TCPForward": "x"}}, "AllowFunnel": {"vps1.tail.ts.net:443": True}}, "--tcp=443"),
        ({"Foreground": {"a": {"AllowFunnel": {"vps1.tail.ts.net:443": True}}}}, "in the foreground"),
        ({"Foreground": {"a": FUNNEL}}, "in the foreground"),
    ],
)
def test_funnel_is_a_violation_although_nothing_listens(config: dict[str, Any], words: str) -> None:
    found = [one for one in judged(served=parse_serve(json.dumps(config))) if one.verdict == "violation"]
    (entry,) = found
    assert (entry.exposure, entry.listener.where, entry.listener.port) == ("public", "vps1.tail.ts.net", 443)
    assert words in entry.hint
    off = json.dumps(config).replace('net:443": true', 'net:443": false')
    assert [one for one in judged(served=parse_serve(off)) if one.verdict != "ok"] == []


def test_a_foreground_entry_and_an_empty_configuration() -> None:
    (entry,) = parse_serve(json.dumps(AWAY))
    assert entry == Served(8443, kind="tls-terminated-tcp", foreground=True)
    assert parse_serve("null") == parse_serve("{}") == []


@pytest.mark.parametrize(
    "text", ["", "[]", "x", '{"TCP": []}', '{"TCP": {"x": {}}}', '{"AllowFunnel": {"x": true}}']
)
def test_a_configuration_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_serve(text)


def test_tailscaled_is_asked_only_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, serve)
    assert serve.served() == []
    use(monkeypatch, serve, running=["tailscaled"], serve=Done(0, json.dumps(FUNNEL), ""))
    assert any(one.funnel for one in serve.served())
    for answer in (Done(1, "", "Access denied"), Done(0, "No serve config", "")):
        use(monkeypatch, serve, running=["tailscaled"], serve=answer)
        with pytest.raises(HostProgramError) as caught:
            serve.served()
        assert caught.value.code == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 70000) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["TCP", "Web", "AllowFunnel", "Services", "Foreground", "443", "a:443", "Tun", "80/tcp"]
            )
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_odd_answers_are_understood_or_refused(document: Any) -> None:
    text = json.dumps(document)
    try:
        found = judged(served=parse_serve(text))
    except ValueError:
        found = []
    json.dumps(report(found))
    try:
        json.dumps(report(judged(published=parse_published(f'"/web" {text}'))))
    except (ValueError, LookupError, AttributeError, TypeError):
        return


# --- systemd's sockets and vsock ----------------------------------------------------------------------

UNITS = """\
Id=ssh.socket
Listen=0.0.0.0:22 (Stream)
Listen=[::]:22 (Stream)
ActiveState=inactive

ActiveState=active
Listen=[::]:631 (Stream)
Listen=/run/cups/cups.sock (Stream)
Id=cups.socket

Id=dns.socket
ActiveState=active
Listen=127.0.0.53:53 (Datagram)

Id=sshd-vsock.socket
ActiveState=active
Listen=vsock:4294967295:22 (Stream)

Id=later.socket
ActiveState=active
Listen=vsock::23 (Stream)
Listen=vsock:3:24 (Stream)
Listen=vsock:x:25 (Stream)
"""
VSOCK = (
    "Netid State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n"
    'v_str LISTEN 0      0                  *:22              *:*    users:(("systemd",pid=1,fd=77))\n'
    "v_str LISTEN 0      0                  3:4000000000      *:*\n"
)
INIT = Program("init.scope", "/usr/lib/systemd/systemd")


def test_socket_units_by_their_place() -> None:
    assert parse_socket_units(UNITS) == {
        ("tcp", "::", 631): "cups.socket",
        ("udp", "127.0.0.53", 53): "dns.socket",
        ("vsock", "*", 22): "sshd-vsock.socket",
        ("vsock", "*", 23): "later.socket",
        ("vsock", "3", 24): "later.socket",
    }
    assert parse_socket_units("") == parse_socket_units("x\n\n\n=\n") == {}


def test_what_systemd_listens_on_is_its_socket_units() -> None:
    listener = held("systemd", 1, address="*", port=631)
    evidence: dict[str, Any] = {"programs": {1: INIT}, "socket_units": parse_socket_units(UNITS)}
    (entry,) = judged(listener, **evidence)
    assert (entry.unit, entry.verdict) == ("cups.socket", "violation")
    assert "systemctl disable --now cups.socket" in entry.hint
    (other,) = judged(replace(listener, port=632), **evidence)
    assert other.unit == "init.scope"
    # Another process that has the same place is not the unit's.
    (both,) = judged(replace(listener, processes=(Process("systemd", 1), Process("x", 9))), **evidence)
    assert both.unit == "cups.socket"
    started = replace(listener, processes=(Process("cupsd", 8), Process("systemd", 1)))
    evidence["programs"][8] = Program("cups.service", "/usr/sbin/cupsd")
    for unit in ("cups.socket", "cups.service"):
        declared = [Declared("tcp", 631, "printing", unit)]
        for one, verdict in ((listener, "allowed"), (started, "allowed"), (both.listener, "violation")):
            assert judged(one, declared=declared, **evidence)[0].verdict == verdict
    other = [Declared("tcp", 631, "printing", "lpd.service")]
    assert judged(started, declared=other, **evidence)[0].verdict == "violation"


def test_sshd_on_vsock_is_shown() -> None:
    found = judged(vsock=parse_vsock(VSOCK), programs={1: INIT}, socket_units=parse_socket_units(UNITS))
    assert found[0].to_json() == {
        "protocol": "vsock",
        "address": "*",
        "port": 22,
        "process": "systemd",
        "pid": 1,
        "unit": "sshd-vsock.socket",
        "exposure": "private",
        "verdict": "ok",
        "hint": "",
    }
    assert (found[1].listener.where, found[1].listener.port) == ("3", 4000000000)
    (bare,) = judged(vsock=parse_vsock(VSOCK.replace('users:(("systemd",pid=1,fd=77))', ""))[:1])
    assert bare.process == "sshd"


@given(st.text(max_size=200))
def test_vsock_is_shown_as_far_as_it_is_understood(text: str) -> None:
    rows = VSOCK + text
    assert parse_vsock(rows)[0].port == 22
    json.dumps(report(judged(vsock=parse_vsock(rows))))


def test_a_process_is_known_by_its_name(tmp_path: Path) -> None:
    for pid, name, spaces in (
        ("1", "systemd", "1"),
        ("7", "containerd-shim", "7"),
        ("8", "dockerd", "8\t3"),
        ("self", "tailscaled", "9"),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(f"{name}\n")
        (tmp_path / pid / "status").write_text(f"Name:\t{name}\nNSpid:\t{spaces}\n")
    (tmp_path / "9").mkdir()
    assert is_running("containerd-shim-runc-v2", proc=tmp_path)
    assert not is_running("dockerd", proc=tmp_path), "it is a container's"
    assert not is_running("tailscaled", proc=tmp_path)
    assert not is_running("system", proc=tmp_path)
    own = Path("/proc/self/comm").read_text().strip()
    assert is_running(own)
    for name in (own, "no-such-program"):
        done = subprocess.run(["/bin/sh", "-c", shell_is_running(name)], check=False)
        assert (done.returncode == 0) == (name == own)


# --- all of it, as the program tells it ---------------------------------------------------------------

LINKS = [
    {"ifname": "lo", "link_type": "loopback", "addr_info": [{"local": "127.0.0.1"}]},
    {"ifname": "eth0", "link_type": "ether", "addr_info": [{"local": "203.0.113.5"}]},
]
SS = (
    "Netid State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n"
    'tcp   LISTEN 0      128          0.0.0.0:443       0.0.0.0:*    users:(("caddy",pid=10,fd=3))\n'
    'tcp   LISTEN 0      128          0.0.0.0:8080      0.0.0.0:*    users:(("docker-proxy",pid=11,fd=3))\n'
    'tcp   LISTEN 0      128                *:631             *:*    users:(("systemd",pid=1,fd=3))\n'
    "udp   UNCONN 0      0            0.0.0.0:51820     0.0.0.0:*\n"
)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A host whose programs answer as `world` says; by its declarations all of it is excused but Docker's."""
    world: dict[str, Any] = {
        "declared": {
            "public_listeners": [
                {"protocol": "tcp", "port": 443, "unit": "caddy.service", "reason": "the web site"},
                {"protocol": "udp", "port": 51820, "unit": None, "reason": "a tunnel home"},
                {"protocol": "tcp", "port": 631, "unit": "cups.socket", "reason": "printing"},
            ]
        },
        "served": [],
        "uid": 0,
        "ss": SS,
    }
    known = {1: INIT, 10: CADDY, 11: PROXY}
    texts = {survey.SS: "ss", ("ip", "-j", "-d", "addr"): json.dumps(LINKS)}

    def output_of(argv: Sequence[str], **_: Any) -> str:
        if tuple(argv) == survey.SS:
            return str(world["ss"])
        return texts.get(tuple(argv), "[]")

    def run(argv: Sequence[str], **_: Any) -> Done:
        return Done(0, {survey.SS_VSOCK: VSOCK, SHOW_SOCKET_UNITS: UNITS}[tuple(argv)], "")

    monkeypatch.setattr(survey, "output_of", output_of)
    monkeypatch.setattr(survey, "run", run)
    monkeypatch.setattr(survey, "program_of", lambda pid: known.get(pid, Program()))
    monkeypatch.setattr(survey, "_public_sshd", lambda: None)
    monkeypatch.setattr(survey, "host_settings", lambda: world["declared"])
    monkeypatch.setattr(survey.containers, "published", lambda: [port_of("web")])
    monkeypatch.setattr(survey.serve, "served", lambda: world["served"])
    monkeypatch.setattr(survey.os, "geteuid", lambda: world["uid"])
    return world


def told(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, int], dict[str, Any]]:
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["ok"] == all(one["verdict"] != "violation" for one in document["listeners"])
    return {(one["protocol"], one["port"]): one for one in document["listeners"]}


def test_the_whole_report(host: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ports", "--json"]) == 1
    found = told(capsys)
    assert {place: one["verdict"] for place, one in found.items()} == {
        ("tcp", 443): "allowed",
        ("tcp", 8080): "violation",
        ("tcp", 631): "allowed",
        ("udp", 51820): "allowed",
        ("vsock", 22): "ok",
        ("vsock", 4000000000): "ok",
    }
    assert found["tcp", 8080]["process"] == "docker-proxy (web)"
    assert found["tcp", 443]["hint"] == "Declared in hosts.toml: the web site"


def test_with_every_port_declared_the_host_is_fine_but_for_funnel(
    host: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    host["declared"]["public_listeners"] += [
        {"protocol": "tcp", "port": 8080, "unit": "docker.service", "reason": "the tailnet's, shielded"}
    ]
    assert main(["ports"]) == 0
    shown = capsys.readouterr().out
    assert "tcp 0.0.0.0:443: Declared in hosts.toml: the web site" in shown
    host["served"] = [Served(443, funnel=True, name="vps1.tail.ts.net")]
    assert main(["ports"]) == 1
    assert "tcp vps1.tail.ts.net:443: Funnel publishes this" in capsys.readouterr().out


def test_who_is_not_root_cannot_tell_the_kernels_sockets(
    host: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    host["uid"] = 1000
    main(["ports", "--json"])
    assert told(capsys)["udp", 51820]["verdict"] == "violation"


def test_what_cannot_be_read_is_exit_code_3(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent() -> list[Published]:
        raise HostProgramError(containers.UNKNOWN_PORTS)

    monkeypatch.setattr(survey.containers, "published", silent)
    assert main(["ports", "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "systemctl status docker" in err
    host["ss"] = "garbage"
    assert main(["ports", "--json"]) == 3


def test_a_socket_that_only_names_depend_on_may_be_silent(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(survey, "run", lambda argv, **_: Done(1, "x", "no vsock"))
    main(["ports", "--json"])
    found = told(capsys)
    assert found["tcp", 631]["unit"] == "init.scope"
    assert found["tcp", 631]["verdict"] == "violation"
    assert ("vsock", 22) not in found
