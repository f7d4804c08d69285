"""Work that goes on to its end, whatever becomes of the SSH session it was asked for in."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from quietport.errors import PROBLEM


def to_the_end(work: Callable[[], int], *, crashed: Callable[[str], None]) -> int:
    """Run `work` in a child with a session of its own; returns its exit code, PROBLEM when a signal ended it.

    An exception is told to `crashed` as one line, and is PROBLEM. Ctrl-C ends nothing of it: the first one is
    told so, a second one raises KeyboardInterrupt here, and the work goes on.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        # Signals of the session that started us, and a pipe that nobody reads, must not stop us half way.
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        code = PROBLEM
        try:
            code = work()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:  # the child never returns into the caller's code
            crashed(f"{type(error).__name__}: {error}")
        os._exit(code)
    try:
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        said = "\nWhat was begun goes on to its end. Ctrl-C once more does not wait for it."
        print(said, file=sys.stderr, flush=True)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else PROBLEM
