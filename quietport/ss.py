"""Reading what ss prints: one listening socket a row, with the processes that hold it.

Pure functions on text, which may come from anywhere: what is not understood is an error, never a quiet host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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


# No pattern here takes more than linear time: the text may be long, and hostile.
_HEADER = re.compile(
    r"\s*(?:Netid\s+)?State\s+Recv-Q\s+Send-Q\s+Local Address:Port\s+Peer Address:Port(?:\s*Process)?"
    r"[ \t]*\r?(?:\n|\Z)"
)
_QUEUES = r"[ \t]+[0-9]+[ \t]+[0-9]+[ \t]+"
_FOUR = r"[0-9.]{7,15}"
_SIX = r"[0-9A-Fa-f:.]{2,45}"
_ZONE = r"[^\s/:\[\]]{1,15}"
_LOCAL = (
    rf"(?:\[(?P<six>{_SIX})(?:%(?P<inner>{_ZONE}))?\]|(?P<four>\*|{_FOUR}))"
    rf"(?:%(?P<outer>{_ZONE}))?:(?P<port>[0-9]{{1,5}})"
)
_PEER = rf"(?:\*|{_FOUR}|\[{_SIX}\]):\*"
_AFTER = r"(?=[ \t\r\n]|users:|\Z)"
# The next row, at a line's start, or the end of the text. No name holds a row, which is longer than 15 bytes,
# and none spans two names: a zone alone may have quotes, and is shorter than what ss writes between names.
_ROW = re.compile(
    rf"[ \t\r\n]*(?:^(?:(?P<netid>tcp|udp)[ \t]+)?(?P<state>LISTEN|UNCONN){_QUEUES}{_LOCAL}[ \t]+{_PEER}"
    rf"{_AFTER}|\Z)",
    re.MULTILINE,
)
_VSOCK_ROW = re.compile(
    rf"^(?:v_str[ \t]+)?LISTEN{_QUEUES}(?P<local>\*|[0-9]{{1,10}}):(?P<port>[0-9]{{1,10}})[ \t]+"
    rf"(?:\*|[0-9]+):(?:\*|[0-9]+){_AFTER}",
    re.MULTILINE,
)
_WORDS = re.compile(r"\S.{0,79}")
_LINE_END = re.compile(r"[ \t]*\r?(?:\n|\Z)")
_USERS = re.compile(r'[ \t\r\n]*users:\((?=\(")')
# What ss writes behind a name; `last` is the end of the list.
_CLOSED = re.compile(r'",pid=(?P<pid>[0-9]{1,10}),fd=[0-9]{1,10}\)(?:,(?=\(")|(?P<last>\)))')
# What the kernel keeps of a name, in bytes, of which a character here is one at least.
_NAME_BYTES = 15
_STATES = {"LISTEN": "tcp", "UNCONN": "udp"}


def parse_ss(text: str) -> list[Listener]:
    """Read what `ss -lntup` or `ss -lntp` prints, with or without its header and Netid column.

    Raises HostProgramError for anything that is not understood, down to a single row: what cannot be read
    must never look like a quiet host. A header alone is a host on which nothing listens; no byte is an error.
    """
    if not text:
        raise HostProgramError("There is no output of ss to read, not even its header.")
    header = _HEADER.match(text)
    start = header.end() if header else 0
    row = _ROW.match(text, start)
    if row is None or not (header or row["state"]):
        raise _not_understood(text, start)
    found: list[Listener] = []
    while row["state"]:
        processes, following = _processes(text, row.end(), _ROW)
        found.append(_listener(row, processes))
        row = following
    return found


def _not_understood(text: str, position: int = 0) -> HostProgramError:
    line = _WORDS.search(text, position)
    return HostProgramError(f"This is not what ss -lntup prints: {line[0].strip() if line else ''!r}")


def _listener(row: re.Match[str], processes: tuple[Process, ...]) -> Listener:
    protocol = _STATES[row["state"]]
    port = int(row["port"])
    if row["netid"] not in (None, protocol) or not 1 <= port <= 65535:
        raise _not_understood(row[0])
    address, zone = _local_address(row)
    return Listener(
        protocol="tcp" if protocol == "tcp" else "udp",
        address=address,
        port=port,
        zone=zone,
        processes=processes,
    )


def _local_address(row: re.Match[str]) -> tuple[str, str]:
    """Address and zone of `[fe80::1]%eth0`, `[fe80::1%eth0]`, `0.0.0.0%eth0`, `*` and the like."""
    address = row["six"] or row["four"]
    if address != "*":
        try:
            parse_address(address)
        except ValueError:
            raise _not_understood(row[0]) from None
    return address, row["inner"] or row["outer"] or ""


def _processes(
    text: str, position: int, follows: re.Pattern[str]
) -> tuple[tuple[Process, ...], re.Match[str]]:
    """The processes that hold the socket of the row that ends at `position`, and what `follows` them.

    A name may imitate the list: every reading is tried, the longest names first, since what comes after a
    true name is too long to be part of one (but for an empty name, with a pid and an fd of one digit).
    """
    users = _USERS.match(text, position)
    start = users.end() if users else position
    # The entry that ends at a place, and where it begins: no place is tried twice.
    entries: dict[int, tuple[int, Process]] = {}
    waiting = [(start, users is None)]
    while waiting:
        place, last = waiting.pop()
        if last:
            if following := follows.match(text, place):
                return _path(entries, start, place), following
            continue
        for process, end, ends_list in _readings(text, place):
            if end not in entries:
                entries[end] = place, process
                waiting.append((end, ends_list))
    raise _not_understood(text, position)


def _readings(text: str, place: int) -> Iterator[tuple[Process, int, bool]]:
    """Each reading of the entry at `place`, where it ends and whether it is the last; short names first."""
    start = place + len('("')
    # A terminal makes two characters of a newline, also of one in a name.
    stop = start + 2 * _NAME_BYTES + 1
    quote = text.find('"', start, stop)
    while quote != -1:
        if closed := _CLOSED.match(text, quote):
            name = text[start:quote]
            if len(name) - name.count("\r\n") <= _NAME_BYTES:
                yield Process(name=name, pid=int(closed["pid"])), closed.end(), closed["last"] is not None
        quote = text.find('"', quote + 1, stop)


def _path(entries: Mapping[int, tuple[int, Process]], start: int, end: int) -> tuple[Process, ...]:
    """The processes from `start` to `end`, each once."""
    found: list[Process] = []
    while end != start:
        end, process = entries[end]
        found.append(process)
    return tuple(dict.fromkeys(reversed(found)))


def parse_vsock(text: str) -> list[Listener]:
    """The stream sockets of VMs in what `ss -lnp --vsock` prints; address "*" is every CID (vsock(7)).

    Rows that are not understood are left out: these sockets are shown, and decide nothing.
    """
    found = []
    for row in _VSOCK_ROW.finditer(text):
        try:
            processes, _ = _processes(text, row.end(), _LINE_END)
        except HostProgramError:
            processes = ()
        found.append(Listener("vsock", row["local"], int(row["port"]), processes=processes))
    return found
