"""Firewall: everything in is denied, but the tailnet, the port WireGuard needs, and break_glass_cidrs."""

from __future__ import annotations

from pathlib import Path

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import ufw, units

DROP_IN = "/etc/systemd/system/ufw.service.d/quietport.conf"
DROP_IN_TEXT = (Path(__file__).parents[1] / "templates/firewall/ufw.service.conf").read_text()


@deploy("firewall")
def firewall(settings: HostSettings) -> None:
    """ufw active with exactly our rules, for good. Risky: passes the gate."""
    units.unit_files(
        name="firewall: a restart of ufw.service opens nothing in between", files={DROP_IN: DROP_IN_TEXT}
    )
    networks = settings.break_glass_cidrs
    ufw.exactly(
        name="firewall: denied but for the tailnet and WireGuard"
        f"{', and ssh from break_glass_cidrs' if networks else ''}",
        prune_foreign=settings.prune_foreign,
        break_glass=list(networks),
    )
