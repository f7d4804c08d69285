"""The note that this host was opened by hand (`quietport open`), and the pause of the address follower.

/etc/quietport/opened.json, schema 1: since (UTC, ISO 8601), until (seconds since 1970), public_before (sshd
was on every address already, by break-glass), replaced (rules of ufw that ours took the place of), said (why
it was not closed when its time was over).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quietport.errors import HostProgramError
from quietport.hostfile import HostFileError, HostFileMissingError, read_bytes, write_atomic
from quietport.sshd_follow import PAUSED

OPENED = Path("/etc/quietport/opened.json")
SCHEMA = 1


@dataclass(frozen=True)
class Opened:
    """Since when, until when, and what closing has to know."""

    since: str = "an unknown time"
    until: float = 0.0
    public_before: bool = False
    replaced: tuple[str, ...] = ()
    said: str = ""

    def sentence(self) -> str:
        """For whoever looks."""
        return f"opened by hand since {self.since}, at least until {at(self.until)}"


Place = Callable[[str], Path]


def _here(path: str) -> Path:
    return Path(path)


def at(seconds: float) -> str:
    """A time of the epoch for people: UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


def parse(data: bytes) -> Opened:
    """The content of OPENED. One that cannot be read is a note too, whose time is over."""
    try:
        document: Any = json.loads(data)
        return Opened(
            since=str(document["since"]),
            until=float(document["until"]),
            public_before=document["public_before"] is True,
            replaced=tuple(map(str, document["replaced"])),
            said=str(document["said"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Opened()


def read(place: Place = _here) -> Opened | None:
    """The note; None where the host was not opened by hand. One that others could have written is no note."""
    try:
        return parse(read_bytes(place(str(OPENED))))
    except HostFileMissingError:
        return None
    except HostFileError:
        return None


def write(opened: Opened, place: Place = _here) -> None:
    """Write the note, which sshd's start believes, and pause the follower. Raises HostFileError."""
    text = json.dumps({"schema": SCHEMA, **asdict(opened)}, indent=2) + "\n"
    write_atomic(place(str(OPENED)), text.encode(), mode=0o644)
    paused = {"why": "opened by hand (`quietport open`); `quietport close` ends it", "until": None}
    write_atomic(place(str(PAUSED)), (json.dumps(paused) + "\n").encode(), mode=0o644)


def forget(place: Place = _here) -> None:
    """Take both away, the note last: what is found half closed is closed again. Raises HostProgramError."""
    for path in (PAUSED, OPENED):
        try:
            place(str(path)).unlink(missing_ok=True)
        except OSError as error:
            raise HostProgramError(f"{path} cannot be removed: {error.strerror}.") from error
