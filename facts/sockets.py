"""Listening sockets, with who can reach them."""

from __future__ import annotations

import json
from typing import Any

from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.packetfilter import READ4, READ6, by_family
from facts.shell import one_host_at_most, sections, split
from quietport.admission import admission_problem
from quietport.errors import HostProgramError
from quietport.hostfile import HOST_JSON, PUBLIC_NETWORKS, PUBLIC_SSHD
from quietport.net import parse_interfaces
from quietport.ports import PublicSshd, judge, parse_ss
from quietport.processes import Program, unit_of
from quietport.sshd import PORT

# The executable comes last and on one line: its path is chosen by whoever runs it.
_PROGRAMS = (
    "cat /proc/1/cgroup; ss -lntup | grep -o ',pid=[0-9]*,' | tr -dc '0-9\\n' | sort -un | "
    "while read -r pid; do "
    'printf "pid %s\\n" "$pid"; cat "/proc/$pid/cgroup"; '
    'printf "exe %s\\n" "$(readlink -n "/proc/$pid/exe" | tr "\\n" "?")"; done; true'
)
# The firewall is asked about where sshd may listen on every address (docs/break-glass.md) and nowhere else.
_IF_DECLARED = f"grep -q '\"{PUBLIC_SSHD}\":.true' {HOST_JSON}"


class ListeningSockets(FactBase[list[dict[str, Any]]]):
    """Every TCP and UDP socket that listens, IPv4 and IPv6.

    A list of {protocol, address, port, process, pid, unit, exposure, verdict, hint}; exposure is loopback,
    tailnet, private (a bridge of this host) or public, verdict is ok, allowed or violation.
    """

    @override
    def command(self) -> str:
        return sections(
            sockets="ss -lntup",
            addresses="ip -j -d addr",
            routes4="ip -j -4 route show default",
            routes6="ip -j -6 route show default",
            programs=_PROGRAMS,
            declared=f"{_IF_DECLARED} && cat {HOST_JSON}",
            filter4=f"{_IF_DECLARED} && {READ4}",
            filter6=f"{_IF_DECLARED} && {{ {READ6}; }}",
        )

    @override
    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[dict[str, Any]]:
        parts = split(
            output,
            *("sockets", "addresses", "routes4", "routes6", "programs", "declared", "filter4", "filter6"),
        )
        if parts["sockets"].code != 0 or parts["addresses"].code != 0:
            raise FactProcessError("ss or ip (package iproute2) is missing or failed on the host")
        try:
            listeners = parse_ss(parts["sockets"].text)
            routes = (parts["routes4"].text, parts["routes6"].text)
            interfaces = parse_interfaces(parts["addresses"].text, routes)
        except HostProgramError as error:
            raise FactProcessError(str(error)) from error
        programs = parse_programs(parts["programs"].text)
        filters = by_family(parts["filter4"], parts["filter6"])
        public_sshd = parse_public_sshd(parts["declared"].text, filters)
        return [judge(listener, interfaces, programs, public_sshd).to_json() for listener in listeners]


def parse_public_sshd(declared: str, filters: dict[int, str]) -> PublicSshd | None:
    """What is to be said of an sshd on every address; None where host.json (`declared`) allows none."""
    try:
        networks = json.loads(declared)[PUBLIC_NETWORKS] if declared else None
    except (ValueError, KeyError, TypeError):
        return None
    if networks is None:
        return None
    return PublicSshd(admission_problem(filters, port=PORT, networks=list(map(str, networks))))


def parse_programs(text: str) -> dict[int, Program]:
    """Read the section `programs`: PID 1's cgroup, then for each process its cgroup and executable."""
    init, *blocks = f"\n{text}".split("\npid ")
    programs: dict[int, Program] = {}
    for block in blocks:
        pid, _, rest = block.partition("\n")
        cgroup, _, executable = f"\n{rest}".rpartition("\nexe ")
        if pid.isdigit():
            programs[int(pid)] = Program(unit=unit_of(cgroup, init), executable=executable.strip("\n"))
    return programs
