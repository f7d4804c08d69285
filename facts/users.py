"""An account, and the keys that may log in to it."""

from __future__ import annotations

from typing import Any

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.api.facts import FactBase

# $1 is the user. Every line is KEY=VALUE. `sudo -l -U` asks the policy itself, so files in sudoers.d count.
_ACCOUNT = """entry=$(getent passwd -- "$1") || exit 0
echo "passwd=$entry"
echo "groups=$(id -Gn -- "$1")"
home=$(echo "$entry" | cut -d: -f6)
[ -z "$home" ] || echo "home=$(stat -c '%F:%U:%a' -- "$home" 2>/dev/null)"
if LC_ALL=C sudo -n -l -U "$1" 2>/dev/null | grep -q 'may run the following'; then echo sudo=yes; fi
"""

# Read as the user: what the user points us at with a link is then only what the user can read anyway.
_KEYS = """home=$(getent passwd -- "$1" | cut -d: -f6)
[ -n "$home" ] || exit 0
exec timeout 10 runuser -u "$1" -- sh -c \
  'f=$1/.ssh/authorized_keys; if [ -f "$f" ]; then head -c 1048576 -- "$f"; fi' sh "$home"
"""


class Account(FactBase[dict[str, Any]]):
    """The account `user`: {exists, uid, gid, home, shell, groups, sudo, home_kind, home_owner, home_mode}.

    `sudo` says whether the sudo policy lets it run anything. A host without the account: {exists: False}.
    """

    @staticmethod
    def default() -> dict[str, Any]:
        return {"exists": False}

    def command(self, user: str) -> StringCommand:
        return StringCommand("sh", "-c", QuoteString(_ACCOUNT), "sh", QuoteString(user))

    def process(self, output: list[str]) -> dict[str, Any]:
        values = dict(line.split("=", 1) for line in output if "=" in line)
        fields = values.get("passwd", "").split(":")
        if len(fields) != 7:
            return self.default()
        home = values.get("home", "").split(":")
        kind, owner, mode = home if len(home) == 3 else ("absent", "", "")
        return {
            "exists": True,
            "uid": int(fields[2]),
            "gid": int(fields[3]),
            "home": fields[5],
            "shell": fields[6],
            "groups": values.get("groups", "").split(),
            "sudo": "sudo" in values,
            "home_kind": kind,
            "home_owner": owner,
            "home_mode": mode.zfill(4) if mode else "",
        }


class AuthorizedKeys(FactBase[list[str]]):
    """Lines of the authorized_keys of `user`, comments and blank lines left out; none without an account."""

    @staticmethod
    def default() -> list[str]:
        return []

    def command(self, user: str) -> StringCommand:
        return StringCommand("sh", "-c", QuoteString(_KEYS), "sh", QuoteString(user))

    def process(self, output: list[str]) -> list[str]:
        lines = (line.strip() for line in output)
        return [line for line in lines if line and not line.startswith("#")]


class GroupMembers(FactBase[list[str]]):
    """Names of the accounts that `group` lists as members. Empty without such a group."""

    @staticmethod
    def default() -> list[str]:
        return []

    def command(self, group: str) -> StringCommand:
        return StringCommand("getent group --", QuoteString(group), "|| true")

    def process(self, output: list[str]) -> list[str]:
        members = output[0].split(":")[3:] if output else []
        return [name for name in ",".join(members).split(",") if name]
