"""Destination constraints: the agent signs for the named hosts alone (ssh-add(1), -h; OpenSSH 8.9 and newer).

Their host keys come from a file that root alone can change: by default ssh-add reads the agent user's own
known_hosts, where whoever stole the socket could write another host. The file is a known_hosts of sshd(8).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from quietport import commands
from quietport.errors import HostProgramError
from quietport.sshagent.names import AgentAccessError
from quietport.sshagent.root import check_parents

KNOWN_HOSTS = Path("/etc/quietport/agent_known_hosts")
MAX_HOSTS = 64
_HOST = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}@)?([A-Za-z0-9_][A-Za-z0-9_.:-]{0,252}|\[[A-Za-z0-9_.:-]{1,253}\]:[0-9]{1,5})"
)


def is_host(text: str) -> bool:
    """Whether `text` is HOST, USER@HOST or [HOST]:PORT, as in a known_hosts file."""
    return _HOST.fullmatch(text) is not None


def check(hosts: Sequence[str], known_hosts: Path) -> None:
    """Raises AgentAccessError unless the file is root's alone and has a key of every host."""
    path = known_hosts.parent.resolve() / known_hosts.name
    try:
        check_parents(path)
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
