"""What listens, who can reach it, whether that may be; what is not understood is never fine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from quietport import ports_cli
from quietport.cli import main
from quietport.errors import HostProgramError
from quietport.net import Interfaces, parse_interfaces
from quietport.ports import classify, judge, verdict
from quietport.processes import Program, unit_of
from quietport.ss import Listener, Process, parse_ss, parse_vsock

HEADER = "Netid State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n"
ROW = "tcp   LISTEN 0      128          0.0.0.0:22        0.0.0.0:*    "
HOST = Interfaces(
    owners={
        "127.0.0.1": ("lo",),
        "::1": ("lo",),
        "203.0.113.5": ("eth0",),
        "10.0.0.5": ("eth0",),
        "100.64.0.99": ("eth0",),
        "100.64.0.7": ("tailscale0",),
        "fd7a:115c:a1e0::7": ("tailscale0",),
        "172.17.0.1": ("docker0",),
        "192.168.1.1": ("br0",),
        "10.9.9.9": ("lo",),
        "fe80::1": ("eth0", "docker0"),
        "fe80::7": ("tailscale0",),
    },
    kinds={
        "lo": "loopback",
        "eth0": "public",
        "tailscale0": "tailnet",
        "docker0": "private",
        "br0": "public",
    },
)
TAILSCALED = Program(unit="tailscaled.service", executable="/usr/sbin/tailscaled")


def one(local: str, *, netid: str = "tcp", tail: str = "") -> Listener:
    state = {"tcp": "LISTEN", "udp": "UNCONN"}[netid]
    (listener,) = parse_ss(f"{HEADER}{netid} {state} 0 128 {local} 0.0.0.0:* {tail}\n")
    return listener


# address in ss, address, zone, exposure on the host, exposure by ss alone
ADDRESSES = [
    ("0.0.0.0:22", "0.0.0.0", "", "public", "public"),
    ("[::]:22", "::", "", "public", "public"),
    ("*:22", "*", "", "public", "public"),
    ("[::ffff:0.0.0.0]:22", "::ffff:0.0.0.0", "", "public", "public"),
    ("127.0.0.1:22", "127.0.0.1", "", "loopback", "loopback"),
    ("127.0.0.53%lo:22", "127.0.0.53", "lo", "loopback", "loopback"),
    ("[::1]:22", "::1", "", "loopback", "loopback"),
    ("[::ffff:127.0.0.1]:22", "::ffff:127.0.0.1", "", "loopback", "loopback"),
    ("[::ffff:100.64.0.7]:22", "::ffff:100.64.0.7", "", "tailnet", "tailnet"),
    ("[::ffff:203.0.113.5]:22", "::ffff:203.0.113.5", "", "public", "public"),
    ("100.64.0.7:22", "100.64.0.7", "", "tailnet", "tailnet"),
    ("[fd7a:115c:a1e0::7]:22", "fd7a:115c:a1e0::7", "", "tailnet", "tailnet"),
    ("100.64.0.99:22", "100.64.0.99", "", "public", "tailnet"),
    ("100.64.0.8:22", "100.64.0.8", "", "public", "tailnet"),
    ("10.0.0.5:22", "10.0.0.5", "", "public", "public"),
    ("172.17.0.1:22", "172.17.0.1", "", "private", "public"),
    ("192.168.1.1:22", "192.168.1.1", "", "public", "public"),
    ("10.9.9.9:22", "10.9.9.9", "", "loopback", "public"),
    ("0.0.0.0%tailscale0:22", "0.0.0.0", "tailscale0", "tailnet", "tailnet"),
    ("*%tailscale0:22", "*", "tailscale0", "tailnet", "tailnet"),
    ("[::]%eth0:546", "::", "eth0", "public", "public"),
    ("0.0.0.0%docker0:67", "0.0.0.0", "docker0", "private", "public"),
    ("100.64.0.7%eth0:22", "100.64.0.7", "eth0", "public", "public"),
    ("0.0.0.0%gone0:22", "0.0.0.0", "gone0", "public", "public"),
    ("[fe80::1]%eth0:546", "fe80::1", "eth0", "public", "public"),
    ("[fe80::1%eth0]:546", "fe80::1", "eth0", "public", "public"),
    ("[fe80::7]%tailscale0:5353", "fe80::7", "tailscale0", "tailnet", "tailnet"),
    ("[fe80::1]:22", "fe80::1", "", "public", "public"),
    ("224.0.0.251:5353", "224.0.0.251", "", "public", "public"),
]


@pytest.mark.parametrize(("local", "address", "zone", "on_host", "by_ss"), ADDRESSES)
def test_addresses(local: str, address: str, zone: str, on_host: str, by_ss: str) -> None:
    listener = one(local)
    assert (listener.address, listener.zone) == (address, zone)
    assert classify(listener, HOST) == on_host
    assert classify(listener, None) == by_ss


USERS = [
    ("", ()),
    ('users:(("sshd",pid=100,fd=3))', (("sshd", 100),)),
    ('users:(("nginx",pid=12,fd=6),("nginx",pid=11,fd=6))', (("nginx", 12), ("nginx", 11))),
    ('users:(("x",pid=12,fd=6),("x",pid=12,fd=7))', (("x", 12),)),
    ('users:(("a b",pid=12,fd=6))', (("a b", 12),)),
    ('users:(("a\nb",pid=12,fd=6))', (("a\nb", 12),)),
    ('users:(("",pid=12,fd=6))', (("", 12),)),
    ('users:(("q"q",pid=12,fd=6))', (('q"q', 12),)),
    ('users:(("",pid=1,fd=3),(",pid=999,fd=4))', (('",pid=1,fd=3),(', 999),)),
    ('users:(("a",pid=1,fd=3)",pid=999,fd=4))', (('a",pid=1,fd=3)', 999),)),
    ('users:(("",pid=1,fd=3))\n",pid=999,fd=4))', (('",pid=1,fd=3))\n', 999),)),
    ('users:(("\ntcp LISTEN 0 ",pid=999,fd=4))', (("\ntcp LISTEN 0 ", 999),)),
    ('users:(("\n*:22 *:*\n",pid=999,fd=4))', (("\n*:22 *:*\n", 999),)),
    ('\n  users:(("sshd",pid=100,fd=3))', (("sshd", 100),)),
    ('users:(("\r\n1234567890abcd",pid=12,fd=6))', (("\r\n1234567890abcd", 12),)),
    # An empty name and short numbers are shorter than a name may be.
    ('users:(("",pid=1,fd=3),(",pid=2,fd=4),(",pid=9,fd=4))', (("", 1), (",pid=2,fd=4),(", 9))),
]


@pytest.mark.parametrize(("tail", "expected"), USERS)
def test_processes(tail: str, expected: tuple[tuple[str, int], ...]) -> None:
    assert one("0.0.0.0:22", tail=tail).processes == tuple(Process(name, pid) for name, pid in expected)


@pytest.mark.parametrize(
    "header", [HEADER, "State Recv-Q Send-Q Local Address:Port Peer Address:Port Process\n", ""]
)
@pytest.mark.parametrize("netid", ["tcp ", ""])
def test_header_and_netid_may_be_missing(header: str, netid: str) -> None:
    first = f'{netid}LISTEN 0 128 [::]:22 [::]:* users:(("sshd",pid=10,fd=3))\r\n'
    text = f"{header}{first}{netid}LISTEN 0 5 127.0.0.1:80 *:*\n"
    assert [(entry.protocol, entry.port, len(entry.processes)) for entry in parse_ss(text)] == [
        ("tcp", 22, 1),
        ("tcp", 80, 0),
    ]


def test_udp_without_netid_is_told_by_its_state() -> None:
    assert parse_ss("UNCONN 0 0 0.0.0.0:68 0.0.0.0:*")[0].protocol == "udp"


def test_a_header_alone_is_a_host_on_which_nothing_listens() -> None:
    assert parse_ss(HEADER) == []
    assert parse_ss(HEADER.strip()) == []


NOT_UNDERSTOOD = [
    "",
    " ",
    "\n",
    "\x00",
    "ss: command not found\n",
    "Netid State\n",
    HEADER + "garbage\n",
    HEADER + ROW + "\ngarbage\n",
    "garbage\n" + HEADER,
    HEADER + HEADER,
    ROW + "extra words",
    ROW + "users:",
    ROW + "users:(())",
    ROW + 'users:(("sshd",pid=1,fd=3)',
    ROW + 'users:(("sshd",pid=1,fd=3),)',
    ROW + 'users:(("sshd",pid=,fd=3))',
    ROW + 'users:(("a name that is too long",pid=12,fd=3))',
    "tcp LISTEN 0 128 0.0.0.0:ssh 0.0.0.0:*",
    "tcp LISTEN 0 128 0.0.0.0:0 0.0.0.0:*",
    "tcp LISTEN 0 128 0.0.0.0:65536 0.0.0.0:*",
    "tcp LISTEN 0 128 0.0.0.0:222222222222222222 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1:0000080 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1:\u0662\u0662 0.0.0.0:*",
    "tcp LISTEN 0 \u0662 127.0.0.1:22 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1:22 junk:*",
    "tcp LISTEN 0 128 127.0.0.1:22 :*",
    "tcp LISTEN 0 128 127.0.0.1:22 0.0.0.0:22",
    "tcp LISTEN 0 128 127.0.0.1:22 [junk]:*",
    "tcp LISTEN 0 128 127.0.0.1:22 0.0.0.0:*junk",
    ROW + 'users:(("sshd",pid=\u0661,fd=3))',
    "tcp LISTEN 0 128 0.0.0.0:* 0.0.0.0:*",
    "tcp LISTEN 0 128 999.0.0.1:22 0.0.0.0:*",
    "tcp LISTEN 0 128 localhost:22 0.0.0.0:*",
    "tcp LISTEN 0 128 :::22 :::*",
    "tcp LISTEN 0 128 [::1:22 [::]:*",
    "tcp LISTEN 0 128 127.0.0.1%:22 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1%a/b:22 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1%a:1:22 0.0.0.0:*",
    "tcp LISTEN 0 128 127.0.0.1%sixteen-letters-:22 0.0.0.0:*",
    "udp LISTEN 0 128 127.0.0.1:22 0.0.0.0:*",
    "tcp UNCONN 0 128 127.0.0.1:22 0.0.0.0:*",
    "v_str LISTEN 0 0 *:22 *:*",
    "tcp ESTAB 0 0 10.0.0.1:22 10.0.0.2:5000",
    "tcp LISTEN 0 128",
]


@pytest.mark.parametrize("text", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_never_fine(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HostProgramError):
        parse_ss(text)
    file = tmp_path / "ss.txt"
    file.write_text(text)
    assert main(["ports", "--json", "--from-ss", str(file)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quietport ports: ")


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="replace")))
def test_garbage_is_never_fine(garbage: bytes) -> None:
    text = garbage.decode(errors="replace")
    assume("LISTEN" not in text and "UNCONN" not in text and "State" not in text)
    with pytest.raises(HostProgramError):
        parse_ss(text)
    with pytest.raises(HostProgramError):
        parse_ss(f"{HEADER}{ROW}\n{text.strip()}x\n")


@given(st.data())
def test_a_row_with_a_piece_missing_is_not_read_as_another_exposure(data: st.DataObject) -> None:
    """Cutting the text anywhere gives an error or a listener that is at least as exposed."""
    text = f'{HEADER}{ROW}users:(("sshd",pid=100,fd=3))\n'
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, len(text)))
    try:
        judged = [judge(listener, None) for listener in parse_ss(text[:start] + text[end:])]
    except HostProgramError:
        return
    removed_whole_row = start <= len(HEADER) and end >= len(text.rstrip())
    assert removed_whole_row or [entry.verdict for entry in judged] == ["violation"]


# Whatever ss writes itself, in pieces that fit into names.
PIECES = ['"', "(", ")", ",", " ", "\n", "\r\n", '("', "),(", "))\n", '",pid=1,fd=3)', '",pid=1,fd=3),(']
PIECES += [",pid=2,fd=4)", ",pid=2,fd=4),(", "users:((", "tcp ", "LISTEN 0 0 ", "\nLISTEN 0 0 *:", "x:1 *:* "]
PIECES += ["*:1 *:*", "*%"]
names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=15) | st.lists(
    st.sampled_from(PIECES), max_size=8
).map(lambda pieces: "".join(pieces)[:15])
# Two that make a row of their own between them.
PAIR = [("\nLISTEN 0 0 ", 15000), ("x:1 *:* ", 14999)]
addresses = st.sampled_from([local.rpartition(":")[0] for local, *_ in ADDRESSES])
listeners = st.tuples(
    st.sampled_from(["tcp", "udp"]),
    addresses,
    st.integers(1, 65535),
    st.lists(st.tuples(names, st.integers(10, 4194304)), max_size=4),
)


@given(st.lists(listeners, max_size=8), st.booleans())
@example([("tcp", "*", 22, [('",pid=1,fd=3),(', 999), ("", 11)])], True)
@example([("tcp", "*", 22, [("\ntcp LISTEN 0 ", 999)]), ("tcp", "*", 23, [])], False)
@example([("tcp", "0.0.0.0", 80, PAIR), ("udp", "*", 53, PAIR)], True)
def test_whatever_processes_call_themselves_every_socket_is_found(
    wanted: list[tuple[str, str, int, list[tuple[str, int]]]], header: bool
) -> None:
    assume(wanted or header)
    text = (HEADER if header else "") + rows_of(wanted)
    found = parse_ss(text)
    assert [(entry.protocol, entry.where, entry.port) for entry in found] == sockets_of(wanted)
    for entry, (_, _, _, held) in zip(found, wanted, strict=True):
        assert entry.processes == tuple(dict.fromkeys(Process(name, pid) for name, pid in held))
    # As a terminal writes it.
    assert [(entry.protocol, entry.where, entry.port) for entry in parse_ss(text.replace("\n", "\r\n"))] == (
        sockets_of(wanted)
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["tcp", "udp"]),
            addresses,
            st.integers(1, 65535),
            st.lists(st.tuples(names, st.integers(1, 9)), max_size=6),
        ),
        min_size=1,
        max_size=5,
    )
)
@example([("tcp", "*", 22, [("", 1), (',pid=2,fd=4),("', 9)]), ("tcp", "*", 23, [])])
@example([("tcp", "*", 22, [('",pid=1,fd=3))\n', 9)]), ("tcp", "*", 23, [])])
def test_sockets_are_found_even_where_names_are_ambiguous(
    wanted: list[tuple[str, str, int, list[tuple[str, int]]]],
) -> None:
    found = parse_ss(rows_of(wanted, fd=3))
    assert [(entry.protocol, entry.where, entry.port) for entry in found] == sockets_of(wanted)


def sockets_of(wanted: list[tuple[str, str, int, list[tuple[str, int]]]]) -> list[tuple[str, str, int]]:
    where = {
        local.rpartition(":")[0]: f"{address}%{zone}".rstrip("%") for local, address, zone, *_ in ADDRESSES
    }
    return [(protocol, where[address], port) for protocol, address, port, _ in wanted]


def rows_of(wanted: list[tuple[str, str, int, list[tuple[str, int]]]], *, fd: int = 10) -> str:
    text = ""
    for protocol, address, port, held in wanted:
        state = {"tcp": "LISTEN", "udp": "UNCONN"}[protocol]
        users = ",".join(f'("{name}",pid={pid},fd={fd})' for name, pid in held)
        text += (
            f"{protocol}   {state} 0      128   {address}:{port}      0.0.0.0:*    "
            + (f"users:({users})" if users else "")
            + "\n"
        )
    return text


def test_two_processes_that_write_a_row_between_them_blind_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ss.txt"
    file.write_text(
        f"{HEADER}tcp   LISTEN 0      5         127.0.0.1:8080       0.0.0.0:*    "
        'users:(("\nLISTEN 0 0 ",pid=15000,fd=3),("x:1 *:* ",pid=14999,fd=3))\n'
        f'{ROW}users:(("sshd",pid=100,fd=3))\n'
    )
    assert main(["ports", "--json", "--from-ss", str(file)]) == 1
    found = json.loads(capsys.readouterr().out)["listeners"]
    assert [(one["address"], one["port"], one["process"]) for one in found] == [
        ("127.0.0.1", 8080, "\nLISTEN 0 0 , x:1 *:* "),
        ("0.0.0.0", 22, "sshd"),
    ]


MANY = 200_000
LONG = [
    HEADER.strip() + " " * MANY + "x",
    HEADER.removesuffix("Process\n") + " " * MANY + "x",
    HEADER.removesuffix("Process\n") + "\n" * MANY + "x",
    " " * MANY + "x",
    "Netid" + " " * MANY + "x",
    HEADER + " \r\n" * MANY + "x",
    HEADER + "tcp" + " " * MANY + "x",
    HEADER + "tcp LISTEN 0 " + "1" * MANY,
    HEADER + "tcp LISTEN 0 0 [" + "1:" * MANY,
    HEADER + "tcp LISTEN 0 0 " + "1." * MANY,
    HEADER + "tcp LISTEN 0 0 *" + ":1" * MANY,
    HEADER + "tcp LISTEN 0 0 *%" + "a:" * MANY,
    HEADER + ROW + " " * MANY + "x",
    HEADER + ROW + "\n" * MANY + "x",
    HEADER + (ROW + "\n") * (MANY // 20) + "x",
    HEADER + ROW + 'users:(("' + '"' * MANY,
    HEADER + ROW + 'users:(("",pid=' + "1" * MANY,
    HEADER + ROW + "users:(" + '("",pid=1,fd=3),' * MANY,
    HEADER + ROW + "users:(" + '("",pid=1,fd=3),(",pid=2,fd=4),("",pid=3,fd=3),' * (MANY // 10) + "x",
    HEADER + ROW + "users:(" + '("",pid=1,fd=3))\n' * MANY,
    HEADER + ROW + 'users:(("",pid=1,fd=3))' + " " * MANY + "x",
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_input_ends_with_the_error(text: str) -> None:
    """It would hang if any of this took more than linear time."""
    with pytest.raises(HostProgramError):
        parse_ss(text)
    parse_vsock(text)


@pytest.mark.parametrize(
    ("listener", "programs", "expected"),
    [
        (
            one("0.0.0.0:41641", netid="udp", tail='users:(("tailscaled",pid=10,fd=3))'),
            {10: TAILSCALED},
            "allowed",
        ),
        (
            one("0.0.0.0:41641", netid="udp", tail='users:(("tailscaled",pid=10,fd=3))'),
            {10: Program("tailscaled.service", "/usr/sbin/tailscaled (deleted)")},
            "allowed",
        ),
        (
            one("0.0.0.0:9", tail='users:(("tailscaled",pid=10,fd=3))'),
            {10: Program("session-1.scope", "/tmp/tailscaled")},
            "violation",
        ),
        (
            one("0.0.0.0:9", tail='users:(("tailscaled",pid=10,fd=3))'),
            {10: Program("docker-1.scope", "/usr/sbin/tailscaled")},
            "violation",
        ),
        (
            one("0.0.0.0:9", tail='users:(("tailscaled",pid=10,fd=3))'),
            {10: Program("tailscaled.service", "/tmp/x")},
            "violation",
        ),
        (one("0.0.0.0:9", tail='users:(("tailscaled",pid=10,fd=3))'), {}, "violation"),
        (
            one("0.0.0.0:9", tail='users:(("tailscaled",pid=10,fd=3),("x",pid=11,fd=3))'),
            {10: TAILSCALED},
            "violation",
        ),
        (
            one("0.0.0.0:68", netid="udp", tail='users:(("dhclient",pid=10,fd=3))'),
            {10: Program("networking.service", "/usr/sbin/dhclient")},
            "allowed",
        ),
        (
            one("0.0.0.0:68", tail='users:(("dhclient",pid=10,fd=3))'),
            {10: Program("networking.service", "/usr/sbin/dhclient")},
            "violation",
        ),
        (
            one("0.0.0.0:69", netid="udp", tail='users:(("dhclient",pid=10,fd=3))'),
            {10: Program("networking.service", "/usr/sbin/dhclient")},
            "violation",
        ),
        (
            one("0.0.0.0:68", netid="udp", tail='users:(("dhclient",pid=10,fd=3))'),
            {10: Program("docker-1.scope", "/usr/sbin/dhclient")},
            "violation",
        ),
        (one("0.0.0.0:22"), {}, "violation"),
        (one("100.64.0.7:22"), {}, "ok"),
        (one("127.0.0.1:22"), {}, "ok"),
    ],
)
def test_who_is_excused_on_the_host(listener: Listener, programs: dict[int, Program], expected: str) -> None:
    assert verdict(listener, classify(listener, HOST), programs) == expected


def test_by_ss_alone_names_are_believed() -> None:
    assert judge(one("0.0.0.0:1", tail='users:(("tailscaled",pid=10,fd=3))'), None).verdict == "allowed"
    assert (
        judge(one("0.0.0.0:68", netid="udp", tail='users:(("dhclient",pid=10,fd=3))'), None).verdict
        == "allowed"
    )
    assert judge(one("0.0.0.0:1", tail='users:(("other",pid=10,fd=3))'), None).verdict == "violation"


@pytest.mark.parametrize(
    ("tail", "unit", "words"),
    [
        ('users:(("sshd",pid=10,fd=3))', "ssh.service", "ListenAddress"),
        ('users:(("systemd",pid=1,fd=3))', "", "ssh.socket"),
        ('users:(("docker-proxy",pid=10,fd=3))', "docker.service", "DOCKER-USER"),
        ('users:(("nginx",pid=10,fd=3))', "nginx.service", "systemctl disable --now nginx.service"),
        ("", "", "as root"),
    ],
)
def test_every_violation_says_how_it_is_mended(tail: str, unit: str, words: str) -> None:
    judged = judge(one("0.0.0.0:22", tail=tail), HOST, {10: Program(unit=unit)})
    assert judged.verdict == "violation"
    assert words in judged.hint
    assert judge(one("127.0.0.1:22", tail=tail), HOST, {10: Program(unit=unit)}).hint == ""


def test_json_has_the_keys_that_were_agreed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ss.txt"
    file.write_text(f'{HEADER}{ROW}users:(("sshd",pid=10,fd=3),("systemd",pid=1,fd=3))\n')
    assert main(["ports", "--from-ss", str(file), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == (1, False)
    (entry,) = document["listeners"]
    assert entry.pop("hint").startswith("sshd can be reached")
    expected: dict[str, Any] = {
        "protocol": "tcp",
        "address": "0.0.0.0",
        "port": 22,
        "process": "sshd, systemd",
        "pid": 10,
    }
    assert entry == {**expected, "unit": "", "exposure": "public", "verdict": "violation"}


def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(HEADER.encode())))
    assert main(["ports", "--from-ss", "-"]) == 0
    assert main(["ports", "--from-ss", str(tmp_path / "absent")]) == 3
    assert main(["ports", "--from-ss", str(tmp_path)]) == 3
    with pytest.raises(SystemExit) as usage:
        main(["ports", "--nonsense"])
    assert usage.value.code == 2
    capsys.readouterr()


def test_a_name_cannot_steer_the_terminal() -> None:
    judged = judge(one("0.0.0.0:22", tail='users:(("\x1b[2Ja\nb",pid=10,fd=3))'), None)
    text = ports_cli.table([judged.to_json()])
    assert "\x1b" not in text
    assert "?[2Ja?b" in text


def test_ten_thousand_sockets_in_a_second() -> None:
    users = 'users:(("nginx",pid=12,fd=6),("nginx",pid=11,fd=6))'
    rows = (f"tcp LISTEN 0 128 100.64.0.7:{port}  0.0.0.0:*    {users}\n" for port in range(1, 10001))
    text = HEADER + "".join(rows)
    start = time.process_time()
    assert len([judge(listener, HOST, {}) for listener in parse_ss(text)]) == 10000
    assert time.process_time() - start < 1


def test_interfaces_come_from_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    links = [
        {"ifname": "lo", "link_type": "loopback", "addr_info": [{"local": "127.0.0.1"}, {"local": "::1"}]},
        {
            "ifname": "eth0",
            "link_type": "ether",
            "linkinfo": {"info_kind": "veth"},
            "addr_info": [{"local": "fe80::1"}],
        },
        {
            "ifname": "docker0",
            "linkinfo": {"info_kind": "bridge"},
            "addr_info": [{"local": "172.17.0.1"}, {"local": "fe80::1"}],
        },
        {"ifname": "veth1", "master": "docker0", "linkinfo": {"info_kind": "veth"}},
        {"ifname": "br-lan", "linkinfo": {"info_kind": "bridge"}, "addr_info": []},
        {"ifname": "eth1", "master": "br-lan", "link_type": "ether"},
        {"ifname": "br-up", "linkinfo": {"info_kind": "bridge"}, "addr_info": []},
        {"ifname": "eth2", "master": "br-up", "linkinfo": {"info_kind": "veth"}},
        {"ifname": "tailscale0", "linkinfo": {"info_kind": "tun"}, "addr_info": [{"local": "100.64.0.7"}]},
        {},
    ]
    found = parse_interfaces(json.dumps(links), ['[{"dst":"default","dev":"br-up"}]', ""])
    assert found.kinds == {
        "lo": "loopback",
        "eth0": "public",
        "docker0": "private",
        "veth1": "public",
        "br-lan": "public",
        "eth1": "public",
        "br-up": "public",
        "eth2": "public",
        "tailscale0": "tailnet",
    }
    assert found.owners["fe80::1"] == ("eth0", "docker0")


@pytest.mark.parametrize("text", ["", "{}", "[]", "Cannot open netlink socket", "[{}]"])
def test_interfaces_that_cannot_be_read_are_an_error(text: str) -> None:
    with pytest.raises(HostProgramError):
        parse_interfaces(text)


@pytest.mark.parametrize(
    ("cgroup", "init", "unit"),
    [
        ("0::/system.slice/ssh.service\n", "0::/init.scope\n", "ssh.service"),
        (
            "0::/system.slice/system-openvpn.slice/openvpn@a.service\n",
            "0::/init.scope\n",
            "openvpn@a.service",
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service\n",
            "0::/init.scope\n",
            "user@1000.service",
        ),
        (
            "0::/system.slice/docker-abc.scope/system.slice/tailscaled.service\n",
            "0::/init.scope\n",
            "docker-abc.scope",
        ),
        (
            "0::/docker/abc/system.slice/tailscaled.service\n",
            "0::/docker/abc/init.scope\n",
            "tailscaled.service",
        ),
        ("0::/docker/abcdef/system.slice/tailscaled.service\n", "0::/docker/abc/init.scope\n", ""),
        ("0::/docker/abc/system.slice/tailscaled.service\n", "0::/init.scope\n", ""),
        (
            "9:name=systemd:/system.slice/a.service\n8:pids:/x\n0::/\n",
            "9:name=systemd:/init.scope\n0::/\n",
            "a.service",
        ),
        ("0::/init.scope\n", "0::/init.scope\n", "init.scope"),
        ("0::/system.slice/_tasks.service\n", "0::/init.scope\n", "tasks.service"),
        ("", "", ""),
        ("nonsense", "0::/init.scope\n", ""),
    ],
)
def test_unit_of_a_process(cgroup: str, init: str, unit: str) -> None:
    assert unit_of(cgroup, init) == unit


def test_it_runs_from_a_checkout_as_a_user_would(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "quietport", "ports", "--from-ss", "-"],
        input=HEADER + ROW,
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "0.0.0.0:22" in done.stdout


def from_ss(redirection: str, text: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`quietport ports --from-ss -` in a shell."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -m quietport ports --from-ss - {redirection}', sys.executable],
        input=text.encode(),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        check=False,
    )


def test_without_standard_input_there_is_a_sentence() -> None:
    done = from_ss("<&-", "")
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.startswith(b"quietport ports: Standard input is closed")
    assert done.stderr.count(b"\n") == 1


def test_a_name_that_the_terminal_cannot_show_hides_no_violation() -> None:
    text = f'{HEADER}{ROW}users:(("h\u00e9",pid=10,fd=3))\n'
    done = from_ss("", text, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"0.0.0.0:22" in done.stdout
    assert b"h\\xe9" in done.stdout
