"""quietport's own programs on the host."""

from __future__ import annotations

from pyinfra.context import host

from control.guard import LAUNCHER
from operations import notes
from operations.common import Commands, operation
from operations.files import directory_if_needed, put_if_needed

# What a plan calls them, where the host's own answer may be another with new ones.
PROGRAMS = "the programs"
LIBRARY = "/usr/local/lib/quietport"
ZIPAPP = f"{LIBRARY}/quietport.pyz"
# -I: neither the caller's directory nor PYTHON* variables decide what root runs.
LAUNCHER_TEXT = f'#!/bin/sh\nexec /usr/bin/python3 -I {ZIPAPP} "$@"\n'


def files_if_needed(pyz: bytes) -> Commands:
    """What `installed` yields, for operations that need the programs only sometimes."""
    # Whoever may write there is root: its timers run what is in it.
    yield from directory_if_needed(LIBRARY)
    for path, content, mode in ((ZIPAPP, pyz, "0644"), (LAUNCHER, LAUNCHER_TEXT.encode(), "0755")):
        for command in put_if_needed(path, content, mode=mode, secret=path == ZIPAPP):
            notes.brings(PROGRAMS)
            yield command


@operation()
def installed(pyz: bytes) -> Commands:
    """The zipapp `pyz` and the launcher `quietport` are in place. Same bytes, no change."""
    changed = False
    for command in files_if_needed(pyz):
        changed = True
        yield command
    if not changed:
        host.noop("the programs are as built")
