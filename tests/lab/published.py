"""Containers that publish on every address, and all the ways a stranger may try to reach them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab import testimage
from lab.state import Target
from tests.lab.story import Hosts, Place

PORT = 8080
NETWORK = "e2e"
IMAGE = "e2e-httpd"
# --init: without, the container's first process ignores SIGTERM, and the host's shutdown waits 90 s for it.
_SERVE = f"--init --restart always {IMAGE} /bin/busybox httpd -f -p 80 -h /"


@dataclass(frozen=True)
class Published:
    """Where a published port could be reached from outside, if nothing stopped it."""

    target: Target
    places: tuple[Place, ...]

    @property
    def ports(self) -> tuple[Place, ...]:
        """The host's own addresses with the published port."""
        return tuple(place for place in self.places if place[1] != 80)


def publish(hosts: Hosts, target: Target) -> Published:
    """Start one container on Docker's own bridge and one on a network such as compose makes."""
    hosts.ssh(target.name, f"set -e; set -- {IMAGE}; {testimage.IN_A_TARGET}").ok()
    subnet6 = "fd00:e2e::/64"
    commands = [
        f"docker network inspect {NETWORK} >/dev/null 2>&1 ||"
        f" docker network create --ipv6 --subnet {subnet6} {NETWORK}",
        "docker rm -f e2e-bridge e2e-network >/dev/null 2>&1",
        f"docker run -d --name e2e-bridge -p 0.0.0.0:{PORT}:80 {_SERVE}",
        f"docker run -d --name e2e-network --network {NETWORK}"
        f" -p 0.0.0.0:{PORT + 1}:80 -p [::]:{PORT + 1}:80 {_SERVE}",
    ]
    hosts.ssh(target.name, "set -e; " + "; ".join(commands)).ok()
    inside = container_addresses(hosts, target.name)
    own = [(address, PORT + n) for address in (target.public_ip, target.public_ip6) for n in (0, 1)]
    return Published(target, (*own, *((address, 80) for address in inside)))


def container_addresses(hosts: Hosts, name: str) -> list[str]:
    """IPv4 and IPv6 addresses of all running containers of a host."""
    done = hosts.ssh(name, "docker ps -q | xargs -r docker inspect").ok()
    boxes = json.loads(done.out or "[]")
    networks = [network for box in boxes for network in box["NetworkSettings"]["Networks"].values()]
    families = ("IPAddress", "GlobalIPv6Address")
    return [network[key] for network in networks for key in families if network[key]]


# What any web server answers to, and patience for its answer. (busybox's own wget asks for names of
# services, which a static program cannot.)
REQUEST = "(printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 3)"


@contextmanager
def shield_lowered(hosts: Hosts, name: str, ports: str = f"{PORT}:{PORT + 1}") -> Iterator[None]:
    """The same host without our chain, and with these ports open: shows that the probe can see them."""
    both = "for t in iptables ip6tables; do {}; done"
    rule = f"INPUT -p tcp --dport {ports} -j ACCEPT"
    ours = "$t -F DOCKER-USER && $t -t mangle -F QUIETPORT-FORWARD && $t -t mangle -F QUIETPORT-INPUT"
    lower = both.format(f"{ours} && $t -I {rule}")
    hosts.ssh(name, f"set -e; {lower}").ok()
    try:
        yield
    finally:
        hosts.ssh(name, both.format(f"$t -D {rule}") + "; systemctl reload quietport-docker-user").ok()
