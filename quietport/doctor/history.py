"""Results that are kept: the latest, which tells what is slow to find out, and those of the last 30 days.

Below /var/lib/quietport/doctor (root alone): latest.json and runs/YYYYMMDDTHHMMSSZ.json are reports as
`quietport doctor --json` prints them (0640).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from quietport.doctor.model import Check, Finding
from quietport.doctor.place import FOLDER, LATEST_NAME, LOOK_AGAIN
from quietport.doctor.run import Row, moment_of, row, rows_of, unknown
from quietport.errors import HostProgramError
from quietport.hostfile import HostFileMissingError, read_json, write_atomic

RUNS = "runs"
KEPT = timedelta(days=30)
# The timer is hourly.
OLD = timedelta(hours=3)
# A result of later than that has been written by another clock.
AHEAD = timedelta(minutes=5)
_STAMP = "%Y%m%dT%H%M%SZ"
_MODE = 0o640


def latest(folder: Path = FOLDER) -> dict[str, Any] | None:
    """The last result that was kept; None while there is none. Raises HostProgramError."""
    try:
        return read_json(folder / LATEST_NAME)
    except HostFileMissingError:
        return None


def keep(document: Mapping[str, Any], at: datetime, *, folder: Path = FOLDER) -> None:
    """Keep this result as the latest and for 30 days, and drop what is older. Raises HostProgramError."""
    try:
        for place in (folder, folder / RUNS):
            place.mkdir(mode=0o750, exist_ok=True)
    except OSError as error:
        raise HostProgramError(f"{error.filename} cannot be made: {error.strerror}.") from error
    text = (json.dumps(document, indent=1) + "\n").encode()
    stamp = at.astimezone(UTC).strftime(_STAMP)
    write_atomic(folder / RUNS / f"{stamp}.json", text, mode=_MODE)
    write_atomic(folder / LATEST_NAME, text, mode=_MODE)
    prune(at, folder=folder)


def prune(at: datetime, *, folder: Path = FOLDER) -> None:
    """Remove the results from before the last 30 days. Raises HostProgramError."""
    try:
        for file in (folder / RUNS).iterdir():
            moment = _stamped(file)
            if moment is not None and at - moment > KEPT:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise HostProgramError(f"{error.filename} cannot be pruned: {error.strerror}.") from error


def _stamped(file: Path) -> datetime | None:
    """When the run of a kept result was; None for any other file."""
    if file.suffix != ".json":
        return None
    try:
        return datetime.strptime(file.stem, _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def told(checks: Sequence[Check], at: datetime, *, folder: Path = FOLDER) -> dict[str, list[Row]]:
    """Check = its rows of the last result that was kept, for checks that take too long to run now.

    An old result is a warning; what was wrong then, or could not be told, is believed to be so still.
    """
    try:
        document = latest(folder)
        kept = [] if document is None else rows_of(document)
    except HostProgramError as error:
        return {check.name: [unknown(check.name, str(error), at, next_step=LOOK_AGAIN)] for check in checks}
    return {check.name: _told(check.name, kept, at) for check in checks}


def _told(name: str, kept: Sequence[Row], at: datetime) -> list[Row]:
    rows = [one for one in kept if one.check == name]
    if not rows:
        return [row(name, Finding("SKIP", "Not looked at yet.", LOOK_AGAIN), at)]
    moment = moment_of(rows[0].at)
    if moment is not None and -AHEAD <= at - moment <= OLD:
        return rows
    why = f"Looked at last on {rows[0].at}, which is not within the last {OLD.seconds // 3600} hours."
    still = [one for one in rows if one.status == "FAIL" or not one.told]
    return [row(name, Finding("WARN", why, LOOK_AGAIN), at), *still]
