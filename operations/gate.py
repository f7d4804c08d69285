"""The gate before every step that can cut the operator off.

A risky step is run only when a new SSH connection through the tailnet, keys only and accepted by sshd itself,
has just succeeded; that connection then carries the rest of the run, so that closing the public side cannot
cut it. Then the host's guard is armed (operations/guard.py), and every risky command runs under it: what is
not proven over another new login afterwards undoes itself. `fenced` is the one place they all pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from pyinfra import logger
from pyinfra.api.command import FunctionCommand, PyinfraCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State

from control.errors import QuietportError
from control.proof import prove
from control.settings import settings_for
from facts.tailnet import Tailnet
from operations import guard, notes, tailnet
from operations.common import Commands, one_host_at_most

# A proof is believed that long: the steps of one run follow each other closely, and none of them is free.
PROOF_LASTS_S = 60
# None of the steps takes long; one that does is stuck, and better known soon.
RISKY_TIMEOUT_S = 120
# What the proof of a change may take after its last command.
PROOF_TIME_S = 60

_proved: dict[str, float] = {}


@dataclass(frozen=True)
class Refusal:
    """Why the gate stays shut, as a sentence."""

    sentence: str


def risky(host: Host, commands: Iterable[PyinfraCommand]) -> Commands:
    """Yield the proof, the arming, then `commands`, each with a time limit. The host fails when one does.

    A part of the run's last transaction, which `operations.proven.stays` ends.
    """
    guard.will_be_armed(host.name)
    notes.after(guard.UNDOING)
    yield from _guarded(host, commands)


def risky_if_tailnet(host: Host, commands: Iterable[PyinfraCommand]) -> Commands:
    """As `risky` on a host that is reached over the tailnet already; else `commands` as they are.

    A transaction of its own, proven at once, whose time is long enough for its longest command.
    """
    notes.after(guard.UNDOING)
    if reached_by(host) == "tailnet":
        commands = list(commands)
        limits = [command.connector_arguments.get("_timeout", 0) for command in commands]
        yield from _guarded(host, commands, timeout_s=max(limits, default=0) + PROOF_TIME_S)
        yield FunctionCommand(guard.proven, (), {})
    else:
        yield from commands


def _guarded(host: Host, commands: Iterable[PyinfraCommand], *, timeout_s: int = 0) -> Commands:
    yield FunctionCommand(_pass_gate, (), {})
    yield FunctionCommand(guard.arm, (max(timeout_s, settings_for(host.name).guard_timeout),), {})
    for command in commands:
        yield fenced(host, command)


def fenced(host: Host, command: PyinfraCommand) -> PyinfraCommand:
    """`command` as a risky one runs: with a time limit, and by the guard while it is armed."""
    arguments: Any = command.connector_arguments
    arguments.setdefault("_timeout", RISKY_TIMEOUT_S)
    return guard.fenced(host, command)


def reached_by(host: Host) -> str:
    """The way the host's live connection takes: public or tailnet. Connectors without ways are public."""
    session = getattr(host.connector, "session", None)
    return str(getattr(session, "way", "public"))


def forget_proofs() -> None:
    """The next risky step proves the tailnet connection anew."""
    _proved.clear()


@one_host_at_most
def _pass_gate(state: State, host: Host) -> bool:
    refusal = _shut(host)
    if refusal is None:
        return True
    _proved.pop(host.name, None)
    sentence = f"{host.name}: refused: {refusal.sentence}"
    logger.error(f"{host.print_prefix}{click.style(sentence, fg='red')}")
    return False


def _shut(host: Host) -> Refusal | None:
    state = host.get_fact(Tailnet)
    reason = tailnet.blocking_reason(state, settings_for(host.name))
    if reason is not None:
        return Refusal(reason)
    proved_at = _proved.get(host.name)
    fresh = proved_at is not None and time.monotonic() - proved_at < PROOF_LASTS_S
    return None if fresh and reached_by(host) == "tailnet" else _prove(host, state["addresses"])


def _prove(host: Host, addresses: Sequence[str]) -> Refusal | None:
    proof = prove(host.name, addresses=addresses)
    sentence = proof.sentence.removeprefix(f"{host.name}: ")
    if not proof.ok or proof.session is None:
        return Refusal(sentence)
    try:
        host.connector.switch(proof.session)  # type: ignore[attr-defined]
    except QuietportError as error:
        proof.session.close()
        return Refusal(str(error).removeprefix(f"{host.name}: "))
    _proved[host.name] = time.monotonic()
    logger.info(f"{host.print_prefix}{sentence}")
    return None
