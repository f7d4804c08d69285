"""Files, directories and links: each written in one atomic step, private from the first byte."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Any

from pyinfra.api.command import StringCommand
from pyinfra.context import host

from control.secret import Secret
from facts.files import FileState, FileText
from operations import notes
from operations.common import Commands, operation, program, refuse, script, show_diff

# The temporary file is in the destination's directory: only there is the rename atomic, and no directory
# that others can write to is involved. `sync` first, or a crash after the rename leaves an empty file.
_WRITE = """set -eu
umask 077
folder=$(dirname -- "$1")
# What a reboot in the middle left behind, perhaps with a secret in it. A run that was killed and still writes
# loses its file to this, and fails: it is this run's turn.
rm -f -- "$folder"/.quietport.??????????
temp=$(mktemp -- "$folder/.quietport.XXXXXXXXXX")
trap 'rm -f -- "$temp"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cat >"$temp"
# A cut link looks like the end of the input: half a file must not take the whole one's place.
[ "$(wc -c <"$temp")" -eq "$5" ] || { echo "$1: the upload was cut off; nothing was changed" >&2; exit 1; }
chown -- "$3:$4" "$temp"
chmod -- "$2" "$temp"
sync -- "$temp"
mv -fT -- "$temp" "$1"
"""
# `ln -sf` removes first and links then; a rename has no moment without the link.
_LINK = 'ln -sfn -- "$1" "$2" && mv -fT -- "$2" "$3"'
WRITE_TIMEOUT_S = 120


def as_bytes(content: str | bytes | Secret) -> bytes:
    """The bytes a file will hold."""
    if isinstance(content, Secret):
        return content.reveal()
    return content.encode() if isinstance(content, str) else content


def write(
    path: str, content: str | bytes | Secret, *, mode: str = "0644", user: str = "root", group: str = "root"
) -> StringCommand:
    """The command that puts `content` at `path` in one step; its directory must exist."""
    stdin = content if isinstance(content, Secret) else as_bytes(content)
    size = str(len(as_bytes(content)))
    return script(_WRITE, path, mode, user, group, size, stdin=stdin, timeout=WRITE_TIMEOUT_S)


def unlike(
    state: dict[str, Any],
    content: str | bytes | Secret,
    *,
    mode: str,
    user: str = "root",
    group: str = "root",
) -> list[str]:
    """What of a file in `state` (as FileState tells it) is not as wanted: kind, content, mode, owner.

    A phrase each, without anything of the content; empty when the file is right.
    """
    if state["kind"] != "file":
        return [_kind(state)]
    found = _other_mode(state, mode, user, group)
    if state["sha256"] != hashlib.sha256(as_bytes(content)).hexdigest():
        found.insert(0, "its content differs")
    return found


def _kind(state: dict[str, Any]) -> str:
    return "is absent" if state["kind"] == "absent" else f"is a {state['kind']}"


def _other_mode(state: dict[str, Any], mode: str, user: str, group: str) -> list[str]:
    found = []
    if int(state["mode"], 8) != int(mode, 8):
        found.append(f"its mode is {state['mode']}, not {mode}")
    if (state["user"], state["group"]) != (user, group):
        found.append(f"its owner is {state['user']}:{state['group']}, not {user}:{group}")
    return found


def loosened(
    path: str, state: dict[str, Any], *, mode: str = "0644", user: str = "root", group: str = "root"
) -> list[str]:
    """What of a file's mode and owner is not as wanted, a phrase each; nothing where there is no file."""
    found = _other_mode(state, mode, user, group) if state["kind"] == "file" else []
    return [f"{path}: {what}" for what in found]


def is_private(state: dict[str, Any]) -> bool:
    """Whether there is a file that not everybody may read, in `state` as FileState tells it."""
    return state["kind"] == "file" and int(state["mode"], 8) & 0o004 == 0


def put_if_needed(
    path: str,
    content: str | bytes | Secret,
    *,
    mode: str = "0644",
    user: str = "root",
    group: str = "root",
    secret: bool = False,
) -> Commands:
    """What `put` yields, for operations that own a file and what follows from it. Nothing when it is right.

    A directory or a special file in the way is refused; a symbolic link is replaced by the file.
    """
    state = host.get_fact(FileState, path=path)
    found = unlike(state, content, mode=mode, user=user, group=group)
    if not found:
        return
    notes.because(*(f"{path}: {what}" for what in found))
    if state["kind"] in ("directory", "other"):
        what = "directory" if state["kind"] == "directory" else "special file"
        yield refuse(f"{path} is a {what}, where a file belongs. Move it away and run again.")
        return
    # What not everybody may read is not for everybody's eyes, whoever wrote it.
    hidden = is_private(state) and int(mode, 8) & 0o004 != 0
    if not (secret or hidden or isinstance(content, Secret)):
        old = host.get_fact(FileText, path=path) if state["kind"] == "file" else None
        show_diff(path, old, as_bytes(content).decode(errors="replace"))
    yield write(path, content, mode=mode, user=user, group=group)


@operation()
def put(
    path: str,
    content: str | bytes | Secret,
    *,
    mode: str = "0644",
    user: str = "root",
    group: str = "root",
    secret: bool = False,
    after: str = "",
) -> Commands:
    """The file `path` holds exactly `content`. `secret`: never show it in a difference.

    `after` is the earlier change that a plan names as what this one depends on.
    Give every call a `name=`: pyinfra prints the arguments of operations without one.
    """
    changed = False
    for command in put_if_needed(path, content, mode=mode, user=user, group=group, secret=secret):
        changed = True
        yield command
    if not changed:
        host.noop(f"{path} is as wanted")
    elif after:
        notes.depends(after)


def directory_if_needed(
    path: str, *, mode: str = "0755", user: str = "root", group: str = "root"
) -> Commands:
    """What `directory` yields, for operations that need one. Nothing when it is right."""
    state = host.get_fact(FileState, path=path)
    right_kind = state["kind"] == "directory"
    found = _other_mode(state, mode, user, group) if right_kind else [_kind(state)]
    if not found:
        return
    if state["kind"] not in ("directory", "absent"):
        yield refuse(f"{path} is a {state['kind']}, where a directory belongs. Move it away and run again.")
        return
    notes.because(*(f"{path}: {what}" for what in found))
    yield program("install", "-d", "-m", mode, "-o", user, "-g", group, "--", path)


@operation()
def directory(
    path: str, *, mode: str = "0755", user: str = "root", group: str = "root"
) -> Commands:
    """The directory `path` exists with this mode and owner. Its parent must exist."""
    changed = False
    for command in directory_if_needed(path, mode=mode, user=user, group=group):
        changed = True
        yield command
    if not changed:
        host.noop(f"{path} is as wanted")


@operation()
def absent(path: str) -> Commands:
    """There is no file or link at `path`. A directory is refused: it is never removed with what is in it."""
    state = host.get_fact(FileState, path=path)
    if state["kind"] == "absent":
        host.noop(f"{path} is absent")
        return
    if state["kind"] == "directory":
        yield refuse(f"{path} is a directory, which is never removed. Look into it, and remove it by hand.")
        return
    notes.because(f"{path} is there")
    if state["kind"] == "file":
        show_diff(path, host.get_fact(FileText, path=path), None)
    yield program("rm", "-f", "--", path)


@operation()
def link(path: str, target: str) -> Commands:
    """`path` is a symbolic link to `target`. A file or directory in the way is refused."""
    state = host.get_fact(FileState, path=path)
    if state["kind"] == "link" and state.get("target") == target:
        host.noop(f"{path} points to {target}")
        return
    if state["kind"] not in ("link", "absent"):
        yield refuse(f"{path} is a {state['kind']}, where a link belongs. Move it away and run again.")
        return
    notes.because(f"{path}: {_kind(state)}" + (f" to {state['target']}" if state["kind"] == "link" else ""))
    parent = PurePosixPath(path)
    temp = str(parent.with_name(f".{parent.name}.quietport-link"))
    yield script(_LINK, target, temp, path)
