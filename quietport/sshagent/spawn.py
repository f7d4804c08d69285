"""Programs of OpenSSH as children: no terminal, three descriptors, signals as at login."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

from quietport.sshagent.process import die_with_parent


def environment(**more: str) -> dict[bytes, bytes]:
    """What such a program finds: PATH, messages in English, and `more`."""
    path = os.environb.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
    return {b"PATH": path, b"LC_ALL": b"C", **{os.fsencode(k): os.fsencode(v) for k, v in more.items()}}


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[bytes, bytes],
    directory: int,
    stdin: int,
    output: int,
    dies_with_us: bool = False,
) -> int:
    """Start `argv` in a session of its own, in the directory that is open as `directory`; returns its PID.

    `stdin` and `output` (of both kinds) are above 2. With `dies_with_us` it is killed when we end. Exit code
    127 when it cannot be executed.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.fchdir(directory)
        os.dup2(stdin, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        close_above(2)
        default_signals()
        if dies_with_us:
            die_with_parent(parent, signal.SIGKILL)
        os.execve(argv[0], list(argv), env)  # noqa: S606 - no shell on purpose
    except BaseException as error:  # a child never returns into the code of its parent
        with suppress(OSError):
            os.write(2, f"{argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def close_above(last: int, *, keep: Sequence[int] = ()) -> None:
    """Close all descriptors above `last` but those in `keep`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    edges = [last, *sorted(keep), limit]
    for low, high in pairwise(edges):
        os.closerange(low + 1, high)


def default_signals() -> None:
    """Undo what Python ignores, and unblock everything."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def standard_descriptors() -> None:
    """Make sure that 0, 1 and 2 are open, so that nothing of ours gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
