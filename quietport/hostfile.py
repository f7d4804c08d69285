"""Reading and replacing files on a host where others may have prepared the ground.

Every directory on the way is opened as a descriptor and must belong to root or to us, and be writable by
nobody else (a sticky one such as /tmp excepted); no link is followed. What is unsafe is refused, never made
safe.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quietport.errors import HostProgramError

MAX_BYTES = 1 << 20
HOST_JSON = Path("/etc/quietport/host.json")
# Keys of host.json: sshd may listen on every address (break-glass), for the firewall to admit these networks.
PUBLIC_SSHD = "sshd_may_be_public"
PUBLIC_NETWORKS = "break_glass_cidrs"
# Key of host.json: what else may be public, each with its reason.
PUBLIC_LISTENERS = "public_listeners"
# Key of host.json: what the doctor runs when its result is another (argv).
NOTIFY_COMMAND = "notify_command"
# Keys of host.json: files that hold a secret; timers that must be enabled, apt's among them.
PRIVATE_FILES = "secret_files"
TIMERS = "timers"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class HostFileError(HostProgramError):
    """A file or a directory on the way to it cannot be trusted or used."""


class HostFileMissingError(HostFileError):
    """There is no such file, or no such directory."""


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES, trusted: bool = True) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    With `trusted` it must also belong to root or to us and be writable by nobody else. Raises
    HostFileMissingError when it is not there, HostFileError for everything else.
    """
    with _parent(path) as directory:
        # O_NONBLOCK: a FIFO would hang a reader that runs as root.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = _open(path.name, flags, directory, path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise HostFileError(f"{path} is not a regular file.")
        if trusted:
            _check_owner(status, path)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise HostFileError(f"{path} is larger than {max_bytes} bytes.")
    return content


def read_json(path: Path, *, schema: int = 1) -> dict[str, Any]:
    """The object in a JSON file that says "schema": `schema`. Raises HostFileError."""
    try:
        document = json.loads(read_bytes(path))
    except ValueError as error:
        raise HostFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise HostFileError(f"{path} does not say schema {schema}: it was not written by this version.")
    return document


def host_settings(path: Path = HOST_JSON) -> dict[str, Any]:
    """What the converge declared for this host; {} on a host it has not reached. Raises HostFileError."""
    try:
        return read_json(path)
    except HostFileMissingError:
        return {}


def write_atomic(
    path: Path, content: bytes, *, mode: int, uid: int | None = None, gid: int | None = None
) -> None:
    """Replace `path` by a file with `content`, whole or not at all.

    The new file is private until it has its owner (unchanged without `uid` and `gid`) and `mode`, and is on
    the disk before it takes the name. A directory or anything else that is not a file or a link in its place
    is refused. Raises HostFileError.
    """
    with _parent(path) as directory:
        _refuse_other_kinds(path, directory)
        temporary = f".{path.name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
        except OSError as error:
            raise HostFileError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                if uid is not None or gid is not None:
                    os.fchown(stream.fileno(), -1 if uid is None else uid, -1 if gid is None else gid)
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        except OSError as error:
            _unlink(temporary, directory)
            raise HostFileError(f"{path} cannot be written: {error.strerror}.") from error
        except BaseException:
            _unlink(temporary, directory)
            raise


@contextmanager
def _parent(path: Path) -> Iterator[int]:
    """The directory of `path` as a descriptor, reached without following a link."""
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
        raise HostFileError(f"{path} is not an absolute path of a file.")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open("/", flags)
    try:
        for depth, part in enumerate(path.parts[1:-1], start=2):
            here = Path(*path.parts[:depth])
            below = _open(part, flags, descriptor, here)
            os.close(descriptor)
            descriptor = below
            status = os.fstat(descriptor)
            if not status.st_mode & stat.S_ISVTX:
                _check_owner(status, here)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, directory: int, shown: Path) -> int:
    try:
        return os.open(name, flags, dir_fd=directory)
    except FileNotFoundError as error:
        raise HostFileMissingError(f"{shown} does not exist.") from error
    except OSError as error:
        raise HostFileError(
            f"{shown} cannot be opened (links are not followed): {error.strerror}."
        ) from error


def _check_owner(status: os.stat_result, shown: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise HostFileError(f"{shown} belongs to uid {status.st_uid}, not to root: it is not trusted.")
    if status.st_mode & _OTHERS_WRITE:
        raise HostFileError(f"{shown} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}).")


def _refuse_other_kinds(path: Path, directory: int) -> None:
    try:
        status = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostFileError(f"{path} cannot be examined: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise HostFileError(f"{path} is there and is neither a file nor a link: it is not replaced.")


def _unlink(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
