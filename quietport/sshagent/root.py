"""Where a user's sessions are kept. Everything below the root is reached through directory descriptors.

    ROOT/                0700   ~/.local/state/codex-openclaw-ssh-agent, ~ as the password database has it
      audit.jsonl        0600   see audit.py
      sessions/ID/       0700   session.json and agent.env, 0600: see record.py
      staging/           0700   sessions on their way in and out, only while the lock is held
      sockets/           0700   with --runtime-root only; else /run/user/UID/codex-openclaw-ssh-agent

The lock is flock(2) on the root itself: the kernel frees it when its holder dies. Directories are made with
mkdirat(2) and opened with O_NOFOLLOW; owner and mode are those of the descriptor, so there is no time between
check and use. What is not exactly private is refused, never repaired.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quietport.sshagent.names import PROGRAM, AgentAccessError

MAX_BYTES = 1 << 16
LOCK_S = 30.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO in place of a file would hang its reader.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# What open(2) says of a link, of something that is no directory, and of a socket.
_OTHER_KIND = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)


class UnsafeError(AgentAccessError):
    """Owner, mode or kind of a file or directory is not what this program makes.

    `path` and `mode` are set where the mode alone is wrong: what it is of, and what it must be.
    """

    def __init__(self, sentence: str, *, path: Path | None = None, mode: int | None = None) -> None:
        super().__init__(sentence)
        self.path = path
        self.mode = mode


class MissingError(AgentAccessError):
    """There is no such file or directory."""


@dataclass(frozen=True)
class Root:
    """Open descriptors of the directories of one user. `sockets` is None unless it was asked for."""

    path: Path
    fd: int
    sessions: int
    sockets: int | None
    sockets_path: Path

    def close(self) -> None:
        """Close them all; the lock goes with them."""
        for descriptor in (self.fd, self.sessions, self.sockets):
            if descriptor is not None:
                os.close(descriptor)


def open_root(
    chosen: str | None, *, create: bool, sockets: bool, account: pwd.struct_passwd | None = None
) -> Root:
    """Open the root, `chosen` or the user's own; with `create`, make what is missing of it.

    `sockets` asks for the directory of the sockets too. `account` is for root, who looks at another user's:
    nothing is made then. Raises MissingError when there is no root and `create` is not set, UnsafeError,
    AgentAccessError.
    """
    uid = os.geteuid() if account is None else account.pw_uid
    held: list[int] = []
    path = root_path(chosen, account)
    runtime = None if chosen is not None else Path(f"/run/user/{uid}")
    try:
        missing = path.parts[-3:-1] if chosen is None else ()
        parent = _trusted(path.parent, makes=len(missing) if create else 0, uid=uid)
        held.append(parent)
        root = _private(path.name, parent, path, create=create, uid=uid)
        held.append(root)
        sessions = _private("sessions", root, path / "sessions", create=create, uid=uid)
        held.append(sessions)
        sockets_path = path / "sockets" if runtime is None else runtime / PROGRAM
        socket_fd = None
        if sockets:
            socket_fd = _sockets(root, sockets_path, runtime, create=create)
            if socket_fd is not None:
                held.append(socket_fd)
        held = [parent]
        return Root(path, root, sessions, socket_fd, sockets_path)
    finally:
        for descriptor in held:
            os.close(descriptor)


def root_path(chosen: str | None, account: pwd.struct_passwd | None = None) -> Path:
    """The absolute path of the root, of `account` or of whoever runs this. Links on the way to it are
    resolved once; it is not one itself.

    Raises AgentAccessError.
    """
    try:
        if chosen is None:
            home = Path((account or pwd.getpwuid(os.geteuid())).pw_dir)
            return home.resolve(strict=True) / ".local" / "state" / PROGRAM
        given = Path(chosen)
        # A line feed would break agent.env.
        if not chosen.isprintable() or given.name in ("", "..") or ".." in given.parts:
            raise AgentAccessError(f"--runtime-root {chosen!r} is not the path of a directory.")
        given = Path.cwd() / given
        return given.parent.resolve(strict=True) / given.name
    except KeyError as error:
        raise AgentAccessError(
            f"uid {os.geteuid()} is not in the password database: name a directory with --runtime-root."
        ) from error
    except (OSError, RuntimeError) as error:
        where = chosen or "The home directory"
        raise AgentAccessError(f"{where} has no directory to be in: {_why(error)}.") from error


@contextmanager
def locked(root: Root, *, timeout: float = LOCK_S) -> Iterator[None]:
    """Hold the lock of the root. `timeout` is in seconds. Raises AgentAccessError."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        try:
            fcntl.flock(root.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise AgentAccessError(
                    f"{root.path} is still locked by another process after {timeout:g} s; try again."
                ) from None
        except OSError as error:
            raise AgentAccessError(f"{root.path} cannot be locked: {_why(error)}.") from error
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    try:
        yield
    finally:
        fcntl.flock(root.fd, fcntl.LOCK_UN)


@contextmanager
def staging(root: Root) -> Iterator[int]:
    """The directory of sessions on their way in and out, made if it is missing. Use it with the lock held."""
    descriptor = _private("staging", root.fd, root.path / "staging", create=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def names_in(directory: int) -> list[str]:
    """The names in an open directory. Raises OSError."""
    return os.listdir(directory)


def open_private(name: str, parent: int, shown: Path, *, uid: int | None = None) -> int:
    """A directory that is ours (or `uid`'s), 0700 and no link.

    Raises MissingError, UnsafeError, AgentAccessError.
    """
    return _private(name, parent, shown, create=False, uid=uid)


def read_private(name: str, directory: int, shown: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """A regular file that is ours, 0600 and has one name. Longer files are cut to `max_bytes` + 1.

    Raises MissingError, UnsafeError, AgentAccessError (it cannot be read).
    """
    descriptor = _open(name, _READ, directory, shown)
    try:
        check_private_file(os.fstat(descriptor), shown)
        parts: list[bytes] = []
        left = max_bytes + 1
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError as error:
        raise AgentAccessError(f"{shown} cannot be read: {_why(error)}.") from error
    finally:
        os.close(descriptor)


def check_private_file(status: os.stat_result, shown: Path, *, uid: int | None = None) -> None:
    """Raises UnsafeError unless it is a regular file of ours (or of `uid`), 0600, with one name."""
    uid = os.geteuid() if uid is None else uid
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeError(f"{shown} is not a regular file.")
    owned = (status.st_uid, status.st_nlink) == (uid, 1)
    if not owned or stat.S_IMODE(status.st_mode) != 0o600:
        raise UnsafeError(
            f"{shown} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o} and "
            f"{status.st_nlink} names, and not to uid {uid} alone (0600, one name).",
            path=shown if owned else None,
            mode=0o600,
        )


def write_private(name: str, directory: int, data: bytes, shown: Path) -> None:
    """A new file, 0600 and on the disk when this returns; none when it fails. Raises AgentAccessError."""
    try:
        descriptor = os.open(name, _CREATE, 0o600, dir_fd=directory)
    except OSError as error:
        raise AgentAccessError(f"{shown} cannot be written: {_why(error)}.") from error
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError as error:
        with suppress(OSError):
            os.unlink(name, dir_fd=directory)
        raise AgentAccessError(f"{shown} cannot be written: {_why(error)}.") from error
    finally:
        os.close(descriptor)


def check_parents(path: Path) -> None:
    """Raises AgentAccessError unless only root can change what is at `path`; no link is followed."""
    descriptor = os.open("/", _DIRECTORY)
    try:
        for part in path.parts[1:-1]:
            below = _open(part, _DIRECTORY, descriptor, path)
            os.close(descriptor)
            descriptor = below
            status = os.fstat(descriptor)
            if status.st_uid != 0 or (status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX):
                raise UnsafeError(f"A directory of {path} is not root's alone: it is not trusted.")
        file = _open(path.name, _READ, descriptor, path)
        try:
            status = os.fstat(file)
        finally:
            os.close(file)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & _OTHERS_WRITE:
        raise UnsafeError(f"{path} is not a regular file that root alone can write: it is not trusted.")


def _sockets(root: int, path: Path, runtime: Path | None, *, create: bool) -> int | None:
    try:
        if runtime is None:
            return _private("sockets", root, path, create=create)
        try:
            parent = _trusted(runtime, makes=0, uid=os.geteuid())
        except MissingError as error:
            raise MissingError(
                f"{runtime} does not exist: let root run `loginctl enable-linger {os.geteuid()}`, or log in."
            ) from error
        try:
            return _private(PROGRAM, parent, path, create=create)
        finally:
            os.close(parent)
    except MissingError:
        # Sockets go with the last logout; what else there is of a session is still to be listed and pruned.
        if create:
            raise
        return None


def _trusted(path: Path, *, makes: int, uid: int) -> int:
    """The directory `path`, none of which others can change. The last `makes` parts are made if missing."""
    descriptor = os.open("/", _DIRECTORY)
    parts = path.parts[1:]
    try:
        for depth, part in enumerate(parts, start=1):
            shown = Path("/", *parts[:depth])
            if depth > len(parts) - makes:
                _make(part, descriptor, shown)
            below = _open(part, _DIRECTORY, descriptor, shown)
            os.close(descriptor)
            descriptor = below
            status = os.fstat(descriptor)
            trusted = status.st_uid in (0, uid)
            if not trusted or (status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX):
                raise UnsafeError(
                    f"{shown} can be changed by others (uid {status.st_uid}, mode "
                    f"{stat.S_IMODE(status.st_mode):04o}): nothing below it is private."
                )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _private(name: str, parent: int, shown: Path, *, create: bool, uid: int | None = None) -> int:
    uid = os.geteuid() if uid is None else uid
    if create:
        _make(name, parent, shown)
    descriptor = _open(name, _DIRECTORY, parent, shown)
    status = os.fstat(descriptor)
    # In a directory with the set-group-ID bit a new one has it too (mkdir(2)); it opens nothing to anybody.
    mode = stat.S_IMODE(status.st_mode) & ~stat.S_ISGID
    if status.st_uid != uid or mode != 0o700:
        os.close(descriptor)
        raise UnsafeError(
            f"{shown} belongs to uid {status.st_uid} with mode {mode:04o}, and not to uid {uid} "
            "alone (0700): it is not used and not changed. Look at it, and remove it yourself.",
            path=shown if status.st_uid == uid else None,
            mode=0o700,
        )
    return descriptor


def _make(name: str, parent: int, shown: Path) -> None:
    try:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    except OSError as error:
        raise AgentAccessError(f"{shown} cannot be made: {_why(error)}.") from error


def _open(name: str, flags: int, directory: int, shown: Path) -> int:
    try:
        return os.open(name, flags, dir_fd=directory)
    except FileNotFoundError as error:
        raise MissingError(f"{shown} does not exist.") from error
    except OSError as error:
        if error.errno in _OTHER_KIND:
            raise UnsafeError(f"{shown} is a link or of another kind: it is not followed.") from error
        raise AgentAccessError(f"{shown} cannot be opened: {_why(error)}.") from error


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
