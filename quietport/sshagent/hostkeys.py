"""Looking for the host keys of --allow-host before a session is begun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quietport import commands
from quietport.errors import HostProgramError
from quietport.sshagent.names import AgentAccessError
from quietport.sshagent.root import MissingError, check_parents


def check(hosts: Sequence[str], known_hosts: Path) -> Path:
    """The file without links on the way to it, for ssh-add to open: nobody but root can make it another.

    Raises AgentAccessError unless it is root's alone and has a key of every host.
    """
    path = known_hosts.parent.resolve() / known_hosts.name
    try:
        check_parents(path)
    except MissingError as error:
        raise AgentAccessError(
            f"--allow-host takes host keys from {known_hosts}: {error} Let root write them there, from "
            "agent_known_hosts of hosts.toml."
        ) from error
    except AgentAccessError as error:
        raise AgentAccessError(f"--allow-host takes host keys from {known_hosts}: {error}") from error
    for host in hosts:
        name = host.rpartition("@")[2]
        try:
            found = commands.run(["ssh-keygen", "-F", name, "-f", os.fspath(path)])
        except HostProgramError as error:
            raise AgentAccessError(f"Host keys cannot be looked up: {error}") from error
        if found.code != 0 or not found.out.strip():
            raise AgentAccessError(f"{known_hosts} has no host key of {name}: let root add it.")
    return path
