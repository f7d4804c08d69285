"""`quietport ports` on the operator's side: what the hosts themselves say can be reached there.

With --json one object: {"schema": 1, "ok": no host has a violation and every one answered, "hosts": {NAME:
{"report": what `quietport ports --json` printed there or null, "error": the sentence why not, or ""}}}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from control import asking
from control.errors import QuietportError
from control.reach import open_session
from control.session import Session
from quietport.errors import FINE, PROBLEM, printable
from quietport.ports_cli import table


@dataclass(frozen=True)
class Answer:
    """What one host said: its report, or in `error` the sentence why there is none."""

    name: str
    report: dict[str, Any] | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it answered, and nothing is public there that may not be."""
        return self.report is not None and self.report["ok"] is True

    def text(self) -> str:
        """A heading and the host's listeners."""
        if self.report is None:
            return f"{self.name}: {printable(self.error)}"
        heading = f"{self.name}: {'fine' if self.ok else 'something is public that may not be'}"
        return f"{heading}\n{table(self.report['listeners'])}"


def run(names: Sequence[str], *, as_json: bool) -> int:
    """Ask these hosts, all by default, at once. A host that does not answer is a row, and exit code 1.

    Raises SettingsError for a hosts file that cannot be used or an unknown name.
    """
    answers = asking.everyone(names, ask)
    ok = all(answer.ok for answer in answers)
    if as_json:
        hosts = {answer.name: {"report": answer.report, "error": answer.error} for answer in answers}
        print(json.dumps({"schema": asking.SCHEMA, "ok": ok, "hosts": hosts}))
    else:
        print("\n\n".join(answer.text() for answer in answers))
    return 0 if ok else 1


def ask(name: str) -> Answer:
    """What the host called `name` says. Never raises for a host's sake."""
    try:
        with open_session(name) as session:
            return Answer(name, report=report(session))
    except (QuietportError, TimeoutError, OSError, EOFError) as error:
        return Answer(name, error=asking.why(name, error))


def report(session: Session) -> dict[str, Any]:
    """What `quietport ports --json` prints on the host. Raises as asking.report does."""
    return asking.report(session, "ports", fits=_fits)


def _fits(document: dict[str, Any], code: int) -> bool:
    listeners = document["listeners"]
    agrees = code in (FINE, PROBLEM) and document["ok"] is (code == FINE)
    return agrees and isinstance(listeners, list) and all(isinstance(one, dict) for one in listeners)
