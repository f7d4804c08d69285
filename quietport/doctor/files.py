"""Files: the secrets are root's alone, and each agent's ssh-agent sessions are that agent's alone.

Nothing is opened for reading but directories, and no content is looked at.
"""

from __future__ import annotations

import os
import pwd
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from quietport.doctor.model import Check, Finding, keeping
from quietport.doctor.place import HERE, Place, by_converge, names_of
from quietport.errors import printable
from quietport.hostfile import PRIVATE_FILES
from quietport.secret_files import FILE_MODE, FOLDER_MODE
from quietport.sshagent.names import LINGER, AgentAccessError
from quietport.sshagent.root import (
    MissingError,
    UnsafeError,
    check_private_file,
    names_in,
    open_private,
    open_root,
)

# An agent can make as many as it likes: neither the look nor the report is endless.
MAX_FINDINGS = 20
MAX_SESSIONS = 2000
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

Account = Callable[[str], pwd.struct_passwd]


# User and group.
Owner = tuple[int, int]
ROOT: Owner = (0, 0)


def secrets(declared: Mapping[str, Any], *, place: Place = HERE, owner: Owner = ROOT) -> list[Finding]:
    """Each declared secret is a file of root's, 0600, not empty, in a directory of root's, 0700."""
    paths = names_of(declared, PRIVATE_FILES)
    if not paths:
        return [Finding("SKIP", "No secret is declared.")]
    found: list[Finding] = []
    with keeping(found):
        for folder in sorted({str(Path(path).parent) for path in paths}):
            found += _folder(folder, declared, place, owner)
        for path in paths:
            found += _secret(path, declared, place, owner)
    return found or [Finding("PASS", f"Each is for root alone; secrets: {len(paths)}.")]


def _folder(path: str, declared: Mapping[str, Any], place: Place, owner: Owner) -> Iterable[Finding]:
    for above in list(reversed(Path(path).parents))[1:]:
        status = _status(place.path(str(above)))
        if status is None:
            break
        if not stat.S_ISDIR(status.st_mode):
            yield _in_the_way(str(above), "a directory", declared)
            return
        # Who may rename in it may swap what is below it.
        if status.st_uid != owner[0] or status.st_mode & _OTHERS_WRITE:
            step = f"`chown root {above}` and `chmod go-w {above}`."
            yield Finding("FAIL", f"{above} can be changed by others than root ({_is(status)}).", step)
    status = _status(place.path(path))
    if status is None:
        yield Finding("FAIL", f"{path} is absent.", by_converge(declared))
    elif not stat.S_ISDIR(status.st_mode):
        yield _in_the_way(path, "a directory", declared)
    else:
        yield from _loose(path, status, FOLDER_MODE, owner)


def _secret(path: str, declared: Mapping[str, Any], place: Place, owner: Owner) -> Iterable[Finding]:
    status = _status(place.path(path))
    if status is None:
        yield Finding("FAIL", f"{path} is absent.", by_converge(declared))
    elif not stat.S_ISREG(status.st_mode):
        yield _in_the_way(path, "a file", declared)
    else:
        yield from _loose(path, status, FILE_MODE, owner)
        if status.st_size == 0:
            yield Finding("FAIL", f"{path} is empty.", by_converge(declared))
        if status.st_nlink != 1:
            reason = f"{path} has {status.st_nlink} names: it can be read by another one."
            yield Finding("FAIL", reason, f"`rm {shlex.quote(path)}`. {by_converge(declared)}")


def _loose(path: str, status: os.stat_result, mode: int, owner: Owner) -> Iterable[Finding]:
    if (status.st_uid, status.st_gid) == owner and stat.S_IMODE(status.st_mode) == mode:
        return
    word = shlex.quote(path)
    step = f"`chown root:root {word}` and `chmod {mode:04o} {word}`."
    yield Finding("FAIL", f"{path} is {_is(status)}, not {mode:04o} of root:root.", step)


def _in_the_way(path: str, wanted: str, declared: Mapping[str, Any]) -> Finding:
    word = shlex.quote(path)
    step = f"`mv -T {word} {word}.moved`. {by_converge(declared)}"
    return Finding("FAIL", f"{path} is a link or of another kind, and not {wanted}.", step)


def _is(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o} of {status.st_uid}:{status.st_gid}"


def _status(path: Path) -> os.stat_result | None:
    """Links are not followed; None where nothing is. Raises OSError for what cannot be looked at."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


# --- sessions ---


def sessions(
    declared: Mapping[str, Any], *, place: Place = HERE, account: Account = pwd.getpwnam
) -> list[Finding]:
    """Each agent has a runtime directory, and what lies below the root of its sessions is its own alone."""
    users = names_of(declared, "agent_users")
    if not users:
        return [Finding("SKIP", "No agent is declared.")]
    found: list[Finding] = []
    with keeping(found):
        for user in users:
            try:
                entry = account(user)
            except KeyError:
                found.append(Finding("FAIL", f"There is no account {user}.", by_converge(declared)))
                continue
            found += _runtime(user, entry.pw_uid, place)
            found += islice(_root(entry, declared), MAX_FINDINGS)
    return found or [Finding("PASS", f"Private to each agent: {', '.join(users)}.")]


def _runtime(user: str, uid: int, place: Place) -> Iterable[Finding]:
    if _status(place.path(f"{LINGER}/{user}")) is None:
        reason = f"{user} does not linger: its sessions end with its last login."
        yield Finding("FAIL", reason, f"`loginctl enable-linger {user}`.")
        return
    runtime = f"/run/user/{uid}"
    status = _status(place.path(runtime))
    if status is None:
        yield Finding("FAIL", f"{runtime} of {user} is absent.", f"`systemctl restart user@{uid}.service`.")
    elif not stat.S_ISDIR(status.st_mode) or (status.st_uid, stat.S_IMODE(status.st_mode)) != (uid, 0o700):
        step = f"`systemctl restart user-runtime-dir@{uid}.service user@{uid}.service`."
        yield Finding("FAIL", f"{runtime} of {user} is {_is(status)}, not 0700 of {uid}.", step)


def _root(entry: pwd.struct_passwd, declared: Mapping[str, Any]) -> Iterable[Finding]:
    """What of the sessions of one user is not as their program makes it, and would be refused by it."""
    user = entry.pw_name
    try:
        root = open_root(None, create=False, sockets=False, account=entry)
    except MissingError as error:
        yield Finding("WARN", printable(str(error)), by_converge(declared))
        return
    except AgentAccessError as error:
        yield _unsafe(error, user)
        return
    try:
        for name in sorted(names_in(root.sessions))[-MAX_SESSIONS:]:
            shown = root.path / "sessions" / name
            try:
                directory = open_private(name, root.sessions, shown, uid=entry.pw_uid)
            except MissingError:
                continue  # it has just been pruned
            except AgentAccessError as error:
                yield _unsafe(error, user)
                continue
            try:
                yield from _files(directory, shown, entry)
            finally:
                os.close(directory)
    finally:
        root.close()


def _files(directory: int, shown: Path, entry: pwd.struct_passwd) -> Iterable[Finding]:
    for name in names_in(directory)[:MAX_FINDINGS]:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            check_private_file(status, shown / name, uid=entry.pw_uid)
        except FileNotFoundError:
            continue
        except UnsafeError as error:
            yield _unsafe(error, entry.pw_name)


def _unsafe(error: AgentAccessError, user: str) -> Finding:
    """As that user: a link on the way to it must not send root's chmod elsewhere."""
    reason = printable(str(error), limit=400)
    if not isinstance(error, UnsafeError) or error.path is None or error.mode is None:
        return Finding("FAIL", f"{user}: {reason}", "Look at it as root, and remove or correct it by hand.")
    command = shlex.join(["chmod", f"{error.mode:04o}", str(error.path)])
    return Finding("FAIL", f"{user}: {reason}", f"`runuser -u {user} -- {command}`.")


CHECKS = (Check("secrets", secrets), Check("sessions", sessions))
