"""Tailscale: installed from its signed repository, joined, and on the tailnet to stay."""

from __future__ import annotations

from urllib.parse import urlsplit

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control.settings import HostSettings
from facts.system import System
from facts.tailnet import Tailnet
from operations import apt, tailnet
from operations.common import unknown_yet

# https://pkgs.tailscale.com/stable: one repository a distribution, one key file a release.
UPSTREAM = "https://pkgs.tailscale.com/stable"
ALLOWED = ("tailscale", "tailscale-archive-keyring")


def repository(settings: HostSettings, distribution: str, codename: str) -> apt.Repository:
    """tailscale's repository for a release, at upstream's address or the declared one."""
    uri = (settings.tailscale_repository or f"{UPSTREAM}/{distribution}").rstrip("/")
    return apt.Repository(
        name="tailscale",
        uri=uri,
        suite=codename,
        components=("main",),
        key_url=f"{uri}/{codename}.noarmor.gpg",
        fingerprint=settings.tailscale_key_fingerprint,
        packages=ALLOWED,
    )


def site(settings: HostSettings) -> str:
    """Host of tailscale's repository."""
    return urlsplit(settings.tailscale_repository or UPSTREAM).hostname or ""


@deploy("tailscale")
def tailscale(settings: HostSettings) -> None:
    """Repository, package, service, join, preferences; then the operator's side remembers the way."""
    system = host.get_fact(System)
    membership = tailnet.Membership.of(host.name, settings)
    apt.repository(
        name="tailscale: signed repository known to apt",
        repository=repository(settings, system["distribution"], system["codename"]),
    )
    tailnet.installed(name="tailscale: installed and running")
    tailnet.joined(name="tailscale: on the tailnet", membership=membership)
    tailnet.preferences(name="tailscale: preferences as declared, Tailscale SSH off", membership=membership)
    known = host.get_fact(Tailnet)["addresses"]
    tailnet.remembered(
        name=f"operator: remember the host's tailnet addresses{'' if known else unknown_yet('the join')}",
        host_name=host.name,
    )
    tailnet.lasting(
        name="tailscale: the host stays on the tailnet",
        login_server=settings.login_server,
        # An expired node of such a host is reached another way.
        accept_key_expiry=settings.accept_key_expiry or bool(settings.break_glass_cidrs),
    )
