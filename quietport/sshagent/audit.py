"""audit.jsonl: what happened to sessions, one JSON object a line; and the same in the journal.

A line: schema 1, at (UTC), event (created, key_loaded, stopped, crashed, expired, pruned), id. created has
ttl_s, expires_at and hosts; stopped, crashed and expired have reason, duration_s and exit_status, null when
nobody knows. Never key material, never the command or its arguments.

A line is appended whole with the lock of the root held. The line of a writer that was killed in the middle
may be torn: the next writer ends it, readers count it as damaged. A file of 1 MiB, or whose first line is 30
days old, gets the time into its name and a new one is begun; it goes 90 days after that.
"""

from __future__ import annotations

import json
import os
import re
import syslog
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from quietport.errors import printable
from quietport.sshagent.names import ID, PROGRAM, SCHEMA, AgentAccessError, moment_of, now, stamp
from quietport.sshagent.record import InvalidError, load_object
from quietport.sshagent.root import MissingError, Root, check_private_file, names_in, read_private

AUDIT = "audit.jsonl"
EVENTS = frozenset({"created", "key_loaded", "stopped", "crashed", "expired", "pruned"})
ENDS = frozenset({"stopped", "crashed", "expired"})
ROTATE_BYTES = 1 << 20
ROTATE_AFTER = timedelta(days=30)
KEEP = timedelta(days=90)
MAX_LINE = 1 << 14
# Nothing of ours grows to this; a reader must not be made to read for ever.
MAX_FILE = 64 << 20
_ROTATED = re.compile(r"audit-([0-9]{8}T[0-9]{6}Z)-[0-9a-f]{8}\.jsonl")


@dataclass(frozen=True)
class Event:
    """One line of the audit. `more` holds what belongs to this event alone."""

    at: datetime
    event: str
    id: str
    more: dict[str, Any]

    def line(self) -> str:
        """The line, without its end."""
        return json.dumps(
            {"schema": SCHEMA, "at": stamp(self.at), "event": self.event, "id": self.id, **self.more}
        )


@dataclass(frozen=True)
class Trail:
    """All that the audit holds, the oldest first, and how many of its lines could not be understood."""

    events: list[Event]
    damaged: int

    def has(self, event: str, session: str) -> bool:
        """Whether the event of a session is in it."""
        return (event, session) in self._known

    def end_of(self, session: str) -> Event | None:
        """The event that ended a session; None when none did."""
        return self._ends.get(session)

    @cached_property
    def _ends(self) -> dict[str, Event]:
        return {one.id: one for one in reversed(self.events) if one.event in ENDS}

    @cached_property
    def _known(self) -> set[tuple[str, str]]:
        return {(one.event, one.id) for one in self.events}


def append(root: Root, event: str, session: str, **more: Any) -> None:
    """Write an event down and tell the journal. The lock must be held. Raises AgentAccessError."""
    line = Event(now(), event, session, more).line()
    shown = root.path / AUDIT
    try:
        _rotate(root)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(AUDIT, flags, 0o600, dir_fd=root.fd)
        try:
            status = os.fstat(descriptor)
            check_private_file(status, shown)
            torn = status.st_size > 0 and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line.encode() + b"\n"
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(0, "there was no room for a whole line")
                os.fdatasync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, status.st_size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AgentAccessError(f"{shown} cannot be written: {error.strerror}.") from error
    _to_journal(line)


def read(root: Root) -> Trail:
    """The whole audit. Raises AgentAccessError, UnsafeError."""
    events: list[Event] = []
    damaged = 0
    for name in [*sorted(_rotated(root)), AUDIT]:
        shown = root.path / name
        try:
            data = read_private(name, root.fd, shown, max_bytes=MAX_FILE)
        except MissingError:
            continue
        if len(data) > MAX_FILE:
            raise AgentAccessError(f"{shown} is larger than {MAX_FILE >> 20} MiB: look at it yourself.")
        for line in data.split(b"\n"):
            if not line:
                continue
            try:
                events.append(parse_line(line))
            except InvalidError:
                damaged += 1
    return Trail(events, damaged)


def parse_line(line: bytes) -> Event:
    """One line of the audit, without its end. Raises InvalidError."""
    if len(line) > MAX_LINE:
        raise InvalidError("it is too long")
    try:
        document = load_object(line.decode())
        at = moment_of(document.get("at"))
    except ValueError as error:
        raise InvalidError("it is no event") from error
    event, session = document.get("event"), document.get("id")
    if document.get("schema") != SCHEMA or event not in EVENTS or not isinstance(session, str):
        raise InvalidError("it is no event of this schema")
    if ID.fullmatch(session) is None:
        raise InvalidError("it names no session")
    more = {key: value for key, value in document.items() if key not in ("schema", "at", "event", "id")}
    return Event(at, str(event), session, more)


def _rotated(root: Root) -> list[str]:
    return [name for name in names_in(root.fd) if _ROTATED.fullmatch(name)]


def _rotate(root: Root) -> None:
    try:
        descriptor = os.open(
            AUDIT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root.fd
        )
    except FileNotFoundError:
        return
    try:
        status = os.fstat(descriptor)
        check_private_file(status, root.path / AUDIT)
        due = status.st_size >= ROTATE_BYTES or _is_old(os.pread(descriptor, MAX_LINE, 0))
    finally:
        os.close(descriptor)
    if not due:
        return
    moment = now()
    name = f"audit-{moment:%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}.jsonl"
    os.rename(AUDIT, name, src_dir_fd=root.fd, dst_dir_fd=root.fd)
    for old in _rotated(root):
        match = _ROTATED.fullmatch(old)
        if match and _named_moment(match[1]) < moment - KEEP:
            os.unlink(old, dir_fd=root.fd)


def _named_moment(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def _is_old(beginning: bytes) -> bool:
    for line in beginning.split(b"\n"):
        with suppress(InvalidError):
            return parse_line(line).at < now() - ROTATE_AFTER
    return False


def _to_journal(line: str) -> None:
    syslog.openlog(PROGRAM, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, printable(line))
