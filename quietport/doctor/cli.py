"""`quietport doctor`: is this host what it was declared to be, and what to do where it is not.

It changes nothing. What takes long to find out is what the hourly timer found.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from quietport.converging import converging
from quietport.doctor import history, notify
from quietport.doctor.checks import CHECKS
from quietport.doctor.place import name_of
from quietport.doctor.run import (
    FAST_S,
    SLOW_S,
    Row,
    exit_code,
    moment_of,
    report,
    run,
    state_of,
    text_of,
    utc_now,
)
from quietport.errors import FINE, HostProgramError
from quietport.hostfile import NOTIFY_COMMAND, host_settings
from quietport.table import aligned

# What a converge has done half of is no news.
AT_WORK = "A converge is at work here: whether the state has changed is told by a run after it."
# What was looked at within that time of the report needs no time of its own.
_MOMENT = timedelta(minutes=1)


def main(argv: list[str]) -> int:
    """Exit code 0 when nothing is FAIL (warnings included), 1 when something is, 3 when a check could not
    tell and nothing is FAIL. --record: 0 when the result was kept, whatever it is."""
    parser = argparse.ArgumentParser(
        prog="quietport doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--record",
        action="store_true",
        help="look at what takes long too, keep the result, and run notify_command if the state has changed "
        "(for the timer)",
    )
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        raise HostProgramError("only root sees enough of the host; run it with sudo.")
    declared = host_settings()
    at_work = options.record and converging()
    at = utc_now()
    rows = everything(declared) if options.record else now(declared, at)
    document = report(rows, at)
    text = table(rows, name=name_of(declared), at=at)
    # A disk that is full or broken keeps nothing, and that is what somebody must be told.
    problems = _failing(lambda: history.keep(document, at)) if options.record else []
    print(json.dumps(document) if options.json else text)
    state = state_of(rows)
    if not options.record:
        return exit_code(state)

    def tell() -> None:
        command = [str(word) for word in declared.get(NOTIFY_COMMAND) or []]
        if command and (at_work or converging()):
            said = AT_WORK
        else:
            said = notify.if_changed(command, state, text, name=name_of(declared), at=at)
        if said and not options.json:
            print(said)

    problems += _failing(tell)
    if problems:
        raise HostProgramError(" ".join(problems))
    return FINE


def _failing(step: Callable[[], None]) -> list[str]:
    """Why `step` could not be done; nothing when it was."""
    try:
        step()
    except HostProgramError as error:
        return [str(error)]
    return []


def everything(declared: Mapping[str, Any]) -> list[Row]:
    """Every check, the slow ones too."""
    found = run(CHECKS, declared, limit_s=SLOW_S)
    return [row for check in CHECKS for row in found[check.name]]


def now(declared: Mapping[str, Any], at: datetime) -> list[Row]:
    """The checks that take a moment, and what was kept of the others."""
    found = run([check for check in CHECKS if not check.slow], declared, limit_s=FAST_S)
    found |= history.told([check for check in CHECKS if check.slow], at)
    return [row for check in CHECKS for row in found[check.name]]


def table(rows: Sequence[Row], *, name: str, at: datetime) -> str:
    """The rows for a reader, and below what is to be done about those that have a next step."""
    shown = aligned(
        [("CHECK", "STATUS", "REASON"), *((row.check, row.status, _reason(row, at)) for row in rows)]
    )
    steps = list(dict.fromkeys(f"{row.check}: {row.next_step}" for row in rows if row.next_step))
    below = ["", "Next steps:", *steps] if steps else []
    return "\n".join([f"{name}: {state_of(rows)}, {text_of(at)}", "", *shown, *below])


def _reason(row: Row, at: datetime) -> str:
    # Of what the timer found out, another time, the time counts.
    moment = moment_of(row.at)
    by_timer = moment is None or abs(at - moment) > _MOMENT
    return f"{row.reason} ({row.at})" if by_timer else row.reason
