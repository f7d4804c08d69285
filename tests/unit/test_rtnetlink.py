"""Addresses as the kernel tells them: recorded bytes, and a kernel with a network of its own."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facts.tailnet import _addresses
from quietport.errors import HostProgramError
from quietport.rtnetlink import (
    NLMSG_DONE,
    RTM_DELADDR,
    RTM_NEWADDR,
    Assigned,
    addresses_on,
    parse_address,
    parse_messages,
)

ROOT = Path(__file__).parents[2]
# Recorded from Linux while `ip addr` added and deleted what the names say.
ADDED4 = bytes.fromhex(
    "5400000014000000359e016b9d0d00000220800002000000080001006440000708000200644000070f000300"
    "7461696c7363616c65300000080008008000000014000600ffffffffffffffffb4ca1500b4ca1500"
)
DELETED4 = bytes.fromhex(
    "54000000150000003c9e016bdc1400000220800002000000080001006440000708000200644000070f000300"
    "7461696c7363616c65300000080008008000000014000600ffffffffffffffffb4ca1500b4ca1500"
)
WITH_PEER = bytes.fromhex(
    "54000000140000003e9e016bba1700000220800002000000080001000a090002080002000a0900010f000300"
    "7461696c7363616c65300000080008008000000014000600ffffffffffffffff64ce150064ce1500"
)
LINK_LOCAL = bytes.fromhex(
    "500000001400000000000000000000000a4080fd0200000014000100fe800000000000008c032afffef9013a"
    "14000600ffffffffffffffff57ca150057ca1500080008008000000005000b0003000000"
)
TENTATIVE6 = bytes.fromhex(
    "480000001400000000000000000000000a80c0000200000014000100fd7a115ca1e000000000000000000007"
    "14000600ffffffffffffffffefcb1500efcb150008000800c0000000"
)
UNIQUE6 = bytes.fromhex(
    "480000001400000000000000000000000a8080000200000014000100fd7a115ca1e000000000000000000007"
    "14000600ffffffffffffffffefcb1500efcb15000800080080000000"
)
RECORDED = (ADDED4, DELETED4, WITH_PEER, LINK_LOCAL, TENTATIVE6, UNIQUE6)


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (ADDED4, RTM_NEWADDR, Assigned(2, "100.64.0.7", usable=True)),
        (DELETED4, RTM_DELADDR, Assigned(2, "100.64.0.7", usable=True)),
        (WITH_PEER, RTM_NEWADDR, Assigned(2, "10.9.0.1", usable=True)),
        (LINK_LOCAL, RTM_NEWADDR, Assigned(2, "fe80::8c03:2aff:fef9:13a", usable=False)),
        (TENTATIVE6, RTM_NEWADDR, Assigned(2, "fd7a:115c:a1e0::7", usable=False)),
        (UNIQUE6, RTM_NEWADDR, Assigned(2, "fd7a:115c:a1e0::7", usable=True)),
    ],
)
def test_recorded_messages(data: bytes, kind: int, expected: Assigned) -> None:
    (message,) = parse_messages(data)
    assert message.kind == kind
    assert parse_address(message.payload) == expected


def test_several_in_one_datagram() -> None:
    done = struct.pack("=IHHII", 20, NLMSG_DONE, 2, 1, 1) + bytes(4)
    found = list(parse_messages(ADDED4 + UNIQUE6 + done))
    assert [message.kind for message in found] == [RTM_NEWADDR, RTM_NEWADDR, NLMSG_DONE]


def test_other_families_are_no_address() -> None:
    (message,) = parse_messages(ADDED4)
    assert parse_address(b"\x09" + message.payload[1:]) is None


@given(st.sampled_from(RECORDED), st.integers(0, 90), st.binary(max_size=8))
def test_damaged_bytes_are_an_error_and_nothing_else(data: bytes, cut: int, more: bytes) -> None:
    damaged = data[:cut] + more
    try:
        for message in parse_messages(damaged):
            parse_address(message.payload)
    except HostProgramError:
        return
    # A message that came whole may say anything, and part of one is never taken for all of it.
    assert not damaged or len(damaged) >= len(data)


@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    try:
        for message in parse_messages(data):
            parse_address(message.payload)
    except HostProgramError:
        pass


# --- a kernel ----------------------------------------------------------------------------------------

_MISSING = [name for name in ("ip", "unshare") if shutil.which(name) is None]
needs_namespaces = pytest.mark.skipif(
    (os.geteuid() != 0 or bool(_MISSING)) and os.environ.get("CI") != "true",
    reason=f"network namespaces need root, iproute2 and util-linux (missing: {_MISSING or 'root'})",
)


def in_namespace(code: str) -> str:
    """What `code` prints, with `ip(...)` to run, in a network of its own that has a tailscale0."""
    prelude = (
        "import json, subprocess, sys\n"
        "from quietport import rtnetlink\n"
        "def ip(*argv):\n"
        "    return subprocess.run(['ip', *argv], check=True, capture_output=True, text=True).stdout\n"
        "ip('link', 'set', 'lo', 'up')\n"
        "ip('link', 'add', 'tailscale0', 'type', 'bridge')\n"
        "ip('link', 'set', 'tailscale0', 'up')\n"
    )
    argv = ["unshare", "--net", sys.executable, "-c", prelude + code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_namespaces
def test_the_kernels_answer_is_what_the_converge_reads() -> None:
    """Both must mean the same by `the addresses on tailscale0`, or follower and converge would fight."""
    said = in_namespace(
        "def both(name):\n"
        "    print(json.dumps([rtnetlink.addresses_on(name), ip('-j', 'addr', 'show', 'dev', name)]))\n"
        "for words in ('100.64.0.9/32', '100.64.0.7/10', 'fd7a:115c:a1e0::7/128',\n"
        "              '169.254.1.1/32 scope link', 'fd7a:115c:a1e0::8/128 nodad',\n"
        "              '10.9.0.1 peer 10.9.0.2/32'):\n"
        "    ip('addr', 'add', *words.split(), 'dev', 'tailscale0')\n"
        "    both('tailscale0')\n"
        "both('lo')\n"
    )
    rows = [json.loads(line) for line in said.splitlines()]
    for ours, theirs in rows:
        assert sorted(ours) == sorted(_addresses(theirs))
    # ::7 is tentative for longer than this takes.
    assert rows[5][0] == ["10.9.0.1", "100.64.0.7", "100.64.0.9", "fd7a:115c:a1e0::8"]
    assert rows[6][0] == []


@needs_namespaces
def test_an_interface_that_is_not_there_has_none() -> None:
    assert in_namespace("print(rtnetlink.addresses_on('tailscale1'))") == "()\n"


@needs_namespaces
def test_of_many_addresses_none_is_lost() -> None:
    """More than one datagram, on more than one interface."""
    said = in_namespace(
        "batch = ''.join(f'addr add 100.64.{n // 250}.{n % 250 + 1}/32 dev {dev}\\n'\n"
        "                for n in range(1000) for dev in ('tailscale0', 'lo'))\n"
        "subprocess.run(['ip', '-batch', '-'], input=batch, text=True, check=True)\n"
        "print(len(rtnetlink.addresses_on('tailscale0')), len(rtnetlink.addresses_on('lo')))\n"
    )
    assert said == "1000 1000\n"


@needs_namespaces
def test_a_change_wakes_up() -> None:
    said = in_namespace(
        "import threading, time\n"
        "changes = rtnetlink.Changes()\n"
        "changes.wait(0.5)\n"
        "began = time.monotonic()\n"
        "print(changes.wait(0.3), time.monotonic() - began >= 0.3)\n"
        "for argv in (('addr', 'add', '100.64.0.7/32', 'dev', 'tailscale0'),\n"
        "             ('addr', 'del', '100.64.0.7/32', 'dev', 'tailscale0'),\n"
        "             ('addr', 'add', 'fd7a:115c:a1e0::7/128', 'dev', 'tailscale0', 'nodad'),\n"
        "             ('link', 'del', 'tailscale0')):\n"
        "    threading.Timer(0.5, ip, argv).start()\n"
        "    began = time.monotonic()\n"
        "    print(changes.wait(20), time.monotonic() - began < 10)\n"
        # What woke it last may still have been about the change before.
        "while rtnetlink.addresses_on('tailscale0') and time.monotonic() - began < 10:\n"
        "    time.sleep(0.05)\n"
        "print(rtnetlink.addresses_on('tailscale0'))\n"
    )
    assert said.splitlines() == ["False True", *["True True"] * 4, "()"]


@needs_namespaces
def test_more_changes_than_the_socket_holds_are_one_change() -> None:
    said = in_namespace(
        "changes = rtnetlink.Changes()\n"
        "batch = ''.join(f'addr add 10.{n // 250}.{n % 250}.1/32 dev lo\\n' for n in range(3000))\n"
        "subprocess.run(['ip', '-batch', '-'], input=batch, text=True, check=True)\n"
        "print(changes.wait(1), changes.wait(0))\n"
    )
    assert said == "True False\n"


def test_a_host_whose_kernel_does_not_answer_is_not_one_without_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("quietport.rtnetlink._socket", refuse)
    with pytest.raises(HostProgramError, match="does not tell its addresses"):
        addresses_on("lo")
