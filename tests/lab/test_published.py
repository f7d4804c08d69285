"""Docker's published ports: closed to the public, before, during and after whatever restarts."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

import pytest

from lab.tailnet import Tailnet
from tests.lab.published import PORT, REQUEST, Published, container_addresses, shield_lowered
from tests.lab.story import reachable, run, watched
from tests.lab.tale import Tale

DISTURBANCES = (
    "systemctl restart docker",
    "systemctl restart ufw",
    "systemctl restart quietport-docker-user",
    "systemctl stop docker docker.socket && sleep 2 && systemctl start docker",
)


@pytest.fixture
def published(tale: Tale) -> dict[str, Published]:
    """What each host of the story publishes, after everything else of the story."""
    tale.chapters["spec again"]
    return tale.published


def test_nothing_published_is_reachable(published: dict[str, Published]) -> None:
    for one in published.values():
        assert reachable(one.target, one.places) == set()


def test_the_probe_would_have_seen_it(tale: Tale, published: dict[str, Published]) -> None:
    """Positive control: without our chain the same probe reaches ports and containers."""
    for name, one in published.items():
        with shield_lowered(tale.hosts, name):
            seen = reachable(one.target, one.places)
            assert {place for place in one.ports if "." in place[0]} <= seen
            assert {place for place in seen if ":" in place[0]}
            assert {place for place in seen if place[1] == 80}
            with watched(one.target, one.ports) as watch:
                time.sleep(3)
            assert watch.opened
        assert reachable(one.target, one.places) == set()


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_it_stays_closed_throughout(tale: Tale, published: dict[str, Published], disturbance: str) -> None:
    for name, one in published.items():
        with watched(one.target, one.places) as seen:
            tale.hosts.ssh(name, f"{disturbance} && sleep 3").ok()
            tale.hosts.ssh(name, "docker ps -q --filter name=e2e").ok()
        assert seen.opened == []
        assert seen.tries > 3 * len(one.places)


def test_containers_still_reach_out(tale: Tale, published: dict[str, Published]) -> None:
    """The chain drops what is new from outside, not the answers to what containers ask."""
    for name, one in published.items():
        # The repository that the lab serves: plain HTTP, and outside of the host.
        sources = "/etc/apt/sources.list.d/tailscale.sources"
        url = urlsplit(tale.hosts.ssh(name, f"sed -n 's/^URIs: *//p' {sources}").ok().out.strip())
        for container in ("e2e-bridge", "e2e-network"):
            ask = f"docker exec -i {container} /bin/busybox nc -w 20 {url.hostname} {url.port or 80}"
            assert "HTTP/1" in tale.hosts.ssh(name, f"{REQUEST} | {ask}").ok().out
        assert container_addresses(tale.hosts, name)
        assert one.places


def test_the_tailnet_reaches_what_is_published(tale: Tale, published: dict[str, Published]) -> None:
    """Closed to the public only: the tailnet may come in, that is what the port is published for."""
    tailnet = Tailnet.attach(tale.lab.run.directory)
    for name in published:
        carry = tailnet.proxy_command.replace("%h", tailnet.node(name).addresses[0])
        for port in (PORT, PORT + 1):
            answer = run(["sh", "-c", f"{REQUEST} | {carry.replace('%p', str(port))}"])
            assert "HTTP/1" in answer.out, answer.err
