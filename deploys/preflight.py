"""Preflight: everything that would stop the converge later, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control.errors import QuietportError
from control.settings import HostSettings
from deploys import docker as docker_deploy
from deploys import tailscale as tailscale_deploy
from facts.apt import OfferedKey
from facts.docker import Docker
from facts.sshd import SshdFiles
from facts.system import System
from facts.tailnet import Tailnet
from operations import docker, guard, lock, secret, tailnet
from operations.apt import Repository
from operations.common import Commands, operation, refuse
from quietport.sshd import MAIN

# What was exercised is in docs/supported.md; Ubuntu's files and units were read.
SUPPORTED = {"debian": ("12", "13"), "ubuntu": ("24.04",)}
ARCHITECTURES = ("amd64", "arm64")
PYTHON = (3, 11)
# Debian 12 ships 252. Older ones lack what the units use.
SYSTEMD = 252


def system_problems(system: dict[str, Any]) -> Iterator[str]:
    """What about the system itself makes a converge impossible."""
    if system["version"] not in SUPPORTED.get(system["distribution"], ()):
        shown = f"{system['distribution']} {system['version']}".strip() or "unknown"
        yield f"the system is {shown}. Supported are Debian 12 and 13, and Ubuntu 24.04: install one."
        return
    if system["arch"] not in ARCHITECTURES:
        shown = system["arch"] or "of an unknown kind"
        yield f"the machine is {shown}. Supported are amd64 and arm64: take such a machine."
    if system["systemd"] < SYSTEMD:
        found = f"systemd {system['systemd']} runs" if system["systemd"] else "systemd does not run"
        yield f"{found} as PID 1; {SYSTEMD} or newer is needed."
    if system["python"] and _version(system["python"]) < PYTHON:
        yield f"python3 is {system['python']}; 3.11 or newer is needed. Restore the distribution's python3."


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def key_problems(state: dict[str, Any], settings: HostSettings, *, name: str) -> Iterator[str]:
    """What is wrong with the key the host will join with. A host that is joined needs none."""
    if state["running"] and state["backend_state"] not in tailnet.LOGGED_OUT:
        return
    if settings.auth_key is None:
        yield "it is not on the tailnet, and has no auth_key to join with. Set auth_key, then run again."
        return
    try:
        key = secret.resolved(settings.auth_key, f"{name}: auth_key")
        tailnet.key_to_use(key, tags=settings.tailscale_tags)
    except QuietportError as error:
        yield str(error).removeprefix(f"{name}: ")


def secret_problems(settings: HostSettings, *, name: str) -> Iterator[str]:
    """Which secrets have no content on the operator's side."""
    for path, source in settings.secrets.items():
        try:
            secret.resolved(source, f"{name}: the secret {path}")
        except QuietportError as error:
            yield str(error).removeprefix(f"{name}: ")


def repositories(settings: HostSettings, system: dict[str, Any]) -> list[Repository]:
    """The signed repositories the host will get."""
    release = (system["distribution"], system["codename"])
    wanted = [docker_deploy.repository(settings, *release)] if settings.docker_source == "docker" else []
    return [*wanted, tailscale_deploy.repository(settings, *release)]


def trust_problem(repository: Repository, offered: list[str]) -> str | None:
    """Why the key that the host is offered is not taken; None also when nobody can tell yet."""
    if not offered or offered == [repository.fingerprint]:
        return None
    return repository.mistrust(" ".join(offered))


@operation()
def possible(settings: HostSettings) -> Commands:
    """The host can be converged as declared; refused with every reason at once otherwise."""
    system = host.get_fact(System)
    problems = [*system_problems(system)]
    # Where packages come from is a question of the system.
    for repository in [] if problems else repositories(settings, system):
        offered = host.get_fact(OfferedKey, url=repository.key_url, keyring=repository.keyring)
        untrusted = trust_problem(repository, offered)
        problems += [untrusted] if untrusted else []
    if not host.get_fact(SshdFiles).get(MAIN):
        problems.append(f"there is no {MAIN}: this is not OpenSSH. Install openssh-server.")
    problems += key_problems(host.get_fact(Tailnet), settings, name=host.name)
    problems += secret_problems(settings, name=host.name)
    if settings.docker_source != "none":
        reason = docker.source_refusal(host.get_fact(Docker), settings.docker_source)
        problems += [reason] if reason else []
    if problems:
        yield refuse(" ".join(problems))
        return
    host.noop("nothing stands in the way")


@deploy("preflight")
def preflight(settings: HostSettings) -> None:
    """Refuse before anything is changed."""
    lock.held(name="preflight: no other controller is at work on the host")
    guard.none_left(name="preflight: no change of an earlier run waits for its confirmation")
    possible(name="preflight: the host can become what is declared", settings=settings)
