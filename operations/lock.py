"""The lock on a host: one converge at a time (control/lock.py)."""

from __future__ import annotations

from pyinfra.context import host

from control.lock import Owner, refusal
from facts.controller import Controller
from operations.common import Commands, executing, operation, warn


@operation()
def held() -> Commands:
    """This run is the only one at the host from here to its end; refused with who has it and since when.

    No change: the lock is a process's, and goes with it. A plan takes none, and says who has it.
    """
    yield from ()
    if executing():
        take = getattr(host.connector, "take_lock", None)
        if take is not None:  # other connectors than ours are for tests of single operations
            take()
    else:
        state = host.get_fact(Controller)
        if state["held"]:
            owner = Owner(who=state["who"], pid=str(state["pid"]), since=state["since"])
            warn(refusal(owner, state["quiet_s"]))
            host.noop(f"{owner.who} is at work here")
            return
    host.noop("no other controller is at work here")
