"""Whether a controller is at work on this host: it then holds the lock that control/lock.py takes."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

DIRECTORY = Path("/run/quietport")
LOCK = "lock"
# Whoever takes LOCK has this one first, for an instant.
MUTEX = "lock.mutex"
MUTEX_S = 2.0
_POLL_S = 0.05


def converging(directory: Path = DIRECTORY) -> bool:
    """Whether somebody holds the lock on this host; true as well when it cannot be looked at within 2 s.

    A controller that died holds nothing: the kernel has freed its lock (flock(2)). Nothing is made or left
    here, and a controller that begins meanwhile waits for the mutex, so it is not refused because of us.
    """
    try:
        mutex = os.open(directory / MUTEX, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        # No controller since the boot.
        return False
    except OSError:
        return True
    try:
        return not _taken(mutex) or _held(directory / LOCK)
    finally:
        os.close(mutex)


def _held(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _taken(descriptor: int) -> bool:
    """Lock it, within MUTEX_S."""
    deadline = time.monotonic() + MUTEX_S
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
