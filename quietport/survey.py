"""What listens on this host, judged by what the processes really are."""

from __future__ import annotations

from pathlib import Path

from quietport.commands import output_of
from quietport.net import parse_interfaces
from quietport.ports import Judged, judge, parse_ss
from quietport.processes import program_of


def survey() -> list[Judged]:
    """Every listener of this host with its exposure and verdict. Raises HostProgramError."""
    listeners = parse_ss(output_of(["ss", "-lntup"]))
    # A kernel without IPv6 makes `ip -6` fail; that family then has no routes.
    routes = [output_of(["ip", "-j", f"-{family}", "route", "show", "default"]) for family in _families()]
    interfaces = parse_interfaces(output_of(["ip", "-j", "-d", "addr"]), routes)
    pids = {process.pid for listener in listeners for process in listener.processes}
    programs = {pid: program_of(pid) for pid in pids}
    return [judge(listener, interfaces, programs) for listener in listeners]


def _families() -> tuple[int, ...]:
    return (4, 6) if Path("/proc/net/if_inet6").exists() else (4,)
