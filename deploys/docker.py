"""Docker: engine and compose, with nothing that containers publish reachable from the public side."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control.settings import HostSettings
from facts.docker import Docker
from facts.system import System
from operations import apt, common
from operations import docker as operations

# https://docs.docker.com/engine/install/debian: one repository a distribution.
UPSTREAM = "https://download.docker.com/linux"
UNIT = Path(__file__).parents[1] / "templates/docker/quietport-docker-user.service"


def repository(settings: HostSettings, distribution: str, codename: str) -> apt.Repository:
    """Docker's own repository for a release, at upstream's address or the declared one."""
    uri = (settings.docker_repository or f"{UPSTREAM}/{distribution}").rstrip("/")
    return apt.Repository(
        name="docker",
        uri=uri,
        suite=codename,
        components=("stable",),
        key_url=f"{uri}/gpg",
        fingerprint=settings.docker_key_fingerprint,
        packages=operations.UPSTREAM_ALLOWED,
    )


def site(settings: HostSettings) -> str:
    """Host of Docker's repository."""
    return urlsplit(settings.docker_repository or UPSTREAM).hostname or ""


@deploy("docker")
def docker(settings: HostSettings) -> None:
    """Configuration and chain first, engine then: no container ever runs without them."""
    source = settings.docker_source
    if source == "none":
        if host.get_fact(Docker)["installed"]:
            common.warn("Docker is here, and docker_source is none: what containers publish stays public.")
        return
    operations.configured(
        name="docker: ports published on loopback, live-restore, logs rotated", source=source
    )
    operations.shielded(
        name="docker: containers not reachable from the public side, whatever they publish",
        unit_text=UNIT.read_text(),
    )
    if source == "docker":
        system = host.get_fact(System)
        apt.repository(
            name="docker: Docker's signed repository known to apt",
            repository=repository(settings, system["distribution"], system["codename"]),
        )
    operations.installed(name="docker: engine and compose installed, the engine running", source=source)
    operations.group(
        name="docker: nobody in the docker group but docker_users", users=settings.docker_users
    )
