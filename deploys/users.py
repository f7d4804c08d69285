"""Users: the agents' accounts, who may log in, and quietport's own directories."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import files
from operations import users as operations
from operations.common import each

DIRECTORIES = (
    ("/etc/quietport", "0755"),
    ("/var/lib/quietport", "0750"),
    ("/var/log/quietport", "0750"),
)


@deploy("users")
def users(settings: HostSettings) -> None:
    """Agent users, keys of the login user and of the agents, directories."""
    for user in each(settings.agent_users):
        operations.agent(name=f"users: {user} exists, without a password and without sudo", user=user)
    for user in each(dict.fromkeys((settings.user, *settings.agent_users))):
        operations.authorized_keys(
            name=f"users: declared keys may log in as {user}", user=user, keys=settings.authorized_keys
        )
    for path, mode in each(DIRECTORIES):
        files.directory(name=f"users: {path} is there, {mode}", path=path, mode=mode)
