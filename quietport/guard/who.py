"""Who may confirm: an sshd session that was accepted after arming, on an address of the tailnet.

Found through the process tree and the kernel's socket tables. SSH_CONNECTION is no witness: sudo drops it,
and anybody can set it. A multiplexed session belongs to the sshd process of its first login, and is as old as
that one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from quietport import sshd
from quietport.guard.machine import GuardError, Machine, started_ticks, stat_fields
from quietport.guard.scope import look_at_addresses, look_at_units
from quietport.net import parse_address

SSHD_PROGRAMS = ("/usr/sbin/sshd", "/usr/lib/openssh/sshd-session")
_ESTABLISHED, _LISTENING = "01", "0A"


@dataclass(frozen=True)
class Connection:
    """One end of an established TCP connection on this host, and the other."""

    local: sshd.Listener
    remote: sshd.Listener


@dataclass(frozen=True)
class Login:
    """The login a process descends from. `since_s` is when sshd accepted it, in seconds since boot."""

    since_s: float
    connection: Connection


def parse_established(text: str) -> dict[int, Connection]:
    """Established connections of /proc/net/tcp or tcp6 as inode = connection (sshd.parse_proc_net)."""
    found: dict[int, Connection] = {}
    for row in text.splitlines()[1:]:
        fields = row.split()
        if len(fields) >= 10 and fields[3] == _ESTABLISHED:
            local, remote = (_end(field) for field in (fields[1], fields[2]))
            found[int(fields[9])] = Connection(local, remote)
    return found


def _end(field: str) -> sshd.Listener:
    # What reads the table of listeners reads an address of this one, in a row of that kind.
    address, port = sshd.parse_proc_net(f"header\n0: {field} 0:0 {_LISTENING} 0 0 0 0 0 1")[1]
    return str(parse_address(address)), port


def _inodes(machine: Machine, pid: int) -> Iterator[int]:
    with suppress(OSError):
        for descriptor in machine.path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError, ValueError):
                kind, _, inode = str(descriptor.readlink()).partition(":[")
                if kind == "socket":
                    yield int(inode.rstrip("]"))


def login_of(machine: Machine, pid: int) -> Login:
    """The sshd login that process `pid` runs in. Raises GuardError when it is in none that can be told."""
    sessions = list(_sshd_above(machine, pid))
    if not sessions:
        raise GuardError(
            "this is no SSH login: only one made after arming shows that the host can be reached."
        )
    established: dict[int, Connection] = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            established |= parse_established(machine.path(f"/proc/net/{name}").read_text())
    # A session also has the connections it forwards; the login's own arrived where sshd listens.
    _, _, pids = look_at_units(machine)
    ports = {port for _, port in machine.sshd_host().listeners(pids)}
    login: Login | None = None
    for process in sessions:
        own = [
            established[inode]
            for inode in _inodes(machine, process)
            if inode in established and established[inode].local[1] in ports
        ]
        if own:
            # The outermost process that has it is the one that accepted it: the inner ones came after the
            # key was checked.
            since = started_ticks(machine.path(f"/proc/{process}")) / os.sysconf("SC_CLK_TCK")
            login = Login(since, own[0])
    if login is None:
        raise GuardError("the connection of this login is not there any more, or cannot be told from others.")
    return login


def _sshd_above(machine: Machine, pid: int) -> Iterator[int]:
    """The ancestors of `pid` that are sshd, the nearest first, up to the first that is not again."""
    seen = False
    while pid > 1:
        process = machine.path(f"/proc/{pid}")
        try:
            parent = int(stat_fields(process)[1])
            program = str((process / "exe").readlink()).removesuffix(" (deleted)")
        except (OSError, ValueError, IndexError) as error:
            raise GuardError(f"process {pid} above this one cannot be examined: {error}.") from error
        if program in SSHD_PROGRAMS:
            seen = True
            yield pid
        elif seen:
            return
        pid = parent


def may_confirm(machine: Machine, pid: int, *, armed_s: float, over: str) -> str:
    """Why process `pid` may confirm, as a phrase for the log. Raises GuardError, which says why it may not.

    `armed_s` is when the guard was armed, in seconds since boot; `over` is tailnet or any.
    """
    login = login_of(machine, pid)
    if login.since_s <= armed_s:
        raise GuardError(
            f"this SSH login is {armed_s - login.since_s:.0f} s older than the guard: it only shows that the "
            "host could be reached before. Log in anew, without a shared connection "
            "(ssh -o ControlPath=none), and confirm there."
        )
    local, remote = login.connection.local[0], login.connection.remote[0]
    assigned, tailnet = look_at_addresses(machine)
    if remote in assigned:
        raise GuardError(f"this login comes from the host itself ({remote}), which shows nothing.")
    if over == "tailnet" and local not in tailnet:
        raise GuardError(
            f"this login arrived at {local}, which is not an address of the tailnet "
            f"({', '.join(tailnet) or 'there is none now'}). Log in over the tailnet, and confirm there."
        )
    return f"from {remote}, at {local}, by a login of {login.since_s - armed_s:.1f} s after arming"
