"""A host that was opened by hand: `quietport open` at its console (quietport/open.py)."""

from __future__ import annotations

from pyinfra.context import host

from control.guard import LAUNCHER
from facts.files import FileText
from operations import notes
from operations.common import Commands, operation, program, warn
from quietport import opened


@operation()
def forgotten() -> Commands:
    """The host is no longer taken for opened by hand; what firewall and ssh had to close is closed before.

    Said, with since when. After the proof: until then a rollback could need it open.
    """
    text = host.get_fact(FileText, path=str(opened.OPENED))
    if text is None:
        host.noop("not opened by hand")
        return
    note = opened.parse(text.encode())
    warn(f"ssh: {note.sentence()}; that ends with this run")
    notes.because("it was opened by hand")
    for rule in note.replaced:
        warn(f"firewall: taken away when it was opened by hand, and not put back: {rule}")
    yield program(LAUNCHER, "close", "--note-only")
