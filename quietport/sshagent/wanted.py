"""What a caller asks for, and whether it can be had: looked at before anything is touched."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quietport.errors import printable
from quietport.sshagent.names import SESSION_VARIABLE, AgentAccessError

NOT_FOUND, NOT_EXECUTABLE = 127, 126


class CommandError(AgentAccessError):
    """The command cannot be executed; exit code 126 or 127, as of env(1)."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for, checked. `known_hosts` counts only with `hosts`; the TTL is in seconds."""

    ttl_s: int
    hosts: tuple[str, ...]
    known_hosts: Path
    runtime_root: str | None
    command: tuple[str, ...]


@dataclass(frozen=True)
class Tools:
    """Where the programs are that a session needs."""

    ssh_agent: str
    ssh_add: str
    command: str


def find_tools(command: Sequence[str]) -> Tools:
    """Raises AgentAccessError when OpenSSH's programs are missing, CommandError for the command."""
    found = {name: which(name) for name in ("ssh-agent", "ssh-add")}
    for name, place in found.items():
        if place is None:
            raise AgentAccessError(f"{name} is not on PATH: install openssh-client.")
    wanted = command[0] if command else shell()
    path = which(wanted)
    if path is None:
        raise CommandError(f"{printable(wanted)} is not a command that can be found.", code=NOT_FOUND)
    return Tools(
        str(Path(str(found["ssh-agent"])).absolute()), str(Path(str(found["ssh-add"])).absolute()), path
    )


def shell() -> str:
    """The user's shell, from the password database."""
    try:
        return pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    except KeyError:
        return "/bin/sh"


def refuse_nesting() -> None:
    """Raises AgentAccessError inside a session."""
    inside = os.environ.get(SESSION_VARIABLE)
    if inside:
        raise AgentAccessError(
            f"This is already inside the session {printable(inside)[:40]}: leave it before you start another."
        )


def which(name: str) -> str | None:
    """Where the program is, as execvp(3) finds it; shutil.which takes longer to import than we take."""
    folders = [""] if "/" in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        place = Path(folder, name)
        with suppress(OSError):  # a folder that is not ours to look into
            if place.is_file() and os.access(place, os.X_OK):
                return os.fspath(place)
    return None
