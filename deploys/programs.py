"""Programs: quietport's own programs on the host, and what they know of how it was declared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control import zipapp
from control.settings import HostSettings
from deploys import packages, timers
from facts.files import FileText
from facts.sshd import SshdFiles
from operations import files
from operations import programs as operations
from quietport import sshd
from quietport.hostfile import (
    NOTIFY_COMMAND,
    PRIVATE_FILES,
    PUBLIC_LISTENERS,
    PUBLIC_NETWORKS,
    PUBLIC_SSHD,
    TIMERS,
)

HOST_JSON = "/etc/quietport/host.json"
SCHEMA = 1


def declared(name: str, settings: HostSettings) -> dict[str, Any]:
    """What host.json holds, schema 1: declared settings the host programs need. Never a secret or its source.

    name: the host's name in hosts.toml. hostname: its name on the tailnet. users: who may log in by SSH.
    agent_users, docker_users: accounts. docker_source: debian, docker or none. login_server: control server
    of the tailnet. secret_files: paths of the files that hold secrets. timers: units that must be enabled.
    sshd_may_be_public: sshd may listen on every address, while the firewall admits break_glass_cidrs alone.
    public_listeners: what else may be public, each with protocol, port, unit (or null) and reason. For the
    doctor: accept_key_expiry, prune_foreign and unattended_upgrades as in hosts.toml; notify_command: what it
    runs (argv) when its result is another.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "hostname": settings.hostname or name,
        "users": list(dict.fromkeys((settings.user, *settings.agent_users))),
        "agent_users": list(settings.agent_users),
        "docker_users": list(settings.docker_users),
        "docker_source": settings.docker_source,
        "login_server": settings.login_server,
        PRIVATE_FILES: sorted(settings.secrets),
        TIMERS: timer_names(settings),
        PUBLIC_SSHD: bool(settings.break_glass_cidrs),
        PUBLIC_NETWORKS: list(settings.break_glass_cidrs),
        PUBLIC_LISTENERS: [one.model_dump(mode="json") for one in settings.public_listeners],
        "accept_key_expiry": settings.accept_key_expiry,
        "prune_foreign": settings.prune_foreign,
        "unattended_upgrades": settings.unattended_upgrades,
        NOTIFY_COMMAND: list(settings.notify_command),
    }


def timer_names(settings: HostSettings) -> list[str]:
    """The timers that run on a host of these settings, ours and apt's."""
    pruning = [timers.prune_of(user, "") for user in settings.agents]
    ours = [f"{timer.unit}.timer" for timer in (*timers.declared(settings), *pruning)]
    return [*ours, *(packages.TIMERS if settings.unattended_upgrades else ())]


def still_allowed(old: str | None, files: Mapping[str, str]) -> dict[str, Any]:
    """What host.json (`old`) allows and sshd, by its files, makes use of: it listens on every address.

    That is allowed until sshd is elsewhere, and that for good: a rollback has to start it as it was.
    """
    try:
        document = json.loads(old or "{}")
        addresses = sshd.listen_addresses(files.get(sshd.DROP_IN, ""))
        if document.get(PUBLIC_SSHD) is not True or not any(map(sshd.is_wildcard, addresses)):
            return {}
    except (ValueError, AttributeError):
        return {}
    return {key: document[key] for key in (PUBLIC_SSHD, PUBLIC_NETWORKS) if key in document}


def _text(settings: HostSettings, **changes: Any) -> str:
    return json.dumps({**declared(host.name, settings), **changes}, indent=2) + "\n"


def _on_its_way_back(settings: HostSettings) -> dict[str, Any]:
    """What is left to be allowed to a host that is told to listen on every address no more."""
    if settings.break_glass_cidrs:
        return {}
    old = host.get_fact(FileText, path=HOST_JSON)
    if not old or f'"{PUBLIC_SSHD}": true' not in old:
        return {}
    files_of_sshd: dict[str, str] = host.get_fact(SshdFiles)
    return still_allowed(old, files_of_sshd)


@deploy("programs")
def programs(settings: HostSettings) -> None:
    """Zipapp, launcher, host.json."""
    operations.installed(name="programs: quietport's programs installed", pyz=zipapp.build())
    files.put(
        name="programs: declared settings written to host.json",
        path=HOST_JSON,
        content=_text(settings, **_on_its_way_back(settings)),
    )


@deploy("programs: the end")
def closed(settings: HostSettings) -> None:
    """host.json allows no sshd on every address any more, now that it is proven to be on the tailnet's."""
    if not _on_its_way_back(settings):
        return
    files.put(
        name="programs: host.json allows sshd on every address no more",
        path=HOST_JSON,
        content=_text(settings),
        after="ssh",
    )
