"""The public side of a target: a neighbour on its public network that is not on the tailnet.

It is a network namespace with one leg on the target's bridge. Its default route is the target itself, so
that it reaches for whatever is behind: container addresses, and the tailnet address over the public wire.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control import scan as scanner
from lab.process import LabError, run, succeeds
from lab.state import Run, Target

ALL_PORTS = "1-65535"
# What a scan of a container may have under way: its cable has no pace of its own.
CONTAINER_CONCURRENCY = 20000


@dataclass(frozen=True)
class Ports:
    """What the TCP ports of one address said: the open ones, and how many of the others said what."""

    open: tuple[int, ...]
    refused: int
    unreachable: int
    silent: int


def namespace_name(run_: Run, name: str) -> str:
    """The namespace of a target's public side."""
    return f"qpp-{run_.tag}-{name}"


def _leg(target: Target) -> str:
    """The end of the cable on the bridge; an interface's name has 15 characters at most."""
    return f"qpp{hashlib.sha256(target.namespace.encode()).hexdigest()[:10]}"


def create(target: Target) -> None:
    """Make the public side of a target, or make it whole. The target's bridge must be there."""
    namespace, leg = target.namespace, _leg(target)
    if not exists(target):
        run(["ip", "netns", "add", namespace])
    inside = ["ip", "-netns", namespace]
    if not succeeds([*inside, "link", "show", "dev", "eth0"]):
        run(["ip", "link", "delete", leg], check=False)
        run(["ip", "link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", namespace])
    run(["ip", "link", "set", leg, "master", target.bridge, "up"])
    run([*inside, "link", "set", "lo", "up"])
    run([*inside, "link", "set", "eth0", "up"])
    run([*inside, "address", "replace", f"{target.peer_ip}/24", "dev", "eth0"])
    run([*inside, "-6", "address", "replace", f"{target.peer_ip6}/64", "dev", "eth0", "nodad"])
    run([*inside, "neigh", "flush", "dev", "eth0"], check=False)
    run([*inside, "route", "replace", "default", "via", target.public_ip])
    run([*inside, "-6", "route", "replace", "default", "via", target.public_ip6])


def remove(target: Target) -> None:
    """Take the public side away; its cable goes with it."""
    if exists(target):
        run(["ip", "netns", "delete", target.namespace])
    run(["ip", "link", "delete", _leg(target)], check=False)


def exists(target: Target) -> bool:
    """Whether the namespace is there."""
    return (Path("/run/netns") / target.namespace).exists()


def argv(target: Target, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on the public side."""
    return ["ip", "netns", "exec", target.namespace, *command]


def scan(
    target: Target, addresses: Sequence[str] = (), *, ports: str = ALL_PORTS, timeout: float = 180
) -> dict[str, Ports]:
    """Open TCP ports of the target's public addresses, or of `addresses`, seen from the public side.

    `timeout` is in seconds and for each address. Raises LabError when the probe itself fails.
    """
    wanted = list(addresses) or [target.public_ip, target.public_ip6]
    pace = ["--concurrency", str(CONTAINER_CONCURRENCY)] if target.kind == "container" else []
    answer = _probe(target, ["ports", *wanted, "--ports", ports, *pace], timeout * len(wanted))
    return {
        address: Ports(
            open=tuple(seen["open"]),
            refused=seen["refused"],
            unreachable=seen["unreachable"],
            silent=seen["silent"],
        )
        for address, seen in answer["addresses"].items()
    }


def connect(target: Target, address: str, port: int, *, timeout: float = 3) -> str:
    """`open`, `refused`, `unreachable` or `silent`: what a port said within `timeout` seconds."""
    answer = _probe(target, ["connect", address, str(port), "--timeout", str(timeout)], timeout + 20)
    return str(answer["answer"])


def http_get(target: Target, url: str, *, timeout: float = 5) -> tuple[int, str]:
    """HTTP status (0 when nothing answers) and body, asked from the public side."""
    answer = _probe(target, ["http", url, "--timeout", str(timeout)], timeout + 20)
    return int(answer["status"]), str(answer["body"])


def _probe(target: Target, arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    if not exists(target):
        raise LabError(
            f"{target.name} has no public side here.",
            hint="`python -m lab up` with the same target mends it.",
        )
    program = [sys.executable, "-I", scanner.__file__, *arguments]
    done = run(argv(target, program), timeout=timeout)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
