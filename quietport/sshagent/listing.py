"""--list, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quietport.errors import printable
from quietport.sshagent import sessions
from quietport.sshagent.names import SCHEMA, complain
from quietport.sshagent.root import Root
from quietport.sshagent.sessions import Session


def show(root: Root, *, as_json: bool) -> None:
    """Print all sessions; ends that nobody wrote down are written first."""
    found, problem = sessions.everything(root)
    print(list_json(found) if as_json else list_text(found))
    if problem:
        complain(f"The end of a session cannot be written down: {problem}")


def list_json(found: Sequence[Session]) -> str:
    """{"schema": 1, "sessions": [...]}, see Session.to_json for the keys of an entry."""
    return json.dumps({"schema": SCHEMA, "sessions": [session.to_json() for session in found]}, indent=1)


def list_text(found: Sequence[Session]) -> str:
    """The same for people, a line a session."""
    lines = [f"{'ID':25} {'STATUS':8} {'EXPIRES':24} {'LASTED':>10}  WHY"]
    for session in found:
        entry = session.to_json()
        lasted = "" if entry["duration_s"] is None else f"{entry['duration_s']:.0f} s"
        why = entry["exit_reason"] or session.cause
        if entry["exit_status"] is not None:
            why += f" (exit status {entry['exit_status']})"
        line = f"{printable(session.id):25} {session.status:8} {entry['expires_at'] or '':24} {lasted:>10}"
        lines.append(f"{line}  {printable(why)}")
    return "\n".join(line.rstrip() for line in lines)
