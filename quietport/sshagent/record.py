"""session.json and agent.env: what they hold, and what is believed of them.

session.json (schema 1): id; created_at and expires_at (UTC, for people); ttl_s; deadline_s (the end of the
TTL in seconds since boot, which setting the clock does not change); hosts (destinations that the key is bound
to, [] for any); wrapper, keeper, agent: {pid, start, boot}; status active, stopped, expired or crashed; and,
once the session has ended, ended_at (null when nobody saw it), duration_s, exit_reason, exit_status (of the
command, 128+N for a signal). More keys are left alone: a later version may write them.

agent.env: the lines SSH_AUTH_SOCK=PATH and SSH_AGENT_PID=PID, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from quietport.sshagent.names import ID, MAX_TTL_S, SCHEMA, moment_of
from quietport.sshagent.process import MAX_PID, Process

SESSION_JSON = "session.json"
AGENT_ENV = "agent.env"
# A record on its way; left behind when its writer is killed.
NEW_RECORD = ".session.json.new"
FILES = frozenset({SESSION_JSON, AGENT_ENV, NEW_RECORD})
ENDED = ("stopped", "expired", "crashed")
MAX_BYTES = 1 << 14
_REASON = re.compile(r"[a-z][a-z0-9-]{0,39}")
_BOOT = re.compile(r"[0-9a-f-]{1,64}")
_ENV = re.compile(rb"SSH_AUTH_SOCK=(/[^\n\0]{1,255})\nSSH_AGENT_PID=([1-9][0-9]{0,6})\n")


class InvalidError(ValueError):
    """The content is not what this program writes; says what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """One session. Times are text as names.stamp writes it, or seconds; `deadline_s` is since boot."""

    id: str
    created_at: str
    expires_at: str
    ttl_s: int
    deadline_s: float
    hosts: tuple[str, ...]
    wrapper: Process
    keeper: Process
    agent: Process
    status: str = "active"
    ended_at: str | None = None
    duration_s: float | None = None
    exit_reason: str | None = None
    exit_status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether its end was written down."""
        return self.status in ENDED

    def to_bytes(self) -> bytes:
        """The content of session.json."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n").encode()


def parse_record(data: bytes, *, name: str) -> Record:
    """The record in `data`, the content of session.json in the directory `name`. Raises InvalidError."""
    document = _object(data)
    if document.get("schema") != SCHEMA:
        raise InvalidError(f"it does not say schema {SCHEMA}")
    if document.get("id") != name or ID.fullmatch(name) is None:
        raise InvalidError("its id is not the name of its directory")
    ttl = _integer(document, "ttl_s", 1, MAX_TTL_S)
    record = Record(
        id=name,
        created_at=_moment(document, "created_at"),
        expires_at=_moment(document, "expires_at"),
        ttl_s=ttl,
        deadline_s=_seconds(document.get("deadline_s"), "deadline_s"),
        hosts=_hosts(document.get("hosts")),
        wrapper=_process(document, "wrapper"),
        keeper=_process(document, "keeper"),
        agent=_process(document, "agent"),
        status=_one_of(document, "status", ("active", *ENDED)),
        ended_at=_moment(document, "ended_at") if document.get("ended_at") is not None else None,
        duration_s=_seconds(document["duration_s"], "duration_s") if _has(document, "duration_s") else None,
        exit_reason=_reason(document.get("exit_reason")),
        exit_status=_integer(document, "exit_status", 0, 255) if _has(document, "exit_status") else None,
    )
    lifetime = (moment_of(record.expires_at) - moment_of(record.created_at)).total_seconds()
    if abs(lifetime - ttl) > 0.01:
        raise InvalidError("its TTL and its times contradict each other")
    if record.ended != (record.exit_reason is not None):
        raise InvalidError("its status and its exit_reason contradict each other")
    return record


def agent_env(socket: Path, agent: Process) -> bytes:
    """The content of agent.env."""
    return f"SSH_AUTH_SOCK={socket}\nSSH_AGENT_PID={agent.pid}\n".encode()


def parse_agent_env(data: bytes) -> int:
    """The PID in agent.env. Raises InvalidError."""
    match = _ENV.fullmatch(data)
    if match is None or not 1 < int(match[2]) <= MAX_PID:
        raise InvalidError("agent.env does not hold a socket and a PID")
    return int(match[2])


def load_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises InvalidError for everything else, also for what is nested too deeply."""
    try:
        document = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidError("it is not JSON") from error
    if not isinstance(document, dict):
        raise InvalidError("it is not a JSON object")
    return document


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise InvalidError(f"it is larger than {MAX_BYTES} bytes")
    try:
        return load_object(data.decode())
    except UnicodeDecodeError as error:
        raise InvalidError("it is not UTF-8") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _has(document: Mapping[str, Any], key: str) -> bool:
    return document.get(key) is not None


def _integer(document: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = document.get(key)
    # bool is an int in Python and none in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidError(f"{key} is not a whole number from {least} to {most}")
    return value


def _one_of(document: Mapping[str, Any], key: str, words: Sequence[str]) -> str:
    value = document.get(key)
    if not isinstance(value, str) or value not in words:
        raise InvalidError(f"{key} is none of {', '.join(words)}")
    return value


def _moment(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    try:
        moment_of(value)
    except ValueError as error:
        raise InvalidError(f"{key} is not a time") from error
    return str(value)


def _seconds(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise InvalidError(f"{key} is not a number of seconds")
    return float(value)


def _reason(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or _REASON.fullmatch(value) is None:
        raise InvalidError("exit_reason is not a word")
    return value


def _hosts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(host, str) and len(host) <= 300 for host in value):
        raise InvalidError("hosts is not a list of names")
    return tuple(value)


def _process(document: Mapping[str, Any], key: str) -> Process:
    value = document.get(key)
    if not isinstance(value, dict):
        raise InvalidError(f"{key} is not a process")
    boot = value.get("boot")
    if not isinstance(boot, str) or _BOOT.fullmatch(boot) is None:
        raise InvalidError(f"{key} names no boot")
    start = _integer(value, "start", 0, 1 << 63) if _has(value, "start") else None
    return Process(_integer(value, "pid", 2, MAX_PID), start, boot)
