"""What the operator's own tailscale knows of a host, when it runs."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control.secret import child_environment

STATUS_TIMEOUT_S = 5
_MAC_APP = Path("/Applications/Tailscale.app/Contents/MacOS/Tailscale")


@dataclass(frozen=True)
class Peer:
    """A node of the tailnet. `label` is its unique name there, as in `vps1-1`."""

    label: str
    addresses: tuple[str, ...]
    online: bool


def peers(hostname: str) -> list[Peer]:
    """Nodes that call themselves `hostname`, online ones first. Empty when tailscale does not run."""
    program = shutil.which("tailscale") or (str(_MAC_APP) if _MAC_APP.exists() else None)
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "status", "--json"],
            env=child_environment(),
            capture_output=True,
            timeout=STATUS_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_status(done.stdout, hostname)


def parse_status(text: bytes, hostname: str) -> list[Peer]:
    """The matching nodes in the output of `tailscale status --json`. Empty when it says nothing usable."""
    try:
        document = json.loads(text)
        if document["BackendState"] != "Running":
            return []
        found = [_peer(node) for node in (document.get("Peer") or {}).values() if _is_called(node, hostname)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(found, key=lambda peer: (not peer.online, peer.label))


def duplicates(name: str, found: list[Peer]) -> str:
    """The sentence about nodes of one name, or nothing. A reinstalled host leaves its old node behind."""
    if len(found) < 2:
        return ""
    listed = ", ".join(f"{peer.label} ({'online' if peer.online else 'offline'})" for peer in found)
    return (
        f"{name}: the tailnet has {len(found)} nodes of that name: {listed}. "
        "Remove the stale one at the control server."
    )


def _is_called(node: dict[str, Any], hostname: str) -> bool:
    return str(node["HostName"]).lower() == hostname.lower()


def _peer(node: dict[str, Any]) -> Peer:
    addresses = tuple(str(ipaddress.ip_address(address)) for address in node.get("TailscaleIPs") or ())
    label = str(node.get("DNSName") or node["HostName"]).split(".")[0]
    return Peer(
        label="".join(char for char in label if char.isprintable()),
        addresses=addresses,
        online=bool(node.get("Online")),
    )
