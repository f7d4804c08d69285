"""The gate of the way back: what opens the public way needs no proof before it; what follows does.

The counterpart of operations/gate.py for deploys/undo.py. One transaction of the host's guard: `opening`
arms, `risky` goes on only when a new login at the public address works, `stays` proves that once more at the
end and disarms. What is not proven undoes itself, and the host is on its tailnet as before.
"""

from __future__ import annotations

from collections.abc import Iterable

import click
from pyinfra import logger
from pyinfra.api.command import FunctionCommand, PyinfraCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import host

from control.errors import QuietportError
from control.proof import prove_public
from control.settings import settings_for
from facts.packetfilter import PacketFilter
from operations import gate, guard
from operations.common import Commands, one_host_at_most, operation
from quietport.admission import PROGRAMS, lets_strangers_in
from quietport.open import COMMENT


def opening(host: Host, commands: Iterable[PyinfraCommand]) -> Commands:
    """Yield the arming, then `commands`. They open a way in and close none, so nothing is proven before."""
    guard.will_be_armed(host.name)
    yield FunctionCommand(guard.arm, (settings_for(host.name).guard_timeout, "public"), {})
    for command in commands:
        yield gate.fenced(host, command)


def risky(host: Host, commands: Iterable[PyinfraCommand]) -> Commands:
    """Yield the proof of the public way, then `opening` of `commands`, which may close the tailnet's."""
    # Before the first command, where a plan ends.
    guard.will_be_armed(host.name)
    yield FunctionCommand(_pass_gate, (), {})
    yield from opening(host, commands)


@one_host_at_most
def _pass_gate(state: State, host: Host) -> bool:
    proof = prove_public(host.name)
    sentence = proof.sentence.removeprefix(f"{host.name}: ")
    if proof.ok and proof.session is not None:
        try:
            host.connector.switch(proof.session)  # type: ignore[attr-defined]
        except QuietportError as error:
            proof.session.close()
            sentence = str(error).removeprefix(f"{host.name}: ")
        else:
            logger.info(f"{host.print_prefix}{sentence}")
            return True
    logger.error(f"{host.print_prefix}{click.style(f'{host.name}: refused: {sentence}', fg='red')}")
    return False


@one_host_at_most
def _prove(state: State, host: Host) -> bool:
    return guard.prove_and_confirm(host, over="public", problems=lambda: _shut_without_open(host))


def _shut_without_open(host: Host) -> list[str]:
    """Why the way that was just proven is none once the host is no more opened by hand; empty when it is one.

    `quietport open` puts a rule before all others where somebody's own keeps strangers out, and it goes last.
    """
    port = host.connector.session.port  # type: ignore[attr-defined]
    found = []
    for family, text in host.get_fact(PacketFilter).items():
        without = "\n".join(line for line in text.splitlines() if f'"{COMMENT}"' not in line)
        if lets_strangers_in(text, port=port) and not lets_strangers_in(without, port=port):
            found.append(
                f"over IPv{family} only the rule of `quietport open` lets anybody in at port {port}, and it "
                f"ends with this run: see `{PROGRAMS[int(family)]} -S` there, take away what keeps strangers "
                "out, and run again"
            )
    return found


@operation()
def stays() -> Commands:
    """What was undone is proven over a new login at the public address, and the guard disarmed."""
    if not guard.waiting(host):
        host.noop("nothing waits for its confirmation")
        return
    yield FunctionCommand(_prove, (), {})
