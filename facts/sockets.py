"""Listening sockets, with who can reach them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.docker import READ_PUBLISHED
from facts.packetfilter import READ4, READ6, by_family
from facts.shell import Section, one_host_at_most, quoted, sections, split
from quietport import containers, serve
from quietport.admission import admission_problem
from quietport.errors import HostProgramError
from quietport.hostfile import HOST_JSON, PUBLIC_LISTENERS, PUBLIC_NETWORKS, PUBLIC_SSHD
from quietport.net import parse_interfaces
from quietport.ports import Evidence, PublicSshd, judge_host, parse_declared
from quietport.processes import SHOW_SOCKET_UNITS, Program, parse_socket_units, shell_is_running, unit_of
from quietport.ss import parse_ss, parse_vsock
from quietport.sshd import PORT
from quietport.survey import SS, SS_VSOCK

_SS = quoted(SS)
# The executable comes last and on one line: its path is chosen by whoever runs it.
_PROGRAMS = (
    f"cat /proc/1/cgroup; {_SS} | grep -o ',pid=[0-9]*,' | tr -dc '0-9\\n' | sort -un | "
    "while read -r pid; do "
    'printf "pid %s\\n" "$pid"; cat "/proc/$pid/cgroup"; '
    'printf "exe %s\\n" "$(readlink -n "/proc/$pid/exe" | tr "\\n" "?")"; done; true'
)
# The firewall is asked about where sshd may listen on every address (docs/break-glass.md) and nowhere else.
_IF_DECLARED = f"grep -q '\"{PUBLIC_SSHD}\":.true' {HOST_JSON}"
_SOCKETS = {
    "sockets": _SS,
    "addresses": "ip -j -d addr",
    "routes4": "ip -j -4 route show default",
    "routes6": "ip -j -6 route show default",
    "programs": _PROGRAMS,
    "units": quoted(SHOW_SOCKET_UNITS),
    "declared": f"cat {HOST_JSON}",
    "filter4": f"{_IF_DECLARED} && {READ4}",
    "filter6": f"{_IF_DECLARED} && {{ {READ6}; }}",
}
_BEYOND_SOCKETS = {
    "vsock": quoted(SS_VSOCK),
    "published": READ_PUBLISHED,
    # No tailscaled serves nothing; one that does not answer might.
    "served": f"! {shell_is_running('tailscaled')} || {quoted(serve.COMMAND)}",
}


class ListeningSockets(FactBase[list[dict[str, Any]]]):
    """Every TCP and UDP socket that listens, IPv4 and IPv6.

    A list of {protocol, address, port, process, pid, unit, exposure, verdict, hint}; exposure is loopback,
    tailnet, private (a bridge of this host) or public, verdict is ok, allowed or violation.
    """

    @override
    def command(self) -> str:
        return sections(**_SOCKETS)

    @override
    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[dict[str, Any]]:
        return [judged.to_json() for judged in judge_host(_evidence(split(output, *_SOCKETS)))]


class Reachable(FactBase[list[dict[str, Any]]]):
    """Everything that can be reached, as `quietport ports` on the host has it.

    The sockets of ListeningSockets, and what answers without one: ports that Docker forwards by packet filter
    rules alone, what tailscaled serves to the tailnet and by Funnel to the Internet, sshd on vsock. The host
    fails when Docker or tailscaled runs and does not say.
    """

    @override
    def command(self) -> str:
        return sections(**_SOCKETS, **_BEYOND_SOCKETS)

    @override
    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[dict[str, Any]]:
        parts = split(output, *_SOCKETS, *_BEYOND_SOCKETS)
        for name, sentence in (("published", containers.UNKNOWN_PORTS), ("served", serve.UNKNOWN_CONFIG)):
            if parts[name].code != 0:
                raise FactProcessError(sentence)
        evidence = replace(
            _evidence(parts),
            vsock=parse_vsock(parts["vsock"].text),
            published=containers.parse_published(parts["published"].text),
            served=serve.parse_serve(parts["served"].text.strip() or "null"),
        )
        return [judged.to_json() for judged in judge_host(evidence)]


def _evidence(parts: Mapping[str, Section]) -> Evidence:
    """What the sockets' sections say. Raises FactProcessError when a part cannot be read."""
    if parts["sockets"].code != 0 or parts["addresses"].code != 0:
        raise FactProcessError("ss or ip (package iproute2) is missing or failed on the host")
    routes = (parts["routes4"].text, parts["routes6"].text)
    host_json = _host_json(parts["declared"].text)
    filters = by_family(parts["filter4"], parts["filter6"])
    try:
        return Evidence(
            listeners=parse_ss(parts["sockets"].text),
            interfaces=parse_interfaces(parts["addresses"].text, routes),
            programs=parse_programs(parts["programs"].text),
            public_sshd=public_sshd(host_json, filters),
            declared=parse_declared(host_json.get(PUBLIC_LISTENERS)),
            socket_units=parse_socket_units(parts["units"].text),
        )
    except HostProgramError as error:
        raise FactProcessError(str(error)) from error


def _host_json(text: str) -> dict[str, Any]:
    """What the converge declared; {} where it has not been, or where the file is not understood."""
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def public_sshd(host_json: Mapping[str, Any], filters: dict[int, str]) -> PublicSshd | None:
    """What is to be said of an sshd on every address; None where host.json allows none."""
    networks = host_json.get(PUBLIC_NETWORKS)
    if host_json.get(PUBLIC_SSHD) is not True or not isinstance(networks, list):
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
