"""agent access: SSH for agents by expiring ssh-agent sessions (docs/agent-access.md)."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import agent_access as operations
from operations import files
from operations.common import each
from operations.programs import ZIPAPP
from quietport.sshagent import hosts
from quietport.sshagent.names import EVIDENCE_PROGRAM, PROGRAM

FOLDER = "/usr/local/bin"
# -I: neither the agent's directory nor its PYTHON* variables decide what runs with the key.
_LAUNCHER = '#!/bin/sh\nexec /usr/bin/python3 -I {} {} "$@"\n'
LAUNCHERS = {
    f"{FOLDER}/{PROGRAM}": _LAUNCHER.format(ZIPAPP, "ssh-agent"),
    f"{FOLDER}/{EVIDENCE_PROGRAM}": _LAUNCHER.format(ZIPAPP, "ttl-evidence"),
}
KNOWN_HOSTS = str(hosts.KNOWN_HOSTS)
_HEADER = f"# Written by quietport: hosts for `{PROGRAM} --allow-host`, as in known_hosts.\n"


@deploy("agent access")
def agent_access(settings: HostSettings) -> None:
    """Launchers, the host keys that sessions may be bound to, and each agent's place for its sessions."""
    for path, text in each(LAUNCHERS.items()):
        files.put(
            name=f"agent access: {path.removeprefix(FOLDER + '/')}", path=path, content=text, mode="0755"
        )
    files.put(
        name="agent access: host keys that a session may be bound to",
        path=KNOWN_HOSTS,
        content=_HEADER + "".join(f"{line}\n" for line in settings.agent_known_hosts),
    )
    for user in each(settings.agents):
        operations.lingering(name=f"agent access: {user}'s runtime directory stays", user=user)
        operations.root_of(name=f"agent access: {user}'s sessions have a private place", user=user)
