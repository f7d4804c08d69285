"""The guard around risky steps: what it holds undoes itself unless a new login proves it in time.

The host's part is quietport/guard, the operator's side of it control/guard.py. operations/gate.py arms and
leads every risky command through it; the operations here begin and end a transaction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pyinfra import logger
from pyinfra.api.command import PyinfraCommand, StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import host

from control import guard, lock
from control.connector import Unanswered
from control.errors import QuietportError
from control.proof import prove, prove_public
from control.session import Way
from facts.guard import Guard
from facts.tailnet import Tailnet
from operations import notes
from operations.common import Commands, executing, fail, one_host_at_most, operation, program, refuse, warn

# Arming copies a few files and makes sure that they are on the disk.
ARM_TIMEOUT_S = 60
UNPROVEN = "the change is not proven, so the guard undoes it: "
# What a plan calls the end of what an earlier run left.
UNDOING = "the undoing of an earlier run"
# Hosts on which this run will arm, or would, were it no dry run.
_planned: set[str] = set()


def forget() -> None:
    """Begin anew, as a new run does."""
    _planned.clear()


def will_be_armed(name: str) -> None:
    """Note that a risky step has something to change on the host called `name`."""
    _planned.add(name)


def who() -> str:
    """What the host is told of who arms."""
    return f"{guard.CONVERGE}{lock.who()} (process {os.getpid()})"


@one_host_at_most
def arm(state: State, host: Host, timeout_s: int, over: Way = "tailnet") -> bool:
    """Arm on this host, once a transaction. Nothing risky is done on a host whose guard does not answer.

    `over` is the way by which the change will be confirmed.
    """
    if guard.armed(host.name) is not None:
        return True
    if not host.get_fact(Guard)["installed"]:
        # The programs were brought before, by this run.
        return fail(
            host,
            "`quietport guard status` does not answer there, and nothing risky is done without a guard: see "
            "what it says, then run again. Nothing was changed.",
        )
    words = ["arm", "--timeout", str(timeout_s), "--by", who(), "--json"]
    words += ["--confirm-over", "any"] if over == "public" else []
    command = program(*guard.argv(*words))
    began = time.monotonic()
    ok, output = host.run_shell_command(command, print_output=False, _timeout=ARM_TIMEOUT_S)
    if not ok:
        if isinstance(output, Unanswered):
            # It may be armed there, with a token nobody here knows; no risky command was run.
            return fail(
                host,
                f"{output.sentence} Nothing was changed; a guard that was armed all the same ends by itself "
                f"within {timeout_s} s.",
            )
        said = guard.last_line(output.stdout.encode(), output.stderr.encode())
        return fail(host, f"{said.removeprefix('quietport guard: ')} Then run again; nothing was changed.")
    armed = guard.parse_armed(output.stdout, now=began)
    guard.note(host.name, armed)
    logger.info(f"{host.print_prefix}guard armed: what is not proven within {timeout_s} s undoes itself")
    return True


def fenced(host: Host, command: PyinfraCommand) -> PyinfraCommand:
    """`command`, run by the guard while this run's token is armed; as it is where nothing is."""
    armed = guard.armed(host.name)
    if armed is None or not isinstance(command, StringCommand):
        return command
    words = guard.argv("exec", armed.token, "--")
    command.bits = (" ".join(words), StringCommand(*command.bits))
    return command


def prove_and_confirm(host: Host, *, problems: Callable[[], list[str]] = list, over: Way = "tailnet") -> bool:
    """A new login, by `over`, proves the change and disarms the guard; the run goes on over that one.

    `problems` reads over the new connection what must hold besides; it is not confirmed while one is left.
    """
    armed = guard.armed(host.name)
    if armed is None:
        return True
    if over == "public":
        proof = prove_public(host.name)
    else:
        proof = prove(host.name, addresses=host.get_fact(Tailnet)["addresses"])
    if not proof.ok or proof.session is None:
        return fail(host, f"{UNPROVEN}{_without_name(host, proof.sentence)}")
    try:
        host.connector.switch(proof.session)  # type: ignore[attr-defined]
    except (QuietportError, TimeoutError) as error:
        proof.session.close()
        return fail(host, f"{UNPROVEN}{_without_name(host, str(error))}")
    if found := problems():
        return fail(host, f"{UNPROVEN}{'; '.join(found)}.")
    guard.confirm(proof.session, armed.token)
    guard.note(host.name, None)
    logger.info(f"{host.print_prefix}{_without_name(host, proof.sentence)} Guard disarmed.")
    return True


def _without_name(host: Host, sentence: str) -> str:
    return sentence.removeprefix(f"{host.name}: ")


@one_host_at_most
def proven(state: State, host: Host) -> bool:
    """For a transaction of one step: what changed is proven by the new login alone."""
    return prove_and_confirm(host)


@operation()
def none_left() -> Commands:
    """No change of an earlier run waits for its confirmation: one of a run that died is undone now.

    Refused, with who and since when, while somebody's own `quietport guard run` waits.
    """
    armed = host.get_fact(Guard)["armed"]
    if armed is None:
        host.noop("nothing waits for its confirmation")
        return
    if not armed["by"].startswith(guard.CONVERGE):
        yield refuse(
            f"a guarded change by {armed['by']} waits for its confirmation since {armed['since']}. Confirm "
            f"it, or wait {armed['left_s']} s until it undoes itself, then run again."
        )
        return
    notes.because(f"a {armed['by']} left a change that waits for its confirmation")
    notes.unknown("what firewall and ssh need is known once that is undone")
    notes.brings(UNDOING)
    warn(f"a {armed['by']} ended without proving its change, which is undone first")
    yield program(*guard.argv("rollback", armed["token"]), timeout=int(guard.ROLLBACK_S + guard.ANSWER_S))


def waiting(host: Host) -> bool:
    """Whether something waits for its confirmation, or would, were this no dry run."""
    return guard.armed(host.name) is not None if executing() else host.name in _planned
