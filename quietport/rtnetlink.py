"""Addresses of an interface, asked of the kernel itself, and a socket that wakes up when addresses change.

Formats: rtnetlink(7), netlink(7), linux/rtnetlink.h and linux/if_addr.h. Numbers are in the machine's order.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from quietport.errors import HostProgramError

NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
NLM_F_REQUEST = 0x1
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100
IFLA_IFNAME = 3
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_DADFAILED = 0x08
IFA_F_TENTATIVE = 0x40
RT_SCOPE_UNIVERSE = 0

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# family, prefix length, flags, scope, index; and family, type, index, flags, change.
_IFADDRMSG = struct.Struct("=BBBBI")
_IFINFOMSG = struct.Struct("=BxHiII")
_ANSWER_TIMEOUT_S = 5
_ATTEMPTS = 5
# Of many changes at once (containers come and go) only the last is of interest.
_GATHER_S = 0.2


@dataclass(frozen=True)
class Message:
    """One netlink message: its type, its flags, and what follows the header."""

    kind: int
    flags: int
    sequence: int
    payload: bytes


@dataclass(frozen=True)
class Assigned:
    """An address on the interface with this index. `usable`: global, and not waiting to be found unique."""

    index: int
    address: str
    usable: bool


def parse_messages(data: bytes) -> Iterator[Message]:
    """The messages in a datagram. Raises HostProgramError when it is cut or no netlink at all."""
    while data:
        if len(data) < _HEADER.size:
            raise HostProgramError("the kernel's netlink answer is cut short")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            raise HostProgramError(f"a netlink message claims {length} of {len(data)} bytes")
        yield Message(kind, flags, sequence, data[_HEADER.size : length])
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise HostProgramError(f"a netlink attribute claims {length} of {len(data)} bytes")
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def parse_address(payload: bytes) -> Assigned | None:
    """What RTM_NEWADDR or RTM_DELADDR tells; None for other families than IPv4 and IPv6."""
    if len(payload) < _IFADDRMSG.size:
        raise HostProgramError("a netlink message about an address is cut short")
    family, _, flags, scope, index = _IFADDRMSG.unpack_from(payload)
    attributes = _attributes(payload[_IFADDRMSG.size :])
    # As iproute2 does it: on a point-to-point link IFA_ADDRESS is the other end.
    raw = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS) or b""
    if (family, len(raw)) not in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        return None
    if len(attributes.get(IFA_FLAGS, b"")) == 4:
        (flags,) = struct.unpack("=I", attributes[IFA_FLAGS])
    usable = scope == RT_SCOPE_UNIVERSE and not flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED)
    return Assigned(index=index, address=str(ipaddress.ip_address(raw)), usable=usable)


def addresses_on(interface: str) -> tuple[str, ...]:
    """The global addresses that can be used on `interface`, IPv4 first; () when there is no such interface.

    The same that the fact Tailnet reads from `ip -j addr show`. Raises HostProgramError when the kernel does
    not answer: not knowing is never taken for having none.
    """
    try:
        with _socket() as asking:
            index = _index(asking, interface)
            if index is None:
                return ()
            for _ in range(_ATTEMPTS):
                found = _dump(asking, index)
                if found is not None:
                    return found
    except OSError as error:
        raise HostProgramError(f"the kernel does not tell its addresses: {error}.") from error
    raise HostProgramError("the kernel's addresses change all the time; none of its answers is whole.")


def _socket(groups: int = 0) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        made.bind((0, groups))
        made.settimeout(_ANSWER_TIMEOUT_S)
    except OSError:
        made.close()
        raise
    return made


def _ask(asking: socket.socket, kind: int, flags: int, payload: bytes) -> Iterator[Message]:
    sequence = time.monotonic_ns() & 0x7FFFFFFF
    header = _HEADER.pack(_HEADER.size + len(payload), kind, NLM_F_REQUEST | flags, sequence, 0)
    asking.sendto(header + payload, (0, 0))
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        data, sender = asking.recvfrom(1 << 16)
        if sender[0] != 0:  # from another process, not from the kernel
            continue
        for message in parse_messages(data):
            if message.sequence != sequence:
                continue
            if message.kind == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", message.payload)
                raise OSError(-code, os.strerror(-code))
            if message.kind == NLMSG_DONE:
                return
            yield message
            if not flags & NLM_F_DUMP:
                return
    raise TimeoutError("no answer")


def _index(asking: socket.socket, interface: str) -> int | None:
    name = interface.encode() + b"\0"
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(name), IFLA_IFNAME) + name
    padding = b"\0" * (_aligned(len(attribute)) - len(attribute))
    try:
        for message in _ask(asking, RTM_GETLINK, 0, _IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute + padding):
            if message.kind == RTM_NEWLINK:
                return int(_IFINFOMSG.unpack_from(message.payload)[2])
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    raise HostProgramError(f"the kernel answered something else than what {interface} is.")


def _dump(asking: socket.socket, index: int) -> tuple[str, ...] | None:
    found = set()
    whole = True
    for message in _ask(asking, RTM_GETADDR, NLM_F_DUMP, _IFADDRMSG.pack(0, 0, 0, 0, 0)):
        whole = whole and not message.flags & NLM_F_DUMP_INTR
        assigned = parse_address(message.payload) if message.kind == RTM_NEWADDR else None
        if assigned is not None and assigned.index == index and assigned.usable:
            found.add(ipaddress.ip_address(assigned.address))
    ordered = sorted(found, key=lambda address: (address.version, int(address)))
    return tuple(str(address) for address in ordered) if whole else None


class Changes:
    """Hears of every address that comes or goes, on any interface, from the moment it is made."""

    def __init__(self) -> None:
        self._socket = _socket(RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
        self._socket.setblocking(False)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a change; True when there was one."""
        if not select.select([self._socket], [], [], timeout)[0]:
            return False
        time.sleep(_GATHER_S)
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return True
            except OSError as error:
                # More happened than the socket holds: which, nobody needs to know.
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        self._socket.close()
