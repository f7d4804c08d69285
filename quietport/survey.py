"""What listens on this host, judged by what the processes really are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quietport import admission, containers, opened, serve
from quietport.commands import output_of, run
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_LISTENERS, PUBLIC_NETWORKS, PUBLIC_SSHD, host_settings
from quietport.net import parse_interfaces
from quietport.ports import Declared, Evidence, Judged, PublicSshd, judge_host, parse_declared
from quietport.processes import SHOW_SOCKET_UNITS, parse_socket_units, program_of
from quietport.ss import Listener, parse_ss, parse_vsock
from quietport.sshd import PORT

SS = ("ss", "-lntup")
SS_VSOCK = ("ss", "-lnp", "--vsock")


def survey() -> list[Judged]:
    """Everything of this host that can be reached, with exposure and verdict. Raises HostProgramError."""
    return judge_host(evidence())


def evidence() -> Evidence:
    """What this host knows of itself. Raises HostProgramError where what can be public cannot be read."""
    listeners = parse_ss(output_of(SS))
    # A kernel without IPv6 makes `ip -6` fail; that family then has no routes.
    routes = [output_of(["ip", "-j", f"-{family}", "route", "show", "default"]) for family in _families()]
    interfaces = parse_interfaces(output_of(["ip", "-j", "-d", "addr"]), routes)
    vsock = _vsock()
    pids = {process.pid for listener in (*listeners, *vsock) for process in listener.processes}
    return Evidence(
        listeners=listeners,
        interfaces=interfaces,
        programs={pid: program_of(pid) for pid in pids},
        public_sshd=_public_sshd(),
        declared=_declared(),
        socket_units=parse_socket_units(_shown(SHOW_SOCKET_UNITS)) if 1 in pids else {},
        published=containers.published(),
        served=serve.served(),
        vsock=vsock,
    )


def _vsock() -> list[Listener]:
    return parse_vsock(_shown(SS_VSOCK))


def _shown(argv: Sequence[str]) -> str:
    """What `argv` prints; "" when it fails: only a name in the report depends on it."""
    try:
        done = run(argv, timeout=10)
    except HostProgramError:
        return ""
    return done.out if done.code == 0 else ""


def _declared() -> tuple[Declared, ...]:
    declared = parse_declared(host_settings().get(PUBLIC_LISTENERS))
    # Without root ss shows no process of others: a socket of the kernel cannot be told from theirs.
    return tuple(one for one in declared if one.unit or os.geteuid() == 0)


def _public_sshd() -> PublicSshd | None:
    """What host.json and the firewall say of an sshd on every address; None where none is declared."""
    note = opened.read()
    if note is not None:
        return PublicSshd(f"sshd was {note.sentence()}. `quietport close` closes it.")
    declared = host_settings()
    if declared.get(PUBLIC_SSHD) is not True:
        return None
    try:
        texts = {family: admission.read(family) for family in admission.families()}
    except HostProgramError as error:
        return PublicSshd(f"The firewall cannot be read: {error}")
    networks = [str(network) for network in declared.get(PUBLIC_NETWORKS) or []]
    return PublicSshd(admission.admission_problem(texts, port=PORT, networks=networks))


def _families() -> tuple[int, ...]:
    return (4, 6) if Path("/proc/net/if_inet6").exists() else (4,)
