"""Packages: apt is ready, the base packages are there, and security updates install themselves."""

from __future__ import annotations

from pathlib import Path

import jinja2
from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from deploys import docker, tailscale
from operations import apt, files

# What later steps stand on: the programs (python3), signed repositories (curl, ca-certificates, gpg),
# the firewall (ufw, iptables) and ssh. runuser, setpriv and the rest are in Debian's essential packages.
BASE = ("python3", "curl", "ca-certificates", "gpg", "iproute2", "iptables", "ufw", "openssh-server")
UPGRADES_PATH = "/etc/apt/apt.conf.d/52quietport"
TIMERS = ("apt-daily.timer", "apt-daily-upgrade.timer")
TEMPLATE = Path(__file__).parents[1] / "templates/packages/52quietport.j2"


def upgrades_text(*, enabled: bool, sites: tuple[str, ...]) -> str:
    """apt's configuration for unattended upgrades: security, and the repositories on `sites`."""
    text = TEMPLATE.read_text()
    template = jinja2.Template(text, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return str(template.render(enabled=enabled, sites=sites))


def sites(settings: HostSettings) -> tuple[str, ...]:
    """Hosts of the foreign repositories this host uses, each once."""
    used = [tailscale.site(settings)]
    if settings.docker_source == "docker":
        used.append(docker.site(settings))
    return tuple(dict.fromkeys(used))


@deploy("packages")
def packages(settings: HostSettings) -> None:
    """apt ready, base packages, unattended upgrades."""
    apt.wait_ready(name="packages: apt is ready, no lock held, nothing interrupted")
    wanted = (*BASE, "unattended-upgrades") if settings.unattended_upgrades else BASE
    apt.packages(name="packages: base packages installed", names=wanted)
    state = "on, tailscale's among them" if settings.unattended_upgrades else "off"
    files.put(
        name=f"packages: unattended upgrades {state}",
        path=UPGRADES_PATH,
        content=upgrades_text(enabled=settings.unattended_upgrades, sites=sites(settings)),
    )
    if settings.unattended_upgrades:
        apt.scheduled(name="packages: apt's daily timers enabled", timers=TIMERS)
