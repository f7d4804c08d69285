"""Firewall: everything in is denied, but the tailnet and the port WireGuard needs."""

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
    ufw.exactly(
        name="firewall: denied but for the tailnet and WireGuard",
        prune_foreign=settings.prune_foreign,
    )
