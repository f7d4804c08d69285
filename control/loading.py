"""Ctrl-C while a program's modules are still being loaded ends it, without a traceback.

Imported first, before the seconds that pyinfra takes; `done` is called once all is there. A shell shows 130,
as after a Ctrl-C that comes later.
"""

from __future__ import annotations

import signal
import threading


def _begin() -> bool:
    # Another handler is somebody's own, and only the main thread may set one.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


_begun = _begin()


def done() -> None:
    """From here on Ctrl-C is KeyboardInterrupt again, until the program has a handler of its own."""
    if _begun and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
