"""The public side of a host: which of its TCP ports somebody who is not on its tailnet can connect to.

It is looked at from this machine. A lab's target has its public side in the lab alone: there its neighbour
looks (lab/public.py). The scanner is control/scan.py in either case.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from control import reach, scan, state
from control.errors import QuietportError, ReachError
from control.pins import SSH_PORT
from control.settings import HostSettings, fleet, settings_for
from quietport.net import TAILNET_INTERFACE, in_tailnet_ranges, parse_address

if TYPE_CHECKING:
    from lab.state import Target

ALL_PORTS = "1-65535"
SCAN_TIMEOUT_S = 300.0
# The discard port (RFC 863): connecting a UDP socket sends nothing (udp(7)), it only chooses the way.
_ANY_PORT = 9

PublicState = Literal["closed", "open", "unknown"]


@dataclass(frozen=True)
class At:
    """What one address showed: its open TCP ports, and the address that asked.

    `problem`: why it could not be asked, as part of a sentence; then nothing is known of it.
    """

    open: tuple[int, ...] = ()
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Seen:
    """What was seen, by address, and where from."""

    where: str
    at: Mapping[str, At]

    @property
    def open(self) -> dict[str, list[int]]:
        """The open ports of every address that could be asked."""
        return {address: list(one.open) for address, one in self.at.items() if not one.problem}


@dataclass(frozen=True)
class PublicSide:
    """What may be said of a host's public side.

    `open` are the ports that may not be, such as `tcp 203.0.113.7:22`; `asked` the addresses that were asked.
    `reason` has what is open as declared and what could not be asked.
    """

    state: PublicState
    open: tuple[str, ...] = ()
    reason: str = ""
    asked: tuple[str, ...] = ()


def neighbour(name: str) -> Target | None:
    """The lab's target of that name, when the hosts file is a lab's; None for a live host."""
    if not state.is_lab_file(fleet().file):
        return None
    # Late: an operator's own hosts need nothing of the lab.
    from lab.process import LabError
    from lab.state import Run

    directory = fleet().file.resolve().parent
    try:
        return Run(directory.name, root=directory.parent).target(name)
    except LabError:
        return None


def addresses(name: str, links: Iterable[Any] = ()) -> list[str]:
    """Addresses a stranger would try: the declared one, and the host's own global ones.

    `links` is what `ip -j addr show scope global` says on the host, empty when it was not asked. A declared
    address behind a proxy of ~/.ssh/config is left out: it means something at the other end of it.
    Raises QuietportError for a name that cannot be resolved, or links that are not understood.
    """
    route = reach.public_route(name)
    found = {} if route.proxy else dict.fromkeys(_resolved(name, route.address))
    return list(found | dict.fromkeys(own_addresses(name, links)))


def own_addresses(name: str, links: Iterable[Any]) -> list[str]:
    """The global addresses in what `ip` says on the host. Raises QuietportError when it is not understood."""
    try:
        local = [
            parse_address(entry["local"])
            for link in links
            if link.get("ifname") != TAILNET_INTERFACE
            for entry in link.get("addr_info", [])
            if "local" in entry
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise QuietportError(f"{name}: what `ip` says of its addresses is not understood.") from error
    # Private ones are reachable for neighbours only, and not from here.
    return [str(address) for address in local if address.is_global]


def look(
    name: str, targets: Sequence[str], *, ports: str = ALL_PORTS, timeout: float = SCAN_TIMEOUT_S
) -> Seen:
    """Connect to these TCP ports (`22,80,8000-8100`) of the host called `name`, from outside of it.

    `targets` are its addresses; a lab's target has addresses of its own. `timeout` is in seconds and for each
    address. Raises QuietportError when the probe itself fails.
    """
    target = neighbour(name)
    if target is not None:
        return _by_neighbour(target, ports, timeout)
    known = {*state.load(name).tailnet_addresses, settings_for(name).tailnet_address}
    return _from_here(targets, known=known, ports=ports, timeout=timeout)


def judge(settings: HostSettings, seen: Seen) -> PublicSide:
    """What was seen, against what hosts.toml says may be open."""
    wrong: list[str] = []
    notes: list[str] = []
    for address, one in seen.at.items():
        if one.problem:
            notes.append(f"{address} was not asked: {one.problem}.")
        for port in one.open:
            excuse = _excuse(settings, address, port, one.source)
            where = f"tcp {f'[{address}]' if ':' in address else address}:{port}"
            if excuse:
                notes.append(f"{where} is open: {excuse}.")
            else:
                wrong.append(where)
    asked = tuple(seen.open)
    if not seen.at:
        notes.append("No public address of it is known.")
    state: PublicState = "open" if wrong else "closed" if asked and len(asked) == len(seen.at) else "unknown"
    return PublicSide(state, tuple(wrong), " ".join(notes), asked)


def _excuse(settings: HostSettings, address: str, port: int, source: str) -> str:
    """Why the port may be open to who asked from `source`; "" when it may not."""
    for one in settings.public_listeners:
        if (one.protocol, one.port) == ("tcp", port):
            return f"declared, {one.reason.rstrip('.')}"
    if not settings.break_glass_cidrs or port != SSH_PORT:
        return ""
    asking = parse_address(source)
    networks = [ipaddress.ip_network(text) for text in settings.break_glass_cidrs]
    if any(asking.version == network.version and asking in network for network in networks):
        return f"break_glass_cidrs lists {source}"
    # A private address that asks a global one is seen there as another.
    if parse_address(address).is_global and not asking.is_global:
        return "break_glass_cidrs may list this network; what address it has in public is not known here"
    return ""


def _resolved(name: str, address: str) -> list[str]:
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        sentence = f"{name}: cannot resolve {address}: {reason}."
        raise ReachError(sentence, hint="Correct its address.") from error
    return [str(parse_address(str(info[4][0]))) for info in found]


def _by_neighbour(target: Target, ports: str, timeout: float) -> Seen:
    from lab import public
    from lab.process import LabError

    sources = {target.public_ip: target.peer_ip, target.public_ip6: target.peer_ip6}
    both = list(sources)
    # An emulated network card takes no more than one scan.
    parts = [both] if target.kind == "vm" else [[address] for address in both]
    try:
        with ThreadPoolExecutor() as pool:
            scans = list(
                pool.map(lambda part: public.scan(target, part, ports=ports, timeout=timeout), parts)
            )
    except LabError as error:
        raise QuietportError(f"{target.name}: {error.what}", hint=error.hint) from error
    found = {address: seen for one in scans for address, seen in one.items()}
    return Seen(
        "the lab's public side",
        {address: At(open=seen.open, source=sources[address]) for address, seen in found.items()},
    )


def _from_here(targets: Sequence[str], *, known: set[str | None], ports: str, timeout: float) -> Seen:
    """From the machine this runs on, which must be outside of the host and go there past the tailnet."""
    at = {address: _way(address, known) for address in targets}
    asked = [address for address, one in at.items() if not one.problem]
    if asked:
        for address, seen in _scanned(asked, ports, timeout).items():
            at[address] = _judged(seen, at[address].source)
    return Seen("this machine", at)


def _way(address: str, known: set[str | None]) -> At:
    """The address this machine would ask from, or why it cannot ask."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, _ANY_PORT))
            source = str(probe.getsockname()[0]).partition("%")[0]
    except OSError as error:
        return At(problem=f"this machine has no way there ({error.strerror})")
    if source == address:
        return At(problem="it is this machine's own address")
    if address in known or any(in_tailnet_ranges(parse_address(text)) for text in (address, source)):
        return At(problem="the way there leads over the tailnet")
    return At(source=source)


def _scanned(asked: Sequence[str], ports: str, timeout: float) -> dict[str, dict[str, Any]]:
    argv = [sys.executable, "-I", str(Path(scan.__file__)), "ports", *asked, "--ports", ports]
    where = f"the scan of {', '.join(asked)}"
    patience = timeout * len(asked)
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience, check=True
        )
        return dict(json.loads(done.stdout)["addresses"])
    except subprocess.TimeoutExpired as error:
        raise QuietportError(f"{where} took longer than {patience:.0f} s.") from error
    except subprocess.CalledProcessError as error:
        last = str(error.stderr).strip().rpartition("\n")[2] or f"exit code {error.returncode}"
        raise QuietportError(f"{where} failed: {last}.") from error
    except OSError as error:
        raise QuietportError(f"{where} could not begin: {error.strerror}.") from error


def _judged(seen: Mapping[str, Any], source: str) -> At:
    # Whoever turned all of them away may turn away this machine alone.
    if seen["unreachable"] and not (seen["open"] or seen["refused"] or seen["silent"]):
        return At(problem="a router on the way turned everything away")
    return At(open=tuple(seen["open"]), source=source)
