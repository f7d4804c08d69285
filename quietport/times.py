"""Times as a host prints them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

# Microseconds in UTC: whole seconds would call a service stale that was restarted within the same second.
SHOW_START = "systemctl show --timestamp=us+utc -p MainPID -p ExecMainStartTimestamp"


def properties(text: str) -> dict[str, str]:
    """NAME=value lines of `systemctl show`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value for name, _, value in pairs}


def started_at(value: str) -> float | None:
    """Seconds since the epoch from what `systemctl show --timestamp=us+utc` prints, else None."""
    try:
        return datetime.strptime(value.strip(), "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def read_at(shown: Mapping[str, str]) -> float | None:
    """When a service last read its files, by a start or a reload, from what `systemctl show` says of
    MainPID, ExecMainStart-, ActiveEnter- and StateChangeTimestamp; None when it does not run.

    A reload keeps the process, and changes the unit's state once more after the start.
    """
    if not int(shown.get("MainPID") or 0):
        return None
    events = ("ExecMainStart", "ActiveEnter", "StateChange")
    started, entered, last = (started_at(shown.get(f"{event}Timestamp", "")) for event in events)
    reloaded = started is not None and entered is not None and last is not None and last > entered
    return last if reloaded else started


def newest(text: str, *, now: float) -> float | None:
    """The newest of the times (seconds since the epoch, one a line) that is not in the future.

    A file from the future (the clock was wrong once) would make its service stale for ever.
    """
    times = [float(line) for line in text.split() if line.replace(".", "", 1).isdigit()]
    return max((time for time in times if time <= now), default=None)


def stale(started: float | None, changed: float | None) -> bool:
    """True when what runs began before its configuration changed."""
    return started is not None and changed is not None and started < changed
