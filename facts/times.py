"""Times as a host prints them."""

from __future__ import annotations

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


def newest(text: str, *, now: float) -> float | None:
    """The newest of the times (seconds since the epoch, one a line) that is not in the future.

    A file from the future (the clock was wrong once) would make its service stale for ever.
    """
    times = [float(line) for line in text.split() if line.replace(".", "", 1).isdigit()]
    return max((time for time in times if time <= now), default=None)


def stale(started: float | None, changed: float | None) -> bool:
    """True when what runs began before its configuration changed."""
    return started is not None and changed is not None and started < changed
