"""Reading what ss prints: one listening socket a row, with the processes that hold it.

Pure functions on text, which may come from anywhere: what is not understood is an error, never a quiet host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from quietport.errors import HostProgramError
from quietport.net import parse_address

Protocol = Literal["tcp", "udp", "sctp", "vsock"]


@dataclass(frozen=True)
class Process:
    """One process that holds a socket, as ss shows it. `name` is what the process calls itself."""

    name: str
    pid: int


@dataclass(frozen=True)
class Listener:
    """One listening socket. `address` is as ss wrote it, without brackets and zone; "*" is both families.

    `zone` is the interface the socket is bound to, or "".
    """

    protocol: Protocol
    address: str
    port: int
    zone: str = ""
    processes: tuple[Process, ...] = ()

    @property
    def where(self) -> str:
        """Address with its zone, as the reports show it."""
        return f"{self.address}%{self.zone}" if self.zone else self.address


_HEADER = re.compile(
    r"\s*(Netid\s+)?State\s+Recv-Q\s+Send-Q\s+Local Address:Port\s+Peer Address:Port\s*(Process)?"
    r"[ \t]*\r?(\n|$)"
)
# A row begins at a line's start and is recognised down to its peer: a process may have a newline in its
# name, but 15 bytes are too few to imitate all this.
_ROW = re.compile(
    r"^(?:(?P<netid>\S+)[ \t]+)?(?P<state>LISTEN|UNCONN)[ \t]+\d+[ \t]+\d+[ \t]+"
    r"(?P<local>\S+):(?P<port>\d+)[ \t]+(?P<peer>\S+):(?:\*|\d+)(?=[ \t\r\n]|users:|\Z)",
    re.MULTILINE,
)
_USERS = re.compile(r"users:\((?P<entries>\(.*\))\)", re.DOTALL)
# The kernel keeps 15 bytes of a name. With that limit the longest match is the right one even for a name
# that imitates ss's own syntax, such as `",pid=1,fd=3),(`: what follows a true name is longer than 15.
_USER = re.compile(r'\("(?P<name>.{0,15})",pid=(?P<pid>\d{1,10}),fd=\d+\)(?:,|\Z)', re.DOTALL)
_LOCAL = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)(?:%(?P<inner>[^\s/\[\]]{1,15}))?\]|(?P<four>\*|[0-9.]+))"
    r"(?:%(?P<outer>[^\s/\[\]]{1,15}))?"
)
_STATES = {"LISTEN": "tcp", "UNCONN": "udp"}


def parse_ss(text: str) -> list[Listener]:
    """Read what `ss -lntup` or `ss -lntp` prints, with or without its header and Netid column.

    Raises HostProgramError for anything that is not understood, down to a single row: what cannot be read
    must never look like a quiet host. A header alone is a host on which nothing listens; no byte is an error.
    """
    if not text:
        raise HostProgramError("There is no output of ss to read, not even its header.")
    header = _HEADER.match(text)
    body = text[header.end() :] if header else text
    rows = list(_ROW.finditer(body))
    before = body[: rows[0].start()] if rows else body
    if before.strip() or not (rows or header):
        raise _not_understood(before)
    ends = [*(row.start() for row in rows[1:]), len(body)]
    # Not strict: without rows there is still an end.
    return [_listener(row, body[row.end() : end]) for row, end in zip(rows, ends, strict=False)]


def _not_understood(text: str) -> HostProgramError:
    line = next((line for line in text.splitlines() if line.strip()), "")
    return HostProgramError(f"This is not what ss -lntup prints: {line.strip()[:80]!r}")


def _listener(row: re.Match[str], tail: str) -> Listener:
    protocol = _STATES[row["state"]]
    port = int(row["port"][:6])
    if row["netid"] not in (None, protocol) or not 1 <= port <= 65535:
        raise _not_understood(row[0])
    address, zone = _local_address(row["local"])
    return Listener(
        protocol="tcp" if protocol == "tcp" else "udp",
        address=address,
        port=port,
        zone=zone,
        processes=_processes(tail.strip()),
    )


def _local_address(text: str) -> tuple[str, str]:
    """Address and zone of `[fe80::1]%eth0`, `[fe80::1%eth0]`, `0.0.0.0%eth0`, `*` and the like."""
    found = _LOCAL.fullmatch(text)
    if found is None:
        raise _not_understood(text)
    address = found["six"] or found["four"]
    if address != "*":
        try:
            parse_address(address)
        except ValueError:
            raise _not_understood(text) from None
    return address, found["inner"] or found["outer"] or ""


def _processes(tail: str) -> tuple[Process, ...]:
    if not tail:
        return ()
    users = _USERS.fullmatch(tail)
    entries = users["entries"] if users else ""
    found: list[Process] = []
    position = 0
    while position < len(entries) and (entry := _USER.match(entries, position)):
        found.append(Process(name=entry["name"], pid=int(entry["pid"])))
        position = entry.end()
    if not found or position < len(entries) or entries.endswith(","):
        raise _not_understood(tail)
    return tuple(dict.fromkeys(found))


def parse_vsock(text: str) -> list[Listener]:
    """The stream sockets of VMs in what `ss -lnp --vsock` prints; address "*" is every CID (vsock(7)).

    Rows that are not understood are left out: these sockets are shown, and decide nothing.
    """
    rows = [row for row in _ROW.finditer(text) if row["state"] == "LISTEN"]
    ends = [*(row.start() for row in rows[1:]), len(text)]
    found = []
    for row, end in zip(rows, ends, strict=False):
        try:
            processes = _processes(text[row.end() : end].strip())
        except HostProgramError:
            processes = ()
        found.append(Listener("vsock", row["local"], int(row["port"][:10]), processes=processes))
    return found
