"""`quietport ports` on the operator's side: what the hosts themselves say can be reached there.

With --json one object: {"schema": 1, "ok": no host has a violation and every one answered, "hosts": {NAME:
{"report": what `quietport ports --json` printed there or null, "error": the sentence why not, or ""}}}.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from control.errors import QuietportError
from control.guard import LAUNCHER, last_line
from control.reach import open_session
from control.session import Result
from control.settings import fleet, settings_for
from quietport.errors import FINE, PROBLEM, printable
from quietport.ports_cli import table

SCHEMA = 1
ANSWER_S = 60.0
AT_ONCE = 8
_NOT_FOUND = 127


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
    chosen = list(dict.fromkeys(names)) or list(fleet().hosts)
    for name in chosen:
        settings_for(name)
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        answers = list(pool.map(ask, chosen))
    ok = all(answer.ok for answer in answers)
    if as_json:
        hosts = {answer.name: {"report": answer.report, "error": answer.error} for answer in answers}
        print(json.dumps({"schema": SCHEMA, "ok": ok, "hosts": hosts}))
    else:
        print("\n\n".join(answer.text() for answer in answers))
    return 0 if ok else 1


def ask(name: str) -> Answer:
    """What the host called `name` says. Never raises for a host's sake."""
    try:
        with open_session(name) as session:
            return parse(name, session.run(shlex.join([LAUNCHER, "ports", "--json"]), timeout=ANSWER_S))
    except (QuietportError, TimeoutError, OSError, EOFError) as error:
        return Answer(name, error=str(error).removeprefix(f"{name}: "))


def parse(name: str, done: Result) -> Answer:
    """The answer in what the program printed on the host."""
    if done.exit_code == _NOT_FOUND:
        return Answer(name, error=f"it has no quietport program yet. Converge it: quietport apply {name}")
    if done.exit_code not in (FINE, PROBLEM):
        return Answer(name, error=f"it could not tell: {last_line(done.stdout, done.stderr)}")
    try:
        report = json.loads(done.stdout)
        listeners = report["listeners"]
        understood = report["schema"] == SCHEMA and all(isinstance(one, dict) for one in listeners)
        agrees = report["ok"] is (done.exit_code == FINE)
    except (ValueError, KeyError, TypeError):
        understood = agrees = False
    if not (understood and agrees):
        return Answer(name, error="its report is not understood; its programs may be of another version.")
    return Answer(name, report=report)
