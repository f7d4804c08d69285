"""What host programs raise, and the exit codes they share."""

from __future__ import annotations

FINE = 0
PROBLEM = 1
USAGE = 2
UNKNOWN = 3
# 128 and SIGINT, as a shell has it.
INTERRUPTED = 130


class HostProgramError(Exception):
    """A sentence for the journal; `code` is the exit code: PROBLEM, or UNKNOWN (could not tell)."""

    def __init__(self, sentence: str, *, code: int = UNKNOWN) -> None:
        self.code = code
        super().__init__(sentence)


def printable(text: str, *, limit: int | None = None) -> str:
    """`text`, or `limit` characters of it, without those that steer a terminal: names of processes and files
    are not ours to trust."""
    return "".join(character if character.isprintable() else "?" for character in text[:limit])
