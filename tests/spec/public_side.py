"""A scan of all ports of a host from outside of it, which goes on while the other specs are read."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from control.settings import fleet
from lab import public, scan
from lab.process import LabError
from lab.state import Run, Target
from tests.spec.reading import Reading

SCAN_TIMEOUT_S = 300
# Its threads only wait for the scanner, which is a program of its own.
_POOL = ThreadPoolExecutor(max_workers=8, thread_name_prefix="scan")


@dataclass(frozen=True)
class Seen:
    """Open TCP ports by address, and where they were seen from."""

    where: str
    open: dict[str, list[int]]


def begin(reading: Reading) -> Future[Seen]:
    """Begin to scan all TCP ports of every public address of the host."""
    target = lab_target(reading.name)
    if target is not None:
        return _POOL.submit(_seen_by_neighbour, target)
    return _POOL.submit(_seen_from_here, public_addresses(reading))


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


def _seen_by_neighbour(target: Target) -> Seen:
    both = [target.public_ip, target.public_ip6]
    # An emulated network card takes no more than one scan.
    parts = [both] if target.kind == "vm" else [[address] for address in both]
    with ThreadPoolExecutor() as pool:
        scans = list(pool.map(lambda part: public.scan(target, part, timeout=SCAN_TIMEOUT_S), parts))
    seen = {address: list(ports.open) for found in scans for address, ports in found.items()}
    return Seen("the lab's public side", seen)


def _seen_from_here(addresses: Sequence[str]) -> Seen:
    """From the machine this runs on: by construction not inside the host."""
    argv = [sys.executable, "-I", str(Path(scan.__file__)), "ports", *addresses]
    patience = SCAN_TIMEOUT_S * len(addresses)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=patience, check=True)
    found = json.loads(done.stdout)["addresses"]
    return Seen("this machine", {address: seen["open"] for address, seen in found.items()})
