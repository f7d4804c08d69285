"""Wait until nothing holds apt's locks and cloud-init is done; sent to a host, run with `python3 -I -c`.

Standard library only. `DPkg::Lock::Timeout` makes apt wait for dpkg's lock but not for `lists/lock`, on which
`apt-get update` fails at once (ran), so all of them are waited for here.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

LOCKS = (
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
)
# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (fcntl(2)).
FLOCK = "hhqqi4x"
POLL_S = 1.0


def holder(path: str) -> int | None:
    """Process id that holds a write lock on `path`, 0 when it is out of our sight, None when nobody does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid


def name_of(pid: int) -> str:
    """A process as a reader knows it: its name and its id."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        name = "a process that is not visible"
    return f"{name} (pid {pid})"


def cloud_init_runs() -> bool:
    """Whether cloud-init is still at its first-boot work. False where it is not installed."""
    try:
        argv = ["cloud-init", "status"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return False
    except subprocess.TimeoutExpired:
        return True
    return "status: running" in done.stdout


def busy(locks: tuple[str, ...] = LOCKS) -> str | None:
    """What still works with packages, as a sentence's first half; None when nothing does."""
    for path in locks:
        pid = holder(path)
        if pid is not None:
            return f"{path} is held by {name_of(pid)}"
    return "cloud-init is still running" if cloud_init_runs() else None


def wait(seconds: float, locks: tuple[str, ...] = LOCKS) -> str | None:
    """Wait at most `seconds`. Return None when apt is free, else what still holds it."""
    deadline = time.monotonic() + seconds
    said = ""
    while (why := busy(locks)) is not None:
        if why != said:
            print(f"waiting: {why}", file=sys.stderr, flush=True)
            said = why
        if time.monotonic() >= deadline:
            return why
        time.sleep(POLL_S)
    return None


def main(argv: list[str]) -> int:
    """Usage: SECONDS. Exit code 0 when apt is free, 1 when it is not."""
    why = wait(float(argv[0]))
    if why is None:
        return 0
    print(f"apt is not free after {argv[0]} s: {why}. Wait or end it, and run again.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
