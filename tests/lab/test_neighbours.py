"""Labs side by side: each takes down what it made, and nothing else."""

from __future__ import annotations

from tests.lab.story import Lab, reachable
from tests.lab.tale import Tale

# What two labs share on one machine (Docker, subnets, firewall) is the container's part of it.
TOLD_BY = ("fleet",)


def test_a_second_lab_comes_and_goes_without_a_trace(tale: Tale) -> None:
    tale.chapters["spec again"]
    other = Lab.new("neighbour")
    try:
        name = other.up(kind="container", distro="trixie")
        theirs, ours = other.target(name), tale.lab.target(tale.names[0])
        assert {theirs.public_ip, theirs.bridge, theirs.namespace}.isdisjoint(
            {ours.public_ip, ours.bridge, ours.namespace}
        )
        assert reachable(theirs, [(theirs.public_ip, 22)])
    finally:
        other.down().ok()
    assert not other.run.exists
    for name in tale.names:
        tale.hosts.ssh(name, "true").ok()
