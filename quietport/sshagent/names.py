"""Names, limits and the error that agent access shares."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import UTC, datetime

from quietport.errors import HostProgramError, printable

PROGRAM = "codex-openclaw-ssh-agent"
EVIDENCE_PROGRAM = f"{PROGRAM}-ttl-evidence"
KEY_VARIABLE = "OPENCLAW_SSH_PRIVATE_KEY"
SESSION_VARIABLE = "CODEX_OPENCLAW_SSH_AGENT_SESSION"
SCHEMA = 1
# systemd-logind keeps one file a user there (loginctl(1), enable-linger).
LINGER = "/var/lib/systemd/linger"
# The wrapper's own failure, as of timeout(1) and env(1): a command's exit status is rarely 125.
FAILED = 125
DEFAULT_TTL_S = 30 * 60
MAX_TTL_S = 24 * 60 * 60
ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")


class AgentAccessError(HostProgramError):
    """Agent access refuses, or could not do what it was asked for. A sentence; exit code 125."""

    def __init__(self, sentence: str, *, code: int = FAILED) -> None:
        super().__init__(sentence, code=code)


def complain(sentence: str) -> None:
    """One line on standard error. Never raises: who listened may have gone."""
    with suppress(OSError):
        os.write(2, f"{PROGRAM}: {printable(sentence)}\n".encode(errors="replace"))


def now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def stamp(moment: datetime) -> str:
    """A moment as the files hold it: UTC, ISO 8601, milliseconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def moment_of(text: object) -> datetime:
    """The moment that `stamp` wrote. Raises ValueError for everything else."""
    if not isinstance(text, str) or _TIME.fullmatch(text) is None:
        raise ValueError("not a time as this program writes it")
    return datetime.fromisoformat(text)


def seconds_of(text: str) -> int:
    """Seconds of "90", "90s", "30m", "2h" or "7d". Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("not a duration")
    return int(match[1]) * _UNITS[match[2]]


def duration(seconds: int) -> str:
    """`seconds` as `seconds_of` reads them, in the largest unit that divides them."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0 and (unit != "d" or seconds > MAX_TTL_S):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
