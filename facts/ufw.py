"""The firewall as ufw keeps it, and as the kernel runs it."""

from __future__ import annotations

import re
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, sections, split

_POLICIES = {"DROP": "deny", "REJECT": "reject", "ACCEPT": "allow"}
_DEFAULTS = {"incoming": "INPUT", "outgoing": "OUTPUT", "routed": "FORWARD"}


def _nothing() -> dict[str, Any]:
    return {
        "installed": False,
        "active": False,
        "enabled": False,
        "defaults": dict.fromkeys(_DEFAULTS),
        "ipv6": False,
        "rules": [],
        "policies": {},
    }


class Ufw(FactBase[dict[str, Any]]):
    """State, defaults and rules of ufw.

    {installed, active (its chains are in the kernel), enabled (at boot), defaults: {incoming, outgoing,
    routed: deny|reject|allow|None}, ipv6, rules: as `ufw show added` lists them, without the leading
    "ufw ", policies: {"ipv4"|"ipv6": {"INPUT": "DROP", ...}} of the kernel's built-in chains}.
    """

    @override
    def command(self) -> str:
        return sections(
            installed="command -v ufw",
            added="ufw show added",
            status="ufw status",
            defaults="cat /etc/default/ufw",
            config="cat /etc/ufw/ufw.conf",
            ipv4="iptables -w 5 -S | grep '^-P'",
            ipv6="ip6tables -w 5 -S | grep '^-P'",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return _nothing()

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "installed", "added", "status", "defaults", "config", "ipv4", "ipv6")
        if parts["installed"].code != 0:
            return _nothing()
        defaults = _assignments(parts["defaults"].text)
        return {
            "installed": True,
            "active": any(line.strip() == "Status: active" for line in parts["status"].text.splitlines()),
            "enabled": _assignments(parts["config"].text).get("ENABLED", "").lower() == "yes",
            "defaults": {
                name: _POLICIES.get(defaults.get(f"DEFAULT_{chain}_POLICY", "").upper())
                for name, chain in _DEFAULTS.items()
            },
            "ipv6": defaults.get("IPV6", "").lower() == "yes",
            "rules": [
                line.removeprefix("ufw ").strip()
                for line in parts["added"].text.splitlines()
                if line.startswith("ufw ")
            ],
            "policies": {
                family: dict(re.findall(r"^-P (\S+) (\S+)$", parts[family].text, re.MULTILINE))
                for family in ("ipv4", "ipv6")
            },
        }


def _assignments(text: str) -> dict[str, str]:
    """NAME=value lines of a shell-like file; the last one wins, as in the shell."""
    found = re.findall(r"^[ \t]*([A-Z0-9_]+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip().strip("\"'") for name, value in found}
