"""The lock that keeps apart what changes how the host is reached: guarded steps, the rollback, the follower.

flock(2) on /run/quietport/guard.lock: the kernel frees it when its holder dies, and a reboot empties /run.
Only who holds it has the file open (who waits opens it for an instant): a rollback that cannot get it finds
the holder by the open file.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quietport.errors import HostProgramError

LOCK = Path("/run/quietport/guard.lock")
POLL_S = 0.1


@contextmanager
def hold(*, timeout: float, path: Path = LOCK) -> Iterator[int]:
    """Hold the lock; yields its descriptor, to hand on to a child that shall hold it too (`pass_fds`).

    `timeout` is in seconds, 0 tries once. The directory (0700, ours) is made when it is missing. Raises
    HostProgramError when another one still holds the lock, or when the directory cannot be trusted.
    """
    deadline = time.monotonic() + timeout
    while (descriptor := _try(path)) is None:
        if time.monotonic() >= deadline:
            raise HostProgramError(
                f"Another change of how this host is reached is under way ({path} is held after "
                f"{timeout:g} s); `quietport guard status` says which."
            )
        time.sleep(POLL_S)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try(path: Path) -> int | None:
    directory = _directory(path.parent)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, 0o600, dir_fd=directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that was removed meanwhile keeps nobody out.
            named = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
            if os.path.samestat(os.fstat(descriptor), named):
                held, descriptor = descriptor, -1
                return held
        except (BlockingIOError, FileNotFoundError):
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    except OSError as error:
        raise HostProgramError(f"{path} cannot be locked: {error.strerror}.") from error
    finally:
        os.close(directory)
    return None


def _directory(path: Path) -> int:
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HostProgramError(f"{path} cannot be used for a lock: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise HostProgramError(
            f"{path} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}, and not to "
            "root alone (0700): whoever can write there could take the lock away."
        )
    return descriptor
