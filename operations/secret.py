"""Files with a secret: root's alone from their first byte, never in the plan, never half written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pyinfra.context import host

from control.errors import SecretError
from control.secret import Secret, resolve
from facts.parents import Parents
from operations import notes
from operations.common import Commands, operation, program, refuse
from operations.files import put_if_needed
from quietport import secret_files

FILE_MODE = f"{secret_files.FILE_MODE:04o}"
FOLDER_MODE = f"{secret_files.FOLDER_MODE:04o}"
# Directories above the one that holds the secret may hold other things; this one may not.
ABOVE_MODE = "0755"


@lru_cache(maxsize=256)
def resolved(source: str, what: str) -> Secret:
    """The secret called `what`, read from its source once a run: a command may ask for a passphrase.

    Raises SecretError.
    """
    return resolve(source, what=what)


def unsafe_parent(path: str, parents: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why no secret is put at `path`, as a sentence; None when its directories will do."""
    folder = list(parents)[-1]
    for directory, state in parents.items():
        if state["kind"] == "absent":
            continue
        if state["kind"] != "directory":
            return f"{directory} is a {state['kind']}, where a directory belongs. Move it away and run again."
        if state["user"] != "root":
            return f"{directory} belongs to {state['user']}, who could swap the secret. Give it to root."
        if directory != folder and int(state["mode"], 8) & 0o022:
            return f"others may write to {directory} ({state['mode']}). `chmod go-w` it, then run again."
    if parents[folder]["packaged"] and not _is_private(parents[folder]):
        return (
            f"{folder} belongs to a package, and would have to become 0700 for a secret. "
            f"Give {path} a directory of its own."
        )
    return None


def _is_private(state: Mapping[str, Any]) -> bool:
    return (state["kind"], state["mode"], state["user"], state["group"]) == (
        "directory",
        FOLDER_MODE,
        "root",
        "root",
    )


def _unlike_private(state: Mapping[str, Any]) -> str:
    if state["kind"] == "absent":
        return "is absent"
    owner = f"{state['user']}:{state['group']}"
    return f"it is {state['mode']} of {owner}, not {FOLDER_MODE} of root:root"


def _folders(parents: Mapping[str, Mapping[str, Any]]) -> Commands:
    folder = list(parents)[-1]
    for directory, state in parents.items():
        if directory == folder and not _is_private(state):
            notes.because(f"{directory}: {_unlike_private(state)}")
            yield program("install", "-d", "-m", FOLDER_MODE, "-o", "root", "-g", "root", "--", directory)
        elif state["kind"] == "absent":
            notes.because(f"{directory}: is absent")
            yield program("install", "-d", "-m", ABOVE_MODE, "-o", "root", "-g", "root", "--", directory)


@operation()
def file(path: str, source: str) -> Commands:
    """`path` holds the secret from `source` and nothing more: 0600 root, its directory 0700 root.

    Compared by digest. An absent or empty source, a directory that is a link, that others could change or
    that a package owns: refused with a sentence.
    """
    try:
        secret = resolved(source, f"{host.name}: the secret {path}")
    except SecretError as error:
        yield refuse(str(error))
        return
    parents = host.get_fact(Parents, path=path)
    reason = unsafe_parent(path, parents)
    if reason is not None:
        yield refuse(reason)
        return
    changed = False
    for command in _folders(parents):
        changed = True
        yield command
    for command in put_if_needed(path, secret, mode=FILE_MODE, secret=True):
        changed = True
        yield command
    if not changed:
        host.noop(f"{path} is as its source")
