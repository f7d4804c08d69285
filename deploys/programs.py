"""Programs: quietport's own programs on the host, and what they know of how it was declared."""

from __future__ import annotations

import json
from typing import Any

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control import zipapp
from control.settings import HostSettings
from operations import files
from operations import programs as operations

HOST_JSON = "/etc/quietport/host.json"
SCHEMA = 1


def declared(name: str, settings: HostSettings) -> dict[str, Any]:
    """What host.json holds, schema 1: declared settings the host programs need. Never a secret or its source.

    name: the host's name in hosts.toml. hostname: its name on the tailnet. users: who may log in by SSH.
    agent_users, docker_users: accounts. docker_source: debian, docker or none. login_server: control server
    of the tailnet. secret_files: paths of the files that hold secrets.
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
        "secret_files": sorted(settings.secrets),
    }


@deploy("programs")
def programs(settings: HostSettings) -> None:
    """Zipapp, launcher, host.json."""
    operations.installed(name="programs: quietport's programs installed", pyz=zipapp.build())
    files.put(
        name="programs: declared settings written to host.json",
        path=HOST_JSON,
        content=json.dumps(declared(host.name, settings), indent=2) + "\n",
    )
