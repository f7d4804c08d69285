"""The public side: nothing listens for it, and nothing answers it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from control import outside, scan
from control.outside import Seen
from control.settings import HostSettings
from facts.docker import PublishedPorts
from lab import public
from tests.spec.reading import Reading


def test_nothing_listens_for_the_public(reading: Reading) -> None:
    """The policy's verdict, with its exceptions: tailscaled, a DHCP client's UDP, what hosts.toml declares.

    A port that a container publishes on every address is a violation too. The chain shields it, which is
    judged by probing, below.
    """
    found = reading.reachable()
    assert len(found) > 2, "a host on which nothing at all listens was not read right"
    shielded = {port["host_port"] for port in reading.fact(PublishedPorts)}
    wrong = [one for one in found if one["verdict"] == "violation"]
    open_ = [one for one in wrong if (one["unit"], one["port"] in shielded) != ("docker.service", True)]
    assert not open_, "\n".join(map(told, open_))


def told(one: dict[str, Any]) -> str:
    """A violation as a sentence, with the way to mend it."""
    whose = ", ".join(filter(None, (one["process"], one["unit"]))) or "no process"
    return f"{one['protocol']} {one['address']} port {one['port']} ({whose}) is public: {one['hint']}"


def test_a_full_scan_finds_nothing_open(
    reading: Reading, settings: HostSettings, full_scan: Future[Seen], capsys: pytest.CaptureFixture[str]
) -> None:
    """All 65535 TCP ports of every public address, IPv4 and IPv6, but for those that hosts.toml declares."""
    seen = full_scan.result()
    with capsys.disabled():
        print(f" [{reading.name}: {', '.join(seen.open)} probed from {seen.where}]", end="")
    judged = outside.judge(settings, seen)
    assert judged.asked, judged.reason
    assert judged.open == ()


def test_the_scan_can_see_an_open_port(reading: Reading) -> None:
    """Positive control: the same scanner, on a port that is open for certain."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        argv = [sys.executable, "-I", str(Path(scan.__file__)), "ports", "127.0.0.1", "--ports", str(port)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["addresses"]["127.0.0.1"]["open"] == [port]


def test_no_container_is_reachable(reading: Reading) -> None:
    """Published ports at the host's addresses; containers at their own, for a neighbour that routes there."""
    # The fact is [] while the engine is away; this fails when containers run without it.
    reading.reachable()
    target = outside.neighbour(reading.name)
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
    at_the_host = public.scan(target, ports=ports_of(published, "host_port"))
    assert {address: ports.open for address, ports in {**inside, **at_the_host}.items() if ports.open} == {}


def ports_of(published: list[dict[str, int]], key: str) -> str:
    """Port numbers as the scanner takes them."""
    return ",".join(str(port) for port in sorted({one[key] for one in published}))
