"""Packages: what the host needs is there, whole, and kept up to date by itself."""

from __future__ import annotations

import pytest

from control.settings import HostSettings
from deploys import tailscale
from facts.packages import Packages
from tests.spec.reading import Reading
from tests.spec.snapshot import NEEDED


def test_what_the_host_needs_is_installed(reading: Reading) -> None:
    versions = reading.fact(Packages, list(NEEDED))
    assert [package for package in NEEDED if not versions.get(package)] == []


def test_no_package_is_half_installed(reading: Reading) -> None:
    assert reading.text("dpkg --audit") == ""


def test_security_updates_come_unattended(reading: Reading, settings: HostSettings) -> None:
    if not settings.unattended_upgrades:
        pytest.skip("unattended_upgrades = false for this host")
    config = reading.text("apt-config dump APT::Periodic")
    assert 'APT::Periodic::Unattended-Upgrade "1";' in config
    assert 'APT::Periodic::Update-Package-Lists "1";' in config


def test_tailscale_is_among_the_unattended_updates(reading: Reading, settings: HostSettings) -> None:
    if not settings.unattended_upgrades:
        pytest.skip("unattended_upgrades = false for this host")
    origins = reading.text("apt-config dump Unattended-Upgrade::Origins-Pattern")
    assert f'"site={tailscale.site(settings)}"' in origins


def test_foreign_repositories_offer_only_their_own_packages(reading: Reading) -> None:
    """The preferences file: a pinned repository must not replace the distribution's packages."""
    lines = reading.lines("apt-cache policy tailscale openssh-server")
    assert lines[0] == "tailscale:"
    openssh = lines[lines.index("openssh-server:") :]
    assert not [line for line in openssh if "tailscale" in line]


def test_no_unit_has_failed(reading: Reading) -> None:
    assert reading.lines("systemctl list-units --failed --plain --no-legend --no-pager") == []
