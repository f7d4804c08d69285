"""--stop ID: the keys and the agent of a session end; its command goes on.

What is printed: STOPPED ID, or ALREADY_ENDED ID when there was no agent any more.
"""

from __future__ import annotations

import os
import time

from quietport.sshagent import audit, sessions
from quietport.sshagent.names import ID, AgentAccessError, moment_of, now
from quietport.sshagent.process import end
from quietport.sshagent.record import Record
from quietport.sshagent.root import Root, locked

GRACE_S = 3.0


def stop(root: Root, name: str) -> str:
    """End the session `name`; returns the word that is printed. Raises AgentAccessError.

    A process is signalled only while it is certain that the PID is the agent's.
    """
    if ID.fullmatch(name) is None:
        raise AgentAccessError("That is not the id of a session: --list shows them.")
    with locked(root):
        session = sessions.settle_one(root, name, audit.read(root))
        record = session.record
        if record is None:
            raise AgentAccessError(f"The session {name} is {session.status}: {session.cause}.")
        if record.agent.gone():
            return "ALREADY_ENDED"
        agent = _handle(record)
        if agent is None:
            raise AgentAccessError(
                f"Whether PID {record.agent.pid} is the agent of {name} cannot be proved: nothing was done."
            )
        try:
            if not record.ended:
                seconds = (now() - moment_of(record.created_at)).total_seconds()
                sessions.end(
                    root,
                    sessions.over(
                        record, status="stopped", reason="stop-requested", exit_status=None, seconds=seconds
                    ),
                )
            if not end(agent, grace_s=GRACE_S):
                raise AgentAccessError(f"The agent with PID {record.agent.pid} cannot be ended.")
        finally:
            os.close(agent)
    # It is gone for kill(2) only when its parent's parent has waited for it.
    deadline = time.monotonic() + GRACE_S
    while not record.agent.gone() and time.monotonic() < deadline:
        time.sleep(0.005)
    return "STOPPED"


def _handle(record: Record) -> int | None:
    """A descriptor of the agent (pidfd_open(2)); None when it is not certain to be the agent.

    It is when its own start time says so, or while its parent lives: the keeper waits for no child, so
    nobody else can have the PID. With hidepid only the keeper is shown.
    """
    try:
        agent = os.pidfd_open(record.agent.pid)
    except OSError:
        return None
    if record.agent.proved() or record.keeper.proved():
        return agent
    os.close(agent)
    return None
