"""What listens on this host, judged by what the processes really are."""

from __future__ import annotations

from pathlib import Path

from quietport import admission, opened
from quietport.commands import output_of
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_NETWORKS, PUBLIC_SSHD, host_settings
from quietport.net import parse_interfaces
from quietport.ports import Judged, PublicSshd, judge, parse_ss
from quietport.processes import program_of
from quietport.sshd import PORT


def survey() -> list[Judged]:
    """Every listener of this host with its exposure and verdict. Raises HostProgramError."""
    listeners = parse_ss(output_of(["ss", "-lntup"]))
    # A kernel without IPv6 makes `ip -6` fail; that family then has no routes.
    routes = [output_of(["ip", "-j", f"-{family}", "route", "show", "default"]) for family in _families()]
    interfaces = parse_interfaces(output_of(["ip", "-j", "-d", "addr"]), routes)
    pids = {process.pid for listener in listeners for process in listener.processes}
    programs = {pid: program_of(pid) for pid in pids}
    public_sshd = _public_sshd()
    return [judge(listener, interfaces, programs, public_sshd) for listener in listeners]


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
