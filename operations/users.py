"""Accounts of the agents and the keys that may log in; nothing of an account that was there is taken over."""

from __future__ import annotations

from typing import Any

from pyinfra.context import host

from facts.users import Account, AuthorizedKeys
from operations import notes
from operations.common import Commands, operation, program, refuse, script, warn

# Debian Policy 9.2.2: below 1000 are the accounts of the system.
FIRST_USER_ID = 1000
NOBODY_ID = 65534

# As the user, so that no link in the home directory sends root's write elsewhere. Appended, not replaced:
# keys that are there stay. A file without a last newline would glue our first key to its last line.
_ADD_KEYS = """set -eu
home=$(getent passwd -- "$1" | cut -d: -f6)
# A cut link looks like the end of the input: half a key must not stay there for good.
keys=$(cat)
[ "$(printf %s "$keys" | wc -c)" -eq "$2" ] || {
  echo "the keys for $1 were cut off; nothing was changed" >&2
  exit 1
}
printf '%s\n' "$keys" | timeout 30 runuser -u "$1" -- sh -c 'set -eu
umask 077
mkdir -p -- "$1/.ssh"
file=$1/.ssh/authorized_keys
if [ -e "$file" ] && [ ! -f "$file" ]; then echo "$file is no regular file: left as it is" >&2; exit 1; fi
if [ -s "$file" ] && [ -n "$(tail -c 1 -- "$file")" ]; then echo >>"$file"; fi
cat >>"$file"' sh "$home"
"""


def unfit(user: str, account: dict[str, Any]) -> str | None:
    """Why an account that exists cannot be an agent's, as a sentence; None when it can."""
    uid = account["uid"]
    if uid < FIRST_USER_ID or uid == NOBODY_ID:
        return (
            f"agent user {user} is a system account here (uid {uid}); it is not touched. "
            "Choose another name in agent_users."
        )
    if account["sudo"]:
        return (
            f"agent user {user} may use sudo here, which an agent must not. "
            "Take it away, or choose another name in agent_users."
        )
    if account["home_kind"] != "absent" and account["home_owner"] != user:
        return (
            f"{account['home']}, the home of agent user {user}, belongs to {account['home_owner']}. "
            "Look why, and correct it by hand: homes are never chowned here."
        )
    return None


def account_of(user: str) -> str:
    """What a plan calls the account that is made for `user`."""
    return f"the account {user}"


@operation()
def agent(user: str) -> Commands:
    """The account `user` exists: no password, no sudo, a home of its own (0700) and bash.

    An account that is there is left as it is, and refused when it is the system's or may use sudo.
    """
    account = host.get_fact(Account, user=user)
    if not account["exists"]:
        notes.because(f"there is no account {user}")
        notes.brings(account_of(user))
        # '*' is no password and not locked: sshd refuses keys for an account locked with '!' without PAM.
        yield program(
            "useradd", "--create-home", "--home-dir", f"/home/{user}", "--shell", "/bin/bash", "--user-group",
            "--key", "HOME_MODE=0700", "--password", "*", user,
        )  # fmt: skip
        return
    sentence = unfit(user, account)
    if sentence is not None:
        yield refuse(sentence)
        return
    if "docker" in account["groups"]:
        warn(f"{user} is in the docker group: root in all but name.")
    host.noop(f"{user} exists")


def _blob(line: str) -> str:
    """The key itself in a line of authorized_keys: the long base64 word, whatever options stand before it."""
    return next((word for word in line.split() if word.startswith("AAAA")), line)


@operation()
def authorized_keys(user: str, keys: tuple[str, ...]) -> Commands:
    """Each of `keys` may log in as `user`. Keys that are there stay as they are."""
    there = {_blob(line) for line in host.get_fact(AuthorizedKeys, user=user)}
    missing = [key for key in dict.fromkeys(keys) if _blob(key) not in there]
    if not missing:
        host.noop("every key is there")
        return
    count = len(missing)
    notes.because(f"{count} declared key{'' if count == 1 else 's'} may not log in as {user}")
    notes.after(account_of(user))
    text = "\n".join(missing).encode()
    yield script(_ADD_KEYS, user, str(len(text)), stdin=text, timeout=60)
