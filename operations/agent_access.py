"""What an agent's ssh-agent sessions need of the host: a runtime directory that stays, a private root."""

from __future__ import annotations

from pyinfra.context import host

from facts.files import FileState
from facts.users import Account
from operations import notes
from operations.common import Commands, operation, program, script, warn
from operations.users import account_of
from quietport.sshagent.names import LINGER, PROGRAM

# systemd-logind keeps one file a user there (loginctl(1), enable-linger).
STATE = f".local/state/{PROGRAM}"
# As the user, so that no link in the home directory sends root's mkdir elsewhere. mkdir's mode is the one it
# is made with: there is no moment with another.
_MAKE_ROOT = """exec timeout 30 runuser -u "$1" -- sh -c 'set -eu
umask 077
mkdir -p -- "$(dirname -- "$1")"
for folder in "$1" "$1/sessions"; do [ -d "$folder" ] || mkdir -m 0700 -- "$folder"; done' sh "$2"
"""


def home_of(user: str) -> str:
    """The home of an agent, or where it will be."""
    account = host.get_fact(Account, user=user)
    return str(account["home"]) if account["exists"] else f"/home/{user}"


@operation()
def lingering(user: str) -> Commands:
    """The runtime directory of `user` (/run/user/UID, pam_systemd(8)) is there without a login, and stays."""
    if host.get_fact(FileState, path=f"{LINGER}/{user}")["kind"] == "file":
        host.noop(f"{user} lingers")
        return
    notes.because(f"{user} does not linger")
    notes.after(account_of(user))
    yield program("loginctl", "enable-linger", user)


@operation()
def root_of(user: str) -> Commands:
    """The root of `user`'s sessions is there, private to it. One that is there is never changed.

    With another owner or mode the program itself refuses to use it; here that is a warning: an agent must not
    be able to stop a converge.
    """
    right = True
    root = f"{home_of(user)}/{STATE}"
    for path in (root, f"{root}/sessions"):
        state = host.get_fact(FileState, path=path)
        if state["kind"] == "absent":
            notes.because(f"{path} is absent")
            notes.after(account_of(user))
            yield script(_MAKE_ROOT, user, root, timeout=60)
            return
        if (state["kind"], state["user"], state["mode"]) != ("directory", user, "0700"):
            right = False
            found = f"a {state['kind']} of {state['user']}, mode {state['mode']}"
            warn(f"{path} is {found}, not a directory of {user} with 0700: no session starts there.")
    host.noop("it is there and private" if right else "it is there, and not as it must be")
