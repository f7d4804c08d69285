"""The status of sessions; and their end, written down once.

    active    it runs                                unknown   session.json is missing or cannot be read
    expired   its TTL ended it                       invalid   session.json is not what this program writes
    stopped   the command ended, or --stop           unsafe    owner, mode or kind of the directory or file
    crashed   wrapper killed, host rebooted, agent or keeper died

What nobody wrote down is told from what can be proved: another boot (host-rebooted), a wrapper that is gone
(wrapper-died), a TTL that is over (ttl), an agent that is gone under a wrapper that is not (agent-died).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from quietport.sshagent import audit
from quietport.sshagent.names import ID, AgentAccessError, moment_of, now, stamp
from quietport.sshagent.process import boot_id, boottime
from quietport.sshagent.record import (
    AGENT_ENV,
    FILES,
    MAX_BYTES,
    NEW_RECORD,
    SESSION_JSON,
    InvalidError,
    Record,
    parse_record,
)
from quietport.sshagent.root import (
    MissingError,
    Root,
    UnsafeError,
    locked,
    names_in,
    open_private,
    read_private,
    staging,
    write_private,
)

STATUSES = ("active", "expired", "stopped", "crashed", "unknown", "invalid", "unsafe")


@dataclass(frozen=True)
class Session:
    """What is known of sessions/`id`: `record` is None unless it is valid, and says what is true now.

    `unwritten` means that the session has ended and its session.json does not say so yet; `cause` is a few
    words on why there is no record.
    """

    id: str
    status: str
    record: Record | None = None
    unwritten: bool = False
    cause: str = ""

    def to_json(self) -> dict[str, Any]:
        """An entry of `--list --json`, null for what is not known. An active one lasts until now."""
        record = self.record
        if record is None:
            keys = ("created_at", "expires_at", "ended_at", "duration_s", "exit_reason", "exit_status")
            return {"id": self.id, "status": self.status, **dict.fromkeys(keys)}
        return {
            "id": self.id,
            "status": self.status,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "ended_at": record.ended_at,
            "duration_s": record.duration_s if record.ended else _since(record),
            "exit_reason": record.exit_reason,
            "exit_status": record.exit_status,
        }


def look(root: Root, name: str) -> Session:
    """What can be said of sessions/`name` now. Never raises for what is wrong with it."""
    try:
        with _opened(root, name) as (_, session):
            return session
    except UnsafeError:
        return Session(name, "unsafe", cause="the directory is not private, or is none")
    except (AgentAccessError, ValueError) as error:
        return Session(name, "unknown", cause=str(error))


def examine(directory: int, name: str, shown: Path) -> Session:
    """The same of an open session directory that was found private."""
    try:
        data = read_private(SESSION_JSON, directory, shown / SESSION_JSON, max_bytes=MAX_BYTES)
    except UnsafeError:
        return Session(name, "unsafe", cause=f"{SESSION_JSON} is not private, or is no file")
    except MissingError:
        return Session(name, "unknown", cause=f"{SESSION_JSON} is missing")
    except AgentAccessError:
        return Session(name, "unknown", cause=f"{SESSION_JSON} cannot be read")
    try:
        record = parse_record(data, name=name)
    except InvalidError as error:
        return Session(name, "invalid", cause=f"{SESSION_JSON}: {error}")
    if record.ended:
        return Session(name, record.status, record)
    end = _proved_end(record)
    if end is None:
        return Session(name, "active", record)
    return Session(name, end.status, end, unwritten=True)


def everything(root: Root) -> tuple[list[Session], str]:
    """All sessions by name; ends that nobody wrote down are written first.

    The second result says why that could not be done, "" when it could: what is listed is true all the same.
    """
    found = [look(root, name) for name in sorted(names_in(root.sessions))]
    late = [session.id for session in found if session.unwritten]
    problem = ""
    if late:
        settled: dict[str, Session] = {}
        try:
            with locked(root):
                trail = audit.read(root)
                for name in late:
                    try:
                        settled[name] = settle_one(root, name, trail)
                    except AgentAccessError as error:
                        problem = str(error)
        except AgentAccessError as error:
            problem = str(error)
        found = [settled.get(session.id, session) for session in found]
    return found, problem


def settle_one(root: Root, name: str, trail: audit.Trail) -> Session:
    """The same of one, with the lock held and the audit in `trail`. Raises AgentAccessError."""
    # Only the lock tells a session that is being ended from one whose agent died.
    session = look(root, name)
    if not session.unwritten:
        return session
    with _opened(root, name) as (directory, session):
        if session.record is None or not session.unwritten:
            return session
        told = trail.end_of(name)
        record = session.record if told is None else _as_told(session.record, told)
        _write_end(root, directory, record, told=told is not None)
        return Session(name, record.status, record)


def publish(root: Root, record: Record, environment: bytes) -> None:
    """Make the directory of a new session, whole or not at all. Raises AgentAccessError."""
    staged = f"new-{record.id}"
    shown = root.path / "staging" / staged
    with locked(root), staging(root) as place:
        sweep(root, place)
        try:
            os.mkdir(staged, 0o700, dir_fd=place)
            directory = open_private(staged, place, shown)
            try:
                write_private(AGENT_ENV, directory, environment, shown / AGENT_ENV)
                write_private(SESSION_JSON, directory, record.to_bytes(), shown / SESSION_JSON)
            finally:
                os.close(directory)
            audit.append(
                root,
                "created",
                record.id,
                ttl_s=record.ttl_s,
                expires_at=record.expires_at,
                hosts=list(record.hosts),
            )
            os.rename(staged, record.id, src_dir_fd=place, dst_dir_fd=root.sessions)
        except OSError as error:
            with suppress(AgentAccessError, OSError):
                sweep(root, place)
            raise AgentAccessError(f"{shown} cannot be made: {error.strerror}.") from error
        except AgentAccessError:
            with suppress(AgentAccessError, OSError):
                sweep(root, place)
            raise


def end(root: Root, record: Record) -> Record:
    """Write down the end of a session, unless somebody did. The lock must be held.

    `record` is the end as the caller saw it; returns the end that is written down. An end that another one
    wrote keeps its reason and gets the command's exit status. Raises AgentAccessError.
    """
    with suppress(MissingError, UnsafeError), _opened(root, record.id) as (directory, session):
        written = session.record
        if written is not None and written.ended and not session.unwritten:
            _note_exit(root, directory, written, record.exit_status)
            return written
        if written is not None:
            _write_end(root, directory, record)
            return record
    told = audit.read(root).end_of(record.id)
    if told is not None:
        return _as_told(record, told)  # stopped and pruned before we came
    _tell(root, record)
    raise AgentAccessError(f"{root.path / 'sessions' / record.id} is not as this program left it.")


def exited(root: Root, name: str, exit_status: int) -> None:
    """Note the exit status of the command of a session that ended before it did. The lock must be held.

    Raises AgentAccessError, MissingError when it was pruned meanwhile.
    """
    with _opened(root, name) as (directory, session):
        if session.record is not None:
            _note_exit(root, directory, session.record, exit_status)


def discard(root: Root, name: str, place: int) -> bool:
    """Take a session away that came to nothing. The lock must be held; `place` is the staging directory.

    Returns whether it is gone. Raises AgentAccessError, OSError.
    """
    with _opened(root, name) as (directory, session):
        if session.record is None or not remove(root, name, directory, place):
            return False
        clear(f"pruned-{name}", place, directory)
        return True


def remove(root: Root, name: str, directory: int, place: int) -> bool:
    """Take sessions/`name` away: the directory that `directory` is open on, or none. The lock must be held.

    `place` is the staging directory. Returns whether it is gone; not so when the name is that of another
    directory by now, or holds what this program did not put there. Raises OSError.
    """
    if not set(names_in(directory)) <= FILES:
        return False
    staged = f"pruned-{name}"
    os.rename(name, staged, src_dir_fd=root.sessions, dst_dir_fd=place)
    if not _is(staged, place, directory):
        # Somebody swapped names between our look and the rename: what we hold now is theirs.
        with suppress(OSError):
            os.rename(staged, name, src_dir_fd=place, dst_dir_fd=root.sessions)
        return False
    return True


def clear(staged: str, place: int, directory: int) -> None:
    """Remove what this program put into a staged session, and the directory. Raises OSError."""
    for file in sorted(FILES):
        with suppress(FileNotFoundError):
            os.unlink(file, dir_fd=directory)
    os.rmdir(staged, dir_fd=place)


def sweep(root: Root, place: int) -> None:
    """Finish what a process that was killed left in the staging directory. The lock must be held.

    Raises AgentAccessError when the audit cannot be written; what cannot be removed stays.
    """
    for staged in names_in(place):
        kind, _, session = staged.partition("-")
        try:
            directory = open_private(staged, place, root.path / "staging" / staged)
        except AgentAccessError:
            continue
        try:
            if kind not in ("new", "pruned") or not _is_of(directory, session):
                continue
            trail = audit.read(root)
            if kind == "pruned" and not trail.has("pruned", session):
                audit.append(root, "pruned", session)
            elif kind == "new" and trail.has("created", session) and not trail.has("crashed", session):
                audit.append(
                    root, "crashed", session, reason="wrapper-died", duration_s=None, exit_status=None
                )
            with suppress(OSError):
                clear(staged, place, directory)
        finally:
            os.close(directory)


def over(record: Record, *, status: str, reason: str, exit_status: int | None, seconds: float) -> Record:
    """`record` at its end, which is now; `seconds` is how long it was active."""
    return replace(
        record,
        status=status,
        ended_at=stamp(now()),
        duration_s=round(max(0.0, seconds), 3),
        exit_reason=reason,
        exit_status=exit_status,
    )


def _proved_end(record: Record) -> Record | None:
    if record.wrapper.boot != boot_id():
        return replace(record, status="crashed", exit_reason="host-rebooted")
    if record.wrapper.gone():
        return replace(record, status="crashed", exit_reason="wrapper-died")
    if record.deadline_s <= boottime():
        # The watch, which goes by this clock, ended the agent; the wrapper is stopped, or about to say so.
        return replace(
            record,
            status="expired",
            ended_at=record.expires_at,
            duration_s=float(record.ttl_s),
            exit_reason="ttl",
        )
    if record.agent.gone():
        return replace(record, status="crashed", exit_reason="agent-died")
    return None


def _as_told(record: Record, event: audit.Event) -> Record:
    """The end as the audit has it: whoever wrote that was killed before it wrote the record."""
    more = event.more
    ended = replace(
        record,
        status=event.event,
        ended_at=None if more.get("duration_s") is None else stamp(event.at),
        duration_s=more.get("duration_s"),
        exit_reason=more.get("reason"),
        exit_status=more.get("exit_status"),
    )
    try:
        return parse_record(ended.to_bytes(), name=record.id)
    except InvalidError:
        return record


def _since(record: Record) -> float:
    passed: float = (now() - moment_of(record.created_at)).total_seconds()
    return round(max(0.0, passed), 3)


def _write_end(root: Root, directory: int, record: Record, *, told: bool = False) -> None:
    # The event first: a writer killed in between finds it there, one killed before finds neither.
    if not told:
        _tell(root, record)
    _write_record(root, directory, record)


def _tell(root: Root, record: Record) -> None:
    audit.append(
        root,
        record.status,
        record.id,
        reason=record.exit_reason,
        duration_s=record.duration_s,
        exit_status=record.exit_status,
    )


def _note_exit(root: Root, directory: int, record: Record, exit_status: int | None) -> None:
    if record.ended and record.exit_status is None and exit_status is not None:
        _write_record(root, directory, replace(record, exit_status=exit_status))


def _write_record(root: Root, directory: int, record: Record) -> None:
    """`directory` is the one that held the record before: its name may be another directory's by now."""
    shown = root.path / "sessions" / record.id / SESSION_JSON
    try:
        with suppress(FileNotFoundError):
            os.unlink(NEW_RECORD, dir_fd=directory)
        write_private(NEW_RECORD, directory, record.to_bytes(), shown)
        os.rename(NEW_RECORD, SESSION_JSON, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        raise AgentAccessError(f"{shown} cannot be replaced: {error.strerror}.") from error


@contextmanager
def _opened(root: Root, name: str) -> Iterator[tuple[int, Session]]:
    """The directory of a session, and what can be said of that very one."""
    shown = root.path / "sessions" / name
    directory = open_private(name, root.sessions, shown)
    try:
        yield directory, examine(directory, name, shown)
    finally:
        os.close(directory)


def _is_of(directory: int, name: str) -> bool:
    """Whether every file in an open directory is of the session `name`, or was not yet filled."""
    if ID.fullmatch(name) is None:
        return False
    try:
        contents = [
            read_private(file, directory, Path(file), max_bytes=MAX_BYTES) for file in names_in(directory)
        ]
    except (AgentAccessError, OSError):
        return False
    return all(not data or name.encode() in data for data in contents)


def _is(name: str, parent: int, directory: int) -> bool:
    try:
        named = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(named, os.fstat(directory))


def new_id(moment: datetime) -> str:
    """A name that no other session has: the time of its start, and chance."""
    return f"{moment:%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"
