"""Taking away what is left of sessions that are over, and nothing else. What is printed, a line each:

    PRUNED ID                      it is gone (WOULD_PRUNE ID with --dry-run, which changes nothing)
    SKIP_ACTIVE ID                 it runs
    SKIP_UNKNOWN ID                session.json is missing or cannot be read, or its end cannot be written
    SKIP_INVALID ID                session.json is malformed, contradicts agent.env, or other files are there
    SKIP_UNSAFE ID                 owner, mode or kind of the directory or of session.json
    SKIP_NO_AGENT_ENV ID           agent.env is missing, cannot be read or is malformed
    SKIP_AGENT_ENV_NOT_PRIVATE ID  agent.env is a link, no file, not 0600 or not ours
    SKIP_AGENT_ALIVE ID            the PID in agent.env may still be the agent

No process is signalled, no mode is changed, no link is followed.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quietport.sshagent import audit, sessions
from quietport.sshagent.names import ID, AgentAccessError
from quietport.sshagent.record import AGENT_ENV, ENDED, FILES, InvalidError, parse_agent_env
from quietport.sshagent.root import (
    MissingError,
    Root,
    UnsafeError,
    locked,
    names_in,
    open_private,
    read_private,
    staging,
)
from quietport.sshagent.sessions import Session

_ABANDONED_S = 60.0
# What is said of names that somebody changes while we work.
_SWAPPED = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ELOOP)


@dataclass(frozen=True)
class Verdict:
    """What came of the session `id`: `word` is as it is printed."""

    word: str
    id: str


def prune(root: Root, *, dry: bool) -> Iterator[Verdict]:
    """Take sessions away, one after the other; with `dry`, say what would be. Raises AgentAccessError."""
    names = sorted(names_in(root.sessions))
    if dry:
        for name in names:
            yield Verdict(_judge_now(root, name).replace("PRUNED", "WOULD_PRUNE"), name)
        return
    with locked(root), staging(root) as place:
        sessions.sweep(root, place)
        trail = audit.read(root)
        for name in names:
            try:
                session = sessions.settle_one(root, name, trail)
            except AgentAccessError:
                yield Verdict("SKIP_UNKNOWN", name)
                continue
            yield Verdict(_prune_one(root, session, place), name)
        _remove_abandoned_sockets(root)


def _judge_now(root: Root, name: str) -> str:
    session = sessions.look(root, name)
    try:
        directory = open_private(name, root.sessions, root.path / "sessions" / name)
    except (AgentAccessError, ValueError):
        return _skip(session)
    try:
        return judge(session, directory, root.path / "sessions" / name)
    finally:
        os.close(directory)


def _prune_one(root: Root, session: Session, place: int) -> str:
    name = session.id
    shown = root.path / "sessions" / name
    if session.record is None or session.status not in ENDED:
        return _skip(session)
    try:
        directory = open_private(name, root.sessions, shown)
    except UnsafeError:
        return "SKIP_UNSAFE"
    except AgentAccessError:
        return "SKIP_UNKNOWN"
    try:
        # Once more, of the very directory that is about to go.
        word = judge(sessions.examine(directory, name, shown), directory, shown)
        if word != "PRUNED":
            return word
        if not sessions.remove(root, name, directory, place):
            return "SKIP_UNSAFE"
        audit.append(root, "pruned", name)
        with suppress(OSError):
            sessions.clear(f"pruned-{name}", place, directory)
        _unlink_socket(root, name)
        return word
    except OSError as error:
        if error.errno in _SWAPPED:
            return "SKIP_UNSAFE"
        raise AgentAccessError(f"{shown} cannot be removed: {error.strerror}.") from error
    finally:
        os.close(directory)


def judge(session: Session, directory: int, shown: Path) -> str:
    """PRUNED when the session may go, else the word that says why not."""
    record = session.record
    if record is None or session.status not in ENDED:
        return _skip(session)
    try:
        pid = parse_agent_env(read_private(AGENT_ENV, directory, shown / AGENT_ENV))
    except UnsafeError:
        return "SKIP_AGENT_ENV_NOT_PRIVATE"
    except (MissingError, InvalidError, AgentAccessError):
        return "SKIP_NO_AGENT_ENV"
    if pid != record.agent.pid or not set(names_in(directory)) <= FILES:
        return "SKIP_INVALID"
    return "PRUNED" if record.agent.gone() else "SKIP_AGENT_ALIVE"


def _skip(session: Session) -> str:
    # An ended session whose directory could not be opened a second time is being changed by somebody.
    return f"SKIP_{session.status.upper()}" if session.status not in ENDED else "SKIP_UNSAFE"


def _unlink_socket(root: Root, name: str) -> None:
    if root.sockets is None:
        return
    with suppress(OSError):
        if stat.S_ISSOCK(os.stat(name, dir_fd=root.sockets, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=root.sockets)


def _remove_abandoned_sockets(root: Root) -> None:
    """Sockets of starts that were killed before there was a session: nobody listens, and not just now."""
    if root.sockets is None:
        return
    known = set(names_in(root.sessions))
    for name in names_in(root.sockets):
        if ID.fullmatch(name) is None or name in known:
            continue
        with suppress(OSError):
            status = os.stat(name, dir_fd=root.sockets, follow_symlinks=False)
            old = time.time() - status.st_mtime > _ABANDONED_S
            if stat.S_ISSOCK(status.st_mode) and old and not _somebody_listens(root.sockets_path / name):
                os.unlink(name, dir_fd=root.sockets)


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
