"""Firewall: everything in is denied, but the tailnet and the port WireGuard needs."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import ufw


@deploy("firewall")
def firewall(settings: HostSettings) -> None:
    """ufw active with exactly our rules. Risky: passes the gate."""
    ufw.exactly(
        name="firewall: denied but for the tailnet and WireGuard",
        prune_foreign=settings.prune_foreign,
    )
