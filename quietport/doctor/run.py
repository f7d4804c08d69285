"""Running the checks at the same time, and what comes of it: rows, a state, a report."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from quietport.doctor.model import Check, CutShortError, Finding, Status
from quietport.errors import FINE, PROBLEM, UNKNOWN, HostProgramError, printable

SCHEMA = 1
# Begins the reason of a SKIP that leaves something unknown; any other SKIP is about what is not there.
COULD_NOT_TELL = "could not tell: "
STATUSES = ("PASS", "WARN", "FAIL", "SKIP")
# A check that hangs must not take the others' answers with it.
FAST_S = 50.0
SLOW_S = 180.0

State = Literal["pass", "warn", "fail", "unknown"]
Now = Callable[[], datetime]


def utc_now() -> datetime:
    """Now, with its zone."""
    return datetime.now(UTC)


def text_of(moment: datetime) -> str:
    """ISO 8601, whole seconds."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def moment_of(text: Any) -> datetime | None:
    """What `text_of` wrote; None for anything else."""
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return None
    return moment if moment.tzinfo else None


@dataclass(frozen=True)
class Row:
    """One finding, of which check it is, and when that looked (UTC, ISO 8601)."""

    check: str
    status: Status
    reason: str
    next_step: str
    at: str

    @property
    def told(self) -> bool:
        """False for a check that could not tell."""
        return not (self.status == "SKIP" and self.reason.startswith(COULD_NOT_TELL))

    def to_json(self) -> dict[str, str]:
        return {
            "check": self.check,
            "status": self.status,
            "reason": self.reason,
            "next_step": self.next_step,
            "at": self.at,
        }


def row(check: str, finding: Finding, at: datetime) -> Row:
    """A finding of `check`. Names in it are the host's, and do not get to steer a terminal."""
    return Row(check, finding.status, printable(finding.reason), printable(finding.next_step), text_of(at))


def unknown(check: str, why: str, at: datetime, *, next_step: str = "") -> Row:
    """The row of a check that could not tell."""
    return row(check, Finding("SKIP", f"{COULD_NOT_TELL}{why}", next_step), at)


def run(
    checks: Sequence[Check],
    declared: Mapping[str, Any],
    *,
    limit_s: float = FAST_S,
    now: Now = utc_now,
) -> dict[str, list[Row]]:
    """Check = its rows, of all `checks`, which run at the same time and for `limit_s` seconds at most."""
    found: dict[str, list[Row]] = {}
    began = now()

    def look(check: Check) -> None:
        at = now()
        try:
            findings = check.look(declared)
            found[check.name] = [row(check.name, finding, at) for finding in findings]
        except CutShortError as error:
            before = [row(check.name, finding, at) for finding in error.found]
            found[check.name] = [*before, unknown(check.name, _sentence(error.why), at)]
        except Exception as error:
            found[check.name] = [unknown(check.name, _sentence(error), at)]

    # Daemons: the program ends although one of them hangs.
    threads = [threading.Thread(target=look, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    done = dict(found)
    late = f"no answer within {limit_s:g} s."
    return {check.name: done.get(check.name) or [unknown(check.name, late, began)] for check in checks}


def _sentence(error: Exception) -> str:
    """Why a check could not tell. A crash is one: it means that nothing was found out."""
    if isinstance(error, HostProgramError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def state_of(rows: Iterable[Row]) -> State:
    """fail when anything is FAIL, else unknown when a check could not tell, else warn, else pass."""
    seen = list(rows)
    statuses = {one.status for one in seen}
    if "FAIL" in statuses:
        return "fail"
    if not all(one.told for one in seen):
        return "unknown"
    return "warn" if "WARN" in statuses else "pass"


def exit_code(state: State) -> int:
    """Of `quietport doctor`: a warning is no problem yet."""
    return {"fail": PROBLEM, "unknown": UNKNOWN}.get(state, FINE)


def report(rows: Sequence[Row], at: datetime) -> dict[str, Any]:
    """The JSON of `quietport doctor --json`: schema, ok (no FAIL, and no check could not tell), state, at,
    checks (one entry a finding: check, status, reason, next_step, at)."""
    state = state_of(rows)
    return {
        "schema": SCHEMA,
        "ok": state in ("pass", "warn"),
        "state": state,
        "at": text_of(at),
        "checks": [one.to_json() for one in rows],
    }


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a report. Raises HostProgramError for a document that is none."""
    entries = document.get("checks")
    found = []
    for entry in entries if isinstance(entries, list) else [None]:
        keys = ("check", "status", "reason", "next_step", "at")
        texts = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts) or texts[1] not in STATUSES:
            raise HostProgramError("a kept result is not one of this version.")
        check, status, reason, step, at = map(str, texts)
        found.append(Row(check, cast(Status, status), printable(reason), printable(step), at))
    return found
