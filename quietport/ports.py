"""What listens on a host, who can reach it, and whether that may be: the one policy.

Pure functions: the facts, the daily report, the command line and the specs all ask these. What a host knows
of itself comes as `Evidence`; of the text of ss alone, which may come from anywhere, less can be said.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quietport.containers import Published
from quietport.net import TAILNET_INTERFACE, Interfaces, in_tailnet_ranges, parse_address
from quietport.processes import Program
from quietport.serve import Served
from quietport.ss import Listener, Process
from quietport.sshd import PORT
from quietport.unit_names import DOCKER

Exposure = Literal["loopback", "tailnet", "private", "public"]
Verdict = Literal["ok", "allowed", "violation"]


@dataclass(frozen=True)
class Judged:
    """A listener with its exposure and the policy's verdict.

    `hint` is the way to mend a violation, or the reason of a declared exception. `container` is whose port
    it is. `service` names what answers where no process holds a socket, as for Funnel.
    """

    listener: Listener
    exposure: Exposure
    verdict: Verdict
    unit: str = ""
    hint: str = ""
    container: str = ""
    service: str = ""

    @property
    def process(self) -> str:
        """Names of all the processes, with the container they work for."""
        names = ", ".join(dict.fromkeys(process.name for process in self.listener.processes)) or self.service
        return f"{names} ({self.container})" if self.container else names

    def to_json(self) -> dict[str, Any]:
        """Keys of the report: process and unit name every one of several, pid is the first."""
        processes = self.listener.processes
        return {
            "protocol": self.listener.protocol,
            "address": self.listener.where,
            "port": self.listener.port,
            "process": self.process,
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


@dataclass(frozen=True)
class Declared:
    """A public listener that hosts.toml allows, with its reason.

    It is for the processes of one systemd unit; without `unit`, for a socket that no process holds, as the
    kernel's own (WireGuard).
    """

    protocol: str
    port: int
    reason: str
    unit: str = ""


def parse_declared(entries: Any) -> tuple[Declared, ...]:
    """The exceptions in host.json. One that is not understood excuses nothing, and is left out."""
    found = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        protocol, port, reason = entry.get("protocol"), entry.get("port"), entry.get("reason")
        unit = entry.get("unit") or ""
        texts = isinstance(reason, str) and isinstance(unit, str) and bool(str(reason).strip())
        if protocol in ("tcp", "udp") and isinstance(port, int) and texts:
            found.append(Declared(protocol, port, str(reason), unit))
    return tuple(found)


@dataclass(frozen=True)
class Evidence:
    """What a host knows of itself.

    `programs`: what each process really is, by pid. `socket_units`: the sockets that systemd listens on
    itself, as `parse_socket_units` gives them. `published`: by Docker; `served`: by tailscaled; `vsock`: for
    the machine that runs this one.
    """

    listeners: Sequence[Listener]
    interfaces: Interfaces
    programs: Mapping[int, Program] = field(default_factory=dict)
    public_sshd: PublicSshd | None = None
    declared: Sequence[Declared] = ()
    socket_units: Mapping[tuple[str, str, int], str] = field(default_factory=dict)
    published: Sequence[Published] = ()
    served: Sequence[Served] = ()
    vsock: Sequence[Listener] = ()


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
_SSH_UNITS = ("ssh.service", "sshd.service", "ssh.socket", "sshd.socket")


def judge(
    listener: Listener,
    interfaces: Interfaces | None,
    programs: Mapping[int, Program] | None = None,
    public_sshd: PublicSshd | None = None,
    *,
    declared: Collection[Declared] = (),
    published: Sequence[Published] = (),
    socket_units: Mapping[tuple[str, str, int], str] | None = None,
) -> Judged:
    """Exposure and verdict of `listener`.

    `programs` says what each process really is (by its pid). Without it, names are believed, which is right
    only for text that came from elsewhere: on a host any process can call itself tailscaled. `public_sshd`
    is given where sshd was told to listen on every address; the rest is as in `Evidence`.
    """
    exposure = classify(listener, interfaces)
    holders = _holders(listener, programs, socket_units or {})
    container = ""
    if set(holders) == {DOCKER}:
        container = next((port.container for port in published if port.is_held_by(listener)), "")
    result = verdict(listener, exposure, programs)
    hint = ""
    if result == "violation":
        result, hint = _excuse(listener, holders, programs, public_sshd, declared)
    return Judged(listener, exposure, result, _named(holders), hint, container)


def judge_host(evidence: Evidence) -> list[Judged]:
    """Everything that can be reached on a host: its sockets, and what answers without one."""
    sockets = [
        judge(
            listener,
            evidence.interfaces,
            evidence.programs,
            evidence.public_sshd,
            declared=evidence.declared,
            published=evidence.published,
            socket_units=evidence.socket_units,
        )
        for listener in evidence.listeners
    ]
    held = [entry.listener for entry in sockets if entry.unit == DOCKER]
    forwarded = [
        _forwarded(port, evidence)
        for port in evidence.published
        if port.host_port and not any(port.is_held_by(listener) for listener in held)
    ]
    return [
        *sockets,
        *forwarded,
        *(_answered(served) for served in evidence.served),
        *(_on_vsock(listener, evidence) for listener in evidence.vsock),
    ]


def _holders(
    listener: Listener,
    programs: Mapping[int, Program] | None,
    socket_units: Mapping[tuple[str, str, int], str],
) -> list[str]:
    """The unit of each process that holds the socket, "" where it is in none or not known.

    PID 1 holds what socket units listen on: there it is that unit.
    """
    if programs is None:
        return []
    address = "::" if listener.address == "*" and listener.protocol != "vsock" else listener.address
    own = socket_units.get((listener.protocol, address, listener.port), "")
    known = {process.pid: programs.get(process.pid, Program()).unit for process in listener.processes}
    return [own or unit if pid == 1 else unit for pid, unit in known.items()]


def _named(holders: Sequence[str]) -> str:
    return ", ".join(unit for unit in dict.fromkeys(holders) if unit)


def _excuse(
    listener: Listener,
    holders: Sequence[str],
    programs: Mapping[int, Program] | None,
    public_sshd: PublicSshd | None,
    declared: Collection[Declared],
) -> tuple[Verdict, str]:
    """What becomes of a public listener that is none of tailscaled's or a DHCP client's, and the hint."""
    if public_sshd is not None and _is_public_sshd(listener, programs or {}):
        return ("violation" if public_sshd.problem else "allowed"), public_sshd.problem
    if programs is not None and not _is_sshd(listener, holders):
        reason = _reason(listener, holders, declared)
        if reason:
            return "allowed", reason
    whose = [one.unit or "the kernel" for one in declared if _is_at(one, listener)]
    note = f"hosts.toml declares this port for {', '.join(whose)} alone. " if whose else ""
    return "violation", note + _hint(listener, holders, believed=programs is None)


def _is_at(exception: Declared, listener: Listener) -> bool:
    return (exception.protocol, exception.port) == (listener.protocol, listener.port)


def _reason(listener: Listener, holders: Collection[str], declared: Collection[Declared]) -> str:
    """The reason why hosts.toml lets this be public, every one of its holders included; else ""."""
    for exception in declared:
        wanted = {_service(exception.unit)} if exception.unit else set()
        if _is_at(exception, listener) and set(map(_service, holders)) == wanted:
            return f"Declared in hosts.toml: {exception.reason}"
    return ""


def _service(unit: str) -> str:
    """The service of a socket unit (systemd.socket(5), Service=): both hold the socket once it is started."""
    return f"{unit.removesuffix('.socket')}.service" if unit.endswith(".socket") else unit


def _forwarded(port: Published, evidence: Evidence) -> Judged:
    """A port that Docker forwards by packet filter rules alone: no process holds it."""
    listener = Listener(port.protocol, port.host_ip or "*", port.host_port)
    exposure = classify(listener, evidence.interfaces)
    judged = Judged(listener, exposure, "ok", DOCKER, container=port.container, service="docker")
    if exposure != "public":
        return judged
    reason = _reason(listener, {DOCKER}, evidence.declared)
    return replace(judged, verdict="allowed" if reason else "violation", hint=reason or PUBLISHED_HINT)


def _answered(served: Served) -> Judged:
    """A port that tailscaled answers itself. With Funnel the Internet reaches it by the tailnet's relays."""
    unit = _TAILSCALED.unit
    if not served.funnel:
        listener = Listener("tcp", served.name or "*", served.port, zone="" if served.name else "tailscale0")
        return Judged(listener, "tailnet", "ok", unit, service="tailscale serve")
    off = f"switch it off: `tailscale funnel --{served.kind}={served.port} off`"
    if served.foreground:
        off = "end the `tailscale funnel` that runs in the foreground"
    hint = f"Funnel publishes this to the Internet, past every firewall. If nobody meant it to, {off}."
    return Judged(
        Listener("tcp", served.name, served.port),
        "public",
        "violation",
        unit,
        hint,
        service="tailscale funnel",
    )


def _on_vsock(listener: Listener, evidence: Evidence) -> Judged:
    """A socket for the machine that runs this one, as systemd-ssh-generator(8) makes for sshd."""
    unit = _named(_holders(listener, evidence.programs, evidence.socket_units))
    service = "sshd" if listener.port == PORT and not listener.processes else ""
    return Judged(listener, "private", "ok", unit, service=service)


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
    if _as_installed(program) == _TAILSCALED:
        return True
    # A container has a root of its own, in which any path can be any program.
    contained = program.unit == "" or program.unit.startswith(("docker-", "libpod-", "cri-containerd-"))
    return dhcp and not contained and _as_installed(program).executable in _DHCP_EXECUTABLES


def _is_public_sshd(listener: Listener, programs: Mapping[int, Program]) -> bool:
    """Whether this is the sshd of ssh.service on every address, and on no other port than ours."""
    if (listener.protocol, listener.port, listener.zone) != ("tcp", PORT, ""):
        return False
    if listener.address != "*" and not parse_address(listener.address).is_unspecified:
        return False
    held = [programs.get(process.pid, Program()) for process in listener.processes]
    return bool(held) and all(_as_installed(program) == _SSHD for program in held)


def _as_installed(program: Program) -> Program:
    # An upgrade replaces the file before it restarts the service.
    return Program(unit=program.unit, executable=program.executable.removesuffix(" (deleted)"))


def _is_sshd(listener: Listener, holders: Sequence[str]) -> bool:
    """Whether this is sshd's, or at its place: no exception excuses that, break_glass_cidrs is for it."""
    of_ssh = any(unit in _SSH_UNITS or unit.startswith(("ssh@", "sshd@")) for unit in holders)
    return of_ssh or (listener.protocol, listener.port) == ("tcp", PORT)


SSHD_HINT = (
    "sshd can be reached by everyone. Converge the host again; by hand: name the tailnet address in "
    "a ListenAddress line of /etc/ssh/sshd_config.d/00-quietport.conf and no other anywhere, mask "
    "ssh.socket, run sshd -t, restart ssh.service, and log in over the tailnet before you close "
    "this session."
)
PUBLISHED_HINT = (
    "A container publishes this port on every address; the DOCKER-USER chain shields it. "
    "Publish it on 127.0.0.1 (ports: 127.0.0.1:8080:80) and create the container anew."
)


def _hint(listener: Listener, holders: Sequence[str], *, believed: bool) -> str:
    """The way to mend a violation. `believed`: nothing but the processes' names is known."""
    names = {process.name for process in listener.processes}
    if not names:
        return "No process is shown: run this as root, or look for a kernel service (WireGuard, NFS)."
    socket_activated = listener.port == PORT and "systemd" in names
    if "sshd" in names or any(unit in _SSH_UNITS for unit in holders) or socket_activated:
        return SSHD_HINT
    if DOCKER in holders or (believed and "docker-proxy" in names):
        return PUBLISHED_HINT
    for name, unit in (("tailscaled", _TAILSCALED.unit), ("docker-proxy", DOCKER)):
        if name in names:
            return f"It calls itself {name} but is not the program of {unit}: find out what it is."
    units = list(dict.fromkeys(holders))
    services = bool(units) and all(unit.endswith((".service", ".socket")) for unit in units)
    what = f"`systemctl disable --now {shlex.join(units)}`" if services else "stop the program"
    return f"Bind it to 127.0.0.1 or to the tailnet address in its configuration, or {what}."


# --- the report -----------------------------------------------------------------------------------


def report(judged: list[Judged]) -> dict[str, Any]:
    """The JSON of `quietport ports --json`: schema, ok (no violation), listeners."""
    return {
        "schema": 1,
        "ok": all(entry.verdict != "violation" for entry in judged),
        "listeners": [entry.to_json() for entry in judged],
    }
