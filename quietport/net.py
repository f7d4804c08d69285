"""Which interface has which address, and what kind of interface it is."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from quietport.errors import HostProgramError

TAILNET_INTERFACE = "tailscale0"
TAILNET_RANGES = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
# Ports of a bridge that end in a container, a guest or nowhere, never on a wire.
_VIRTUAL_PORTS = frozenset({"veth", "tun", "dummy"})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Interfaces:
    """The interfaces of one host.

    `owners` maps an address as `str(ipaddress.ip_address(...))` writes it to the interfaces that have it
    (one link-local address may be on several); `kinds` maps an interface to loopback, tailnet, private
    (a bridge of this host without a physical port) or public.
    """

    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def parse_address(text: str) -> Address:
    """The address in `text`, a v4-mapped one as the IPv4 address it is. Raises ValueError."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def in_tailnet_ranges(address: Address) -> bool:
    """True for addresses of the ranges tailscale assigns. On a host the interface decides, not this."""
    return any(address in network for network in TAILNET_RANGES if network.version == address.version)


def parse_interfaces(addresses: str, routes: Iterable[str] = ()) -> Interfaces:
    """Read `ip -j -d addr` and, for each of `routes`, `ip -j route show default` (-4 and -6).

    Raises HostProgramError when the text is not what `ip` prints: an unknown host is never a quiet one.
    """
    links = _json_list(addresses, "ip -j -d addr")
    if not links:
        raise HostProgramError("ip -j -d addr named no interface, not even lo.")
    # In a container the uplink is a veth too: what carries a default route is never private.
    uplinks = {route.get("dev") for text in routes for route in _json_list(text or "[]", "ip -j route")}
    owners: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, str] = {}
    for link in links:
        name = str(link.get("ifname", ""))
        kinds[name] = _kind(link, links, uplinks)
        for entry in link.get("addr_info") or []:
            if isinstance(entry, dict) and "local" in entry:
                key = str(parse_address(str(entry["local"])))
                owners[key] = (*owners.get(key, ()), name)
    return Interfaces(owners=owners, kinds=kinds)


def _json_list(text: str, what: str) -> list[dict[str, Any]]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise HostProgramError(f"{what} did not print JSON.") from error
    if not isinstance(document, list):
        raise HostProgramError(f"{what} did not print a list.")
    # iproute2 prints empty objects for what a filter left out.
    return [entry for entry in document if isinstance(entry, dict) and entry]


def _kind(link: dict[str, Any], links: list[dict[str, Any]], uplinks: set[Any]) -> str:
    name = link.get("ifname")
    if link.get("link_type") == "loopback":
        return "loopback"
    if name == TAILNET_INTERFACE:
        return "tailnet"
    if _info_kind(link) != "bridge" or name in uplinks:
        return "public"
    ports = [port for port in links if port.get("master") == name]
    return "private" if all(_info_kind(port) in _VIRTUAL_PORTS for port in ports) else "public"


def _info_kind(link: dict[str, Any]) -> str:
    info = link.get("linkinfo")
    return str(info.get("info_kind", "")) if isinstance(info, dict) else ""
