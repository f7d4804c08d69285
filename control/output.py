"""Standard output whose reader may have left: `quietport drift | head -1`."""

from __future__ import annotations

import os
import sys


def reader_left() -> None:
    """After a BrokenPipeError: the rest goes nowhere, and the interpreter does not complain of it.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
