"""The firewall as ufw keeps it, and as the kernel runs it."""

from __future__ import annotations

from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, sections, split
from quietport.ufw_rules import (
    DEFAULTS,
    RULES_FILES,
    from_config,
    kernel_policies,
    lost_lines,
    parse_added,
)

# Policies, and the chains that ufw's own rules are in.
_CHAINS = "'^(-P|-A ufw6?-user-)'"
_PARTS = ("installed", "added", "status", "defaults", "config", "ipv4", "ipv6", "rules4", "rules6")


def _nothing() -> dict[str, Any]:
    return {
        "installed": False,
        "active": False,
        "enabled": False,
        "defaults": dict.fromkeys(DEFAULTS),
        "ipv6": False,
        "rules": [],
        "policies": {},
        "lost": {},
    }


def _lost(kept: str, listing: str) -> list[str]:
    try:
        return list(dict.fromkeys(rule for rule, _ in lost_lines(kept, listing)))
    except ValueError:
        # What `ufw show added` says is compared all the same.
        return []


class Ufw(FactBase[dict[str, Any]]):
    """State, defaults and rules of ufw.

    {installed, active (its chains are in the kernel), enabled (at boot), defaults: {incoming, outgoing,
    routed: deny|reject|allow|None}, ipv6, rules: as `ufw show added` lists them, without the leading
    "ufw ", policies: {"ipv4"|"ipv6": {"INPUT": "DROP", ...}} of the kernel's built-in chains, lost: {"ipv4"|
    "ipv6": rules of ours that an active ufw has in its file and the kernel has not}}.
    """

    @override
    def command(self) -> str:
        return sections(
            installed="command -v ufw",
            added="ufw show added",
            status="ufw status",
            defaults="cat /etc/default/ufw",
            config="cat /etc/ufw/ufw.conf",
            ipv4=f"iptables -w 5 -S | grep -E {_CHAINS}",
            ipv6=f"ip6tables -w 5 -S | grep -E {_CHAINS}",
            rules4=f"cat {RULES_FILES['ipv4']}",
            rules6=f"cat {RULES_FILES['ipv6']}",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return _nothing()

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, *_PARTS)
        if parts["installed"].code != 0:
            return _nothing()
        active = any(line.strip() == "Status: active" for line in parts["status"].text.splitlines())
        kernel = {family: parts[family].text for family in ("ipv4", "ipv6")}
        files = {"ipv4": parts["rules4"].text, "ipv6": parts["rules6"].text}
        return {
            "installed": True,
            "active": active,
            **from_config(parts["defaults"].text, parts["config"].text),
            "rules": parse_added(parts["added"].text),
            "policies": {family: kernel_policies(text) for family, text in kernel.items()},
            # A family that the host has not has no policies either.
            "lost": {
                family: _lost(files[family], text)
                for family, text in kernel.items()
                if active and kernel_policies(text)
            },
        }
