"""One shell command that carries the output of several, and how it is taken apart again."""

from __future__ import annotations

import base64
import binascii
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from pyinfra.api.exceptions import FactProcessError

T = TypeVar("T")


def one_host_at_most(process: Callable[[Any, list[str]], T]) -> Callable[[Any, list[str]], T]:
    """For `process` of a fact: whatever a host prints, at most that host fails.

    pyinfra fails the host for FactProcessError; any other exception would end the run for all of them.
    """

    @wraps(process)
    def careful(fact: Any, output: list[str]) -> T:
        try:
            return process(fact, output)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FactProcessError(f"the host's answer is not understood ({error})") from error

    return careful


@dataclass(frozen=True)
class Section:
    """What one of the commands printed, to the byte, and its exit code."""

    text: str
    code: int


def sections(**commands: str) -> str:
    """A command that runs each of `commands` and always succeeds.

    Every line of output gets a leading "|", so nothing a host prints (a process may have any name) passes
    for the "##NAME" that begins the next section. The last line of a section is its exit code.
    """
    code = "printf '\\n%s\\n' \"$?\""
    return "; ".join(
        f"echo '##{name}'; {{ ( {command} ) 2>/dev/null </dev/null; {code}; }} | sed 's/^/|/'"
        for name, command in commands.items()
    )


def split(output: Iterable[str], *names: str) -> dict[str, Section]:
    """The sections called `names`. Raises FactProcessError when one is missing or was cut off."""
    lines: dict[str, list[str]] = {}
    current: list[str] = []
    for line in output:
        if line.startswith("##"):
            current = lines.setdefault(line[2:].strip(), [])
        elif line.startswith("|"):
            current.append(line[1:])
    found: dict[str, Section] = {}
    for name in names:
        # The blank line before the code is ours when the text ended with a newline; else it ended that text.
        *text, code = lines.get(name) or [""]
        if not code.strip().isdigit():
            raise FactProcessError(f"the host's answer has no complete part {name!r}; run the command again")
        found[name] = Section(text="\n".join(text), code=int(code))
    return found


def several(names: str | Iterable[str]) -> list[str]:
    """The names asked for; one string, as `pyinfra ... fact X names=a,b` gives it, is split at its commas."""
    return names.split(",") if isinstance(names, str) else list(names)


def quoted(words: Iterable[str]) -> str:
    """`words` as arguments of a shell command."""
    return " ".join(shlex.quote(word) for word in words)


def decoded(text: str, *, what: str) -> str:
    """The text behind base64. Raises FactProcessError, naming `what`, when it is not base64."""
    try:
        return base64.b64decode(text, validate=True).decode("utf-8", errors="replace")
    except (binascii.Error, ValueError) as error:
        raise FactProcessError(f"{what} did not arrive whole") from error
