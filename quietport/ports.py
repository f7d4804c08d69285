"""What listens on a host, who can reach it, and whether that may be.

Pure functions: the fact, the daily report, the command line and the specs all ask these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quietport.errors import HostProgramError
from quietport.net import TAILNET_INTERFACE, Interfaces, in_tailnet_ranges, parse_address
from quietport.processes import Program

Exposure = Literal["loopback", "tailnet", "private", "public"]
Verdict = Literal["ok", "allowed", "violation"]


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

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    zone: str = ""
    processes: tuple[Process, ...] = ()

    @property
    def where(self) -> str:
        """Address with its zone, as the reports show it."""
        return f"{self.address}%{self.zone}" if self.zone else self.address


@dataclass(frozen=True)
class Judged:
    """A listener with its exposure and the policy's verdict. `hint` is the way to mend a violation."""

    listener: Listener
    exposure: Exposure
    verdict: Verdict
    unit: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Keys of the report: process and unit name every one of several, pid is the first."""
        processes = self.listener.processes
        return {
            "protocol": self.listener.protocol,
            "address": self.listener.where,
            "port": self.listener.port,
            "process": ", ".join(dict.fromkeys(process.name for process in processes)),
            "pid": processes[0].pid if processes else None,
            "unit": self.unit,
            "exposure": self.exposure,
            "verdict": self.verdict,
            "hint": self.hint,
        }


@dataclass(frozen=True)
class PublicSshd:
    """What is known of an sshd on every address: `problem` says why it may not be; "" when it may."""

    problem: str = ""


# --- reading ss -----------------------------------------------------------------------------------

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


# --- who can reach it -----------------------------------------------------------------------------


def classify(listener: Listener, interfaces: Interfaces | None) -> Exposure:
    """Who can reach `listener`: the class follows the interface that HAS its address.

    100.64/10 or 10/8 on eth0 is a provider's network and counts as public. Without `interfaces` (the text
    of ss alone) address ranges decide: loopback, the tailnet's, and public for everything else.
    """
    if listener.address == "*":
        return _by_interface(listener.zone, interfaces)
    address = parse_address(listener.address)
    if address.is_loopback:
        return "loopback"
    if listener.zone or address.is_unspecified:
        # Bound to an interface, a socket takes only what arrives there.
        return _by_interface(listener.zone, interfaces)
    if interfaces is None:
        return "tailnet" if in_tailnet_ranges(address) else "public"
    classes = [_by_interface(name, interfaces) for name in interfaces.owners.get(str(address), ())]
    # An address that two interfaces have is as open as the more open of them; one that none has is unknown.
    return max(classes, key=_OPENNESS.index, default="public")


_OPENNESS: list[Exposure] = ["loopback", "tailnet", "private", "public"]


def _by_interface(name: str, interfaces: Interfaces | None) -> Exposure:
    if interfaces is None:
        kind = {"lo": "loopback", TAILNET_INTERFACE: "tailnet"}.get(name, "public")
    else:
        kind = interfaces.kinds.get(name, "public")
    return next((exposure for exposure in _OPENNESS if exposure == kind), "public")


# --- whether it may be ----------------------------------------------------------------------------

# UDP ports a DHCP client answers on, and the programs that are one in Debian and Ubuntu.
_DHCP_PORTS = (68, 546)
_DHCP_NAMES = frozenset({"dhclient", "dhcpcd", "systemd-network", "NetworkManager"})
_DHCP_EXECUTABLES = frozenset(
    {
        "/usr/sbin/dhclient",
        "/sbin/dhclient",
        "/usr/sbin/dhcpcd",
        "/sbin/dhcpcd",
        "/usr/lib/systemd/systemd-networkd",
        "/lib/systemd/systemd-networkd",
        "/usr/sbin/NetworkManager",
    }
)
_TAILSCALED = Program(unit="tailscaled.service", executable="/usr/sbin/tailscaled")
_SSHD = Program(unit="ssh.service", executable="/usr/sbin/sshd")
_SSH_PORT = 22


def judge(
    listener: Listener,
    interfaces: Interfaces | None,
    programs: Mapping[int, Program] | None = None,
    public_sshd: PublicSshd | None = None,
) -> Judged:
    """Exposure and verdict of `listener`.

    `programs` says what each process really is (by its pid). Without it, names are believed, which is right
    only for text that came from elsewhere: on a host any process can call itself tailscaled. `public_sshd`
    is given where sshd was told to listen on every address.
    """
    exposure = classify(listener, interfaces)
    units = [programs.get(process.pid, Program()).unit for process in listener.processes] if programs else []
    unit = ", ".join(dict.fromkeys(name for name in units if name))
    result = verdict(listener, exposure, programs)
    hint = _hint(listener, unit) if result == "violation" else ""
    if result == "violation" and public_sshd is not None and _is_public_sshd(listener, programs or {}):
        result, hint = ("violation" if public_sshd.problem else "allowed"), public_sshd.problem
    return Judged(listener=listener, exposure=exposure, verdict=result, unit=unit, hint=hint)


def verdict(listener: Listener, exposure: Exposure, programs: Mapping[int, Program] | None = None) -> Verdict:
    """ok when the public cannot reach it; allowed for tailscaled and a DHCP client; else violation."""
    if exposure != "public":
        return "ok"
    held = listener.processes
    # Every process that holds the socket answers on it, so every one must be excused.
    excused = bool(held) and all(_excused(listener, process, programs) for process in held)
    return "allowed" if excused else "violation"


def _excused(listener: Listener, process: Process, programs: Mapping[int, Program] | None) -> bool:
    dhcp = listener.protocol == "udp" and listener.port in _DHCP_PORTS
    if programs is None:
        return process.name == "tailscaled" or (dhcp and process.name in _DHCP_NAMES)
    program = programs.get(process.pid, Program())
    # An upgrade replaces the file before it restarts the service.
    executable = program.executable.removesuffix(" (deleted)")
    if Program(unit=program.unit, executable=executable) == _TAILSCALED:
        return True
    # A container has a root of its own, in which any path can be any program.
    contained = program.unit == "" or program.unit.startswith(("docker-", "libpod-", "cri-containerd-"))
    return dhcp and not contained and executable in _DHCP_EXECUTABLES


def _is_public_sshd(listener: Listener, programs: Mapping[int, Program]) -> bool:
    """Whether this is the sshd of ssh.service on every address, and on no other port than ours."""
    if (listener.protocol, listener.port, listener.zone) != ("tcp", _SSH_PORT, ""):
        return False
    if listener.address != "*" and not parse_address(listener.address).is_unspecified:
        return False
    held = [programs.get(process.pid, Program()) for process in listener.processes]
    return bool(held) and all(_as_installed(program) == _SSHD for program in held)


def _as_installed(program: Program) -> Program:
    # An upgrade replaces the file before it restarts the service.
    return Program(unit=program.unit, executable=program.executable.removesuffix(" (deleted)"))


def _hint(listener: Listener, unit: str) -> str:
    names = {process.name for process in listener.processes}
    if not names:
        return "No process is shown: run this as root, or look for a kernel service (WireGuard, NFS)."
    socket_activated = listener.port == 22 and "systemd" in names
    if "sshd" in names or unit in ("ssh.socket", "ssh.service") or socket_activated:
        return (
            "sshd can be reached by everyone. Converge the host again; by hand: name the tailnet address in "
            "a ListenAddress line of /etc/ssh/sshd_config.d/00-quietport.conf and no other anywhere, mask "
            "ssh.socket, run sshd -t, restart ssh.service, and log in over the tailnet before you close "
            "this session."
        )
    if "docker-proxy" in names:
        return (
            "A container publishes this port on every address; the DOCKER-USER chain shields it. "
            "Publish it on 127.0.0.1 (ports: 127.0.0.1:8080:80) and create the container anew."
        )
    if "tailscaled" in names:
        return "It calls itself tailscaled but is not the program of tailscaled.service: find out what it is."
    what = f"systemctl disable --now {unit}" if unit.endswith(".service") else "stop the program"
    return f"Bind it to 127.0.0.1 or to the tailnet address in its configuration, or {what}."


# --- the report -----------------------------------------------------------------------------------


def report(judged: list[Judged]) -> dict[str, Any]:
    """The JSON of `quietport ports --json`: schema, ok (no violation), listeners."""
    return {
        "schema": 1,
        "ok": all(entry.verdict != "violation" for entry in judged),
        "listeners": [entry.to_json() for entry in judged],
    }
