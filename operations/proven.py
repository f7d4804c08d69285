"""The end of the last transaction: firewall and sshd are proven over a new login, and stay."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfra.api.command import FunctionCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import host

from operations import guard, notes, sshd, ufw
from operations.common import Commands, one_host_at_most, operation


@one_host_at_most
def _prove(
    state: State, host: Host, login_user: str, prune_foreign: bool, break_glass: Sequence[str]
) -> bool:
    def problems() -> list[str]:
        found = sshd.not_as_wanted(login_user, break_glass=break_glass)
        return found + ufw.not_as_wanted(prune_foreign=prune_foreign, break_glass=break_glass)

    return guard.prove_and_confirm(host, problems=problems)


@operation()
def stays(login_user: str, prune_foreign: bool = False, break_glass: Sequence[str] = ()) -> Commands:
    """What firewall and ssh changed is proven over a new login, and the guard disarmed.

    The login is through the new path, accepted by sshd itself; over it sshd's policy, its listeners and the
    firewall are read. When any of that is not so, the host fails and its guard undoes all of it. Nothing to
    do where nothing changed.
    """
    if not guard.waiting(host):
        host.noop("nothing waits for its confirmation")
        return
    notes.because("firewall or ssh change before it")
    notes.depends("firewall and ssh")
    yield FunctionCommand(_prove, (login_user, prune_foreign, break_glass), {})
