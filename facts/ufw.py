"""The firewall as ufw keeps it, and as the kernel runs it."""

from __future__ import annotations

from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, sections, split
from quietport.ufw_rules import DEFAULTS, from_config, kernel_policies, parse_added


def _nothing() -> dict[str, Any]:
    return {
        "installed": False,
        "active": False,
        "enabled": False,
        "defaults": dict.fromkeys(DEFAULTS),
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
        return {
            "installed": True,
            "active": any(line.strip() == "Status: active" for line in parts["status"].text.splitlines()),
            **from_config(parts["defaults"].text, parts["config"].text),
            "rules": parse_added(parts["added"].text),
            "policies": {family: kernel_policies(parts[family].text) for family in ("ipv4", "ipv6")},
        }
