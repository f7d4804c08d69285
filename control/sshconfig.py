"""What the operator's own ~/.ssh/config says about a host's public address.

hosts.toml wins wherever it says something itself. A lab's hosts file is complete, so the operator's
configuration is not asked about it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pyinfra.connectors.sshuserclient.config import SSHConfig

from control.errors import ReachError


@dataclass(frozen=True)
class SshOptions:
    """The options that matter for reaching a host. None or empty: not set."""

    hostname: str | None = None
    user: str | None = None
    port: int | None = None
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    proxy: str | None = None


def lookup(address: str, path: Path | None = None) -> SshOptions:
    """Options for `address`. Raises ReachError when the configuration cannot be read."""
    path = path or Path("~/.ssh/config").expanduser()
    config = SSHConfig()
    try:
        if not path.is_file():
            return SshOptions()
        with path.open(encoding="utf-8") as stream:
            config.parse(stream)  # type: ignore[no-untyped-call]
        found = config.lookup(address)
        port = int(found["port"]) if "port" in found else None
    except Exception as error:  # paramiko raises its own, OSError, ValueError and plain Exception for loops
        raise ReachError(
            f"{path}: cannot be used: {error}.", hint="Correct it; `ssh -G HOST` shows how ssh reads it."
        ) from error
    agent = found.get("identityagent")
    return SshOptions(
        hostname=found.get("hostname"),
        user=found.get("user"),
        port=port,
        identity_files=tuple(found.get("identityfile", ())),
        identities_only=found.get("identitiesonly", "no").lower() == "yes",
        identity_agent=os.path.expandvars(agent) if agent and agent != "SSH_AUTH_SOCK" else None,
        proxy=_proxy(found.get("proxycommand"), found.get("proxyjump"), path),
    )


def _proxy(command: str | None, jump: str | None, path: Path) -> str | None:
    """The command that carries the connection. A jump is done by ssh itself, the way ssh does it."""
    if command and command.lower() != "none":
        return command.removeprefix("exec ")
    if not jump or jump.lower() == "none":
        return None
    *before, last = jump.split(",")
    argv = ["ssh", "-o", "BatchMode=yes", "-F", str(path)]
    if before:
        argv += ["-J", ",".join(before)]
    return shlex.join([*argv, "-W"]) + " [%h]:%p " + shlex.quote(_jump_target(last))


def _jump_target(hop: str) -> str:
    """A hop as ssh's argument: with a port it is only understood as a URI."""
    return hop if hop.startswith("ssh://") else f"ssh://{hop}"
