"""The host's place on the tailnet."""

from __future__ import annotations

import json
import re
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, sections, split
from quietport.net import TAILNET_INTERFACE

_PREFERENCES = {
    "run_ssh": "RunSSH",
    "shields_up": "ShieldsUp",
    "accept_dns": "CorpDNS",
    "accept_routes": "RouteAll",
    "hostname": "Hostname",
    "advertise_tags": "AdvertiseTags",
}


def _nothing() -> dict[str, Any]:
    return {
        "installed": False,
        "version": None,
        "running": False,
        "backend_state": None,
        "addresses": [],
        "self_addresses": [],
        "hostname": None,
        "dns_name": None,
        "login_server": None,
        "key_expiry": None,
        "expired": False,
        "tags": [],
        "prefs": {},
        "auth_needed": False,
        "health": [],
        "peers_same_name": [],
    }


class Tailnet(FactBase[dict[str, Any]]):
    """What tailscaled says, and the addresses that are on its interface.

    {installed, version, running (tailscaled answers), backend_state (Running, NeedsLogin, NeedsMachineAuth,
    Stopped, ...; None when not running), addresses (really on tailscale0), self_addresses (what the control
    server assigned), hostname, dns_name (without the final dot), login_server, key_expiry (RFC 3339, None =
    never), expired, tags, prefs: {run_ssh, shields_up, accept_dns, accept_routes, hostname, advertise_tags},
    auth_needed (logged out), health: sentences of tailscaled, peers_same_name: DNS names of other nodes that
    want this host's name, as a reinstalled host leaves behind}.
    """

    @override
    def command(self) -> str:
        return sections(
            version="tailscale version",
            status="tailscale status --json --peers",
            prefs="tailscale debug prefs",
            addresses=f"ip -j addr show dev {TAILNET_INTERFACE}",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return _nothing()

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "version", "status", "prefs", "addresses")
        found = _nothing()
        found["addresses"] = _addresses(parts["addresses"].text)
        if parts["version"].code != 0:
            return found
        found |= {"installed": True, "version": parts["version"].text.partition("\n")[0].strip() or None}
        status = _object(parts["status"].text)
        if not status.get("BackendState"):
            return found
        return found | {"running": True} | _from_status(status) | _from_prefs(_object(parts["prefs"].text))


def _from_status(status: dict[str, Any]) -> dict[str, Any]:
    node = _dict(status.get("Self"))
    return {
        "backend_state": status["BackendState"],
        "self_addresses": [str(address) for address in node.get("TailscaleIPs") or []],
        "hostname": node.get("HostName") or None,
        "dns_name": str(node.get("DNSName") or "").rstrip(".") or None,
        "key_expiry": node.get("KeyExpiry") or None,
        "expired": bool(node.get("Expired", False)),
        "tags": sorted(str(tag) for tag in node.get("Tags") or []),
        "auth_needed": status["BackendState"] == "NeedsLogin",
        "health": [str(sentence) for sentence in status.get("Health") or []],
        "peers_same_name": _same_name(node, _dict(status.get("Peer"))),
    }


def _from_prefs(prefs: dict[str, Any]) -> dict[str, Any]:
    return {
        "login_server": prefs.get("ControlURL") or None,
        "prefs": {name: prefs.get(key) for name, key in _PREFERENCES.items()} if prefs else {},
    }


def _same_name(node: dict[str, Any], peers: dict[str, Any]) -> list[str]:
    """Peers whose name is this node's but for the number the control server appends to the later one."""
    own = _stem(node)
    names = [peer for peer in peers.values() if isinstance(peer, dict) and own and _stem(peer) == own]
    return sorted(str(peer.get("DNSName") or peer.get("HostName")).rstrip(".") for peer in names)


def _stem(node: dict[str, Any]) -> str:
    host = str(node.get("HostName") or "").lower()
    label = str(node.get("DNSName") or "").partition(".")[0].lower()
    # web-1 that calls itself web-1 is a name of its own; web-1 that calls itself web is a second web.
    return host if re.fullmatch(rf"{re.escape(host)}(-\d+)?", label) else label


def _addresses(text: str) -> list[str]:
    """Global addresses in what `ip -j addr show` printed; IPv6 ones that are not usable yet do not count."""
    try:
        links = json.loads(text or "[]")
    except ValueError:
        return []
    entries = [entry for link in links if isinstance(link, dict) for entry in link.get("addr_info") or []]
    return [
        str(entry["local"])
        for entry in entries
        if entry.get("scope") == "global" and "local" in entry and not entry.get("tentative")
    ]


def _object(text: str) -> dict[str, Any]:
    try:
        return _dict(json.loads(text or "{}"))
    except ValueError:
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
