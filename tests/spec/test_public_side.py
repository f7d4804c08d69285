"""The public side: nothing listens for it, and nothing answers it."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from control.settings import fleet
from facts.docker import PublishedPorts
from facts.sockets import ListeningSockets
from lab import public, scan
from lab.process import LabError
from lab.state import Run, Target
from tests.spec.reading import Reading

SCAN_TIMEOUT_S = 300


def lab_target(name: str) -> Target | None:
    """The lab's target of that name, when the hosts file is a lab's; None for a live host."""
    directory = fleet().file.absolute().parent
    if not (directory / "lab.json").is_file():
        return None
    try:
        return Run(directory.name, root=directory.parent).target(name)
    except LabError:
        return None


def public_addresses(reading: Reading) -> list[str]:
    """Addresses a stranger would try: the declared one, and the host's own global ones."""
    declared = socket.getaddrinfo(reading.settings.address, None, type=socket.SOCK_STREAM)
    found = {str(info[4][0]) for info in declared}
    links = reading.json("ip -j addr show scope global")
    for link in links:
        for entry in link["addr_info"]:
            address = ipaddress.ip_address(entry["local"])
            # Private ones are reachable for neighbours only, and not from here.
            if address.is_global and link["ifname"] != "tailscale0":
                found.add(str(address))
    return sorted(found)


def seen_from_here(addresses: list[str]) -> dict[str, list[int]]:
    """Open ports, from the machine this runs on: by construction not inside the host."""
    argv = [sys.executable, "-I", str(Path(scan.__file__)), "ports", *addresses]
    patience = SCAN_TIMEOUT_S * len(addresses)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=patience, check=True)
    return {address: seen["open"] for address, seen in json.loads(done.stdout)["addresses"].items()}


def test_nothing_listens_for_the_public(reading: Reading) -> None:
    """The daily report's policy, which excepts tailscaled and a DHCP client's UDP.

    A port that a container publishes on every address has a listener too. The chain shields it, which is
    judged by probing, below.
    """
    sockets = reading.fact(ListeningSockets)
    assert len(sockets) > 2, "a host on which nothing at all listens was not read right"
    shielded = {port["host_port"] for port in reading.fact(PublishedPorts)}
    wrong = [socket for socket in sockets if socket["verdict"] == "violation"]
    assert [one for one in wrong if (one["process"], one["port"] in shielded) != ("docker-proxy", True)] == []
    over_tcp = [one for one in sockets if one["exposure"] == "public" and one["protocol"] == "tcp"]
    assert {one["process"] for one in over_tcp} <= {"docker-proxy"}


def test_a_full_scan_finds_nothing_open(reading: Reading, capsys: pytest.CaptureFixture[str]) -> None:
    """All 65535 TCP ports of every public address, IPv4 and IPv6."""
    target = lab_target(reading.name)
    if target is not None:
        where = "the lab's public side"
        seen = {address: list(ports.open) for address, ports in public.scan(target).items()}
    else:
        where = "this machine"
        seen = seen_from_here(public_addresses(reading))
    with capsys.disabled():
        print(f" [{reading.name}: {', '.join(seen)} probed from {where}]", end="")
    assert seen
    assert {address: ports for address, ports in seen.items() if ports} == {}


def test_the_scan_can_see_an_open_port(reading: Reading) -> None:
    """Positive control: the same scanner, on a port that is open for certain."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        argv = [sys.executable, "-I", str(Path(scan.__file__)), "ports", "127.0.0.1", "--ports", str(port)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["addresses"]["127.0.0.1"]["open"] == [port]


def test_no_container_is_reachable(reading: Reading) -> None:
    """Published ports at the host's addresses; containers at their own, for a neighbour that routes there."""
    target = lab_target(reading.name)
    published = reading.fact(PublishedPorts)
    if not published:
        pytest.skip("no container publishes a port on this host")
    if target is None:
        pytest.skip("only a lab has a neighbour to probe containers from")
    inspect = "docker ps -q | xargs -r docker inspect -f '{{json .NetworkSettings.Networks}}'"
    networks = [network for line in reading.lines(inspect) for network in json.loads(line).values()]
    families = ("IPAddress", "GlobalIPv6Address")
    own = [network[key] for network in networks for key in families if network.get(key)]
    assert own
    inside = public.scan(target, own, ports=ports_of(published, "container_port"))
    outside = public.scan(target, ports=ports_of(published, "host_port"))
    assert {address: ports.open for address, ports in {**inside, **outside}.items() if ports.open} == {}


def ports_of(published: list[dict[str, int]], key: str) -> str:
    """Port numbers as the scanner takes them."""
    return ",".join(str(port) for port in sorted({one[key] for one in published}))
