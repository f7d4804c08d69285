"""The one type that carries a secret, and the sources it comes from.

A source is written in hosts.toml as `env:NAME`, `file:PATH` or `command:ARGV`, so sops, age,
infisical and pass work without knowing about them. The bytes leave a `Secret` through `reveal`
only, and only towards standard input of a process or a file that is private from its first byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import NoReturn

from control.errors import SecretError

MAX_SECRET_BYTES = 1 << 20
COMMAND_TIMEOUT_S = 60
SCHEMES = ("env", "file", "command")

# Shorter lines of a secret are words that stand elsewhere too.
MASKED_CHARACTERS = 8
# Lines of every secret that this process has read; see `masked`.
_lines: set[str] = set()

# Environment variables that sources name; see `child_environment`.
_variables: set[str] = set()
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Secret:
    """Bytes that no repr, format, pickle or JSON encoder shows."""

    __slots__ = ("_value", "source")

    def __init__(self, value: bytes, *, source: str) -> None:
        self._value = value
        self.source = source

    def reveal(self) -> bytes:
        """The bytes themselves. Hand them to standard input or a private file, nothing else."""
        return self._value

    def sha256(self) -> str:
        """Hex digest, to tell whether a host's copy is the same."""
        return hashlib.sha256(self._value).hexdigest()

    def stripped(self) -> Secret:
        """The same secret without surrounding whitespace: keys and passwords end with a newline in files."""
        return Secret(self._value.strip(), source=self.source)

    def __repr__(self) -> str:
        return f"<Secret from {self.source.split(':', 1)[0]}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def check_source(source: str) -> str:
    """Return `source` when it has the form of one. Raises ValueError with what it must be."""
    scheme, colon, rest = source.partition(":")
    if not colon or scheme not in SCHEMES or not rest.strip():
        # The text may be the secret itself, pasted in the wrong place: it is not repeated.
        raise ValueError(
            "must say where the secret is (env:NAME, file:PATH or command:ARGV), and not be the secret itself"
        )
    if "\0" in source:
        raise ValueError("must have no NUL byte in it")
    if scheme == "env" and not _VARIABLE.fullmatch(rest):
        raise ValueError(
            "must name a variable after env:, as in env:TS_AUTHKEY, and not be the secret itself"
        )
    if scheme == "command":
        _check_command(rest)
    if scheme == "env":
        _variables.add(rest)
    return source


def child_environment() -> dict[str, str]:
    """The environment of programs this side starts: without the variables that are sources of secrets.

    Whoever may read a process's environment would read them in each of its children as well.
    """
    return {name: value for name, value in os.environ.items() if name not in _variables}


def _check_command(line: str) -> None:
    try:
        argv = shlex.split(line)
    except ValueError:
        raise ValueError("must have every quote of its command closed") from None
    if not argv or not argv[0]:
        raise ValueError("must name a program after command:")


def resolve(source: str, *, what: str) -> Secret:
    """Read the secret called `what` from its source.

    Raises SecretError, naming `what` and the source, when it is absent, fails or is empty.
    """
    try:
        scheme, _, rest = check_source(source).partition(":")
    except ValueError as error:
        raise SecretError(f"{what}: its source {error}.", hint="Correct the source.") from None
    reader = {"env": _from_env, "file": _from_file, "command": _from_command}[scheme]
    value = reader(rest, what)
    # The words of a command may hold a token of another service.
    shown = f"the command {shlex.split(rest)[0]}" if scheme == "command" else source
    if not value.strip():
        raise SecretError(f"{what}: its source {shown} gave nothing.", hint="Fill it, or change the source.")
    if len(value) > MAX_SECRET_BYTES:
        raise SecretError(
            f"{what}: its source {shown} gave more than {MAX_SECRET_BYTES} bytes.",
            hint="Correct the source.",
        )
    text = value.decode("utf-8", errors="replace")
    _lines.update(line.strip() for line in text.splitlines() if len(line.strip()) >= MASKED_CHARACTERS)
    return Secret(value, source=source)


def masked(text: str) -> str:
    """`text` with `***` for each line of a secret that was read: somebody may have pasted one anywhere.

    What shows a host's own text asks this last. Lines of less than MASKED_CHARACTERS stay.
    """
    for line in sorted(_lines, key=len, reverse=True):
        text = text.replace(line, "***")
    return text


def _from_env(name: str, what: str) -> bytes:
    value = os.environb.get(name.encode())
    if value is None:
        raise SecretError(
            f"{what}: the environment has no {name}.", hint=f"Set {name}, or change the source."
        )
    return value


def _from_file(path: str, what: str) -> bytes:
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:  # ~nobody-here
        raise SecretError(f"{what}: cannot read {path}: no such user.", hint="Change the source.") from error
    try:
        # O_NONBLOCK: a FIFO without a writer would hang us here.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SecretError(
            f"{what}: cannot read {file}: {error.strerror}.", hint="Create it, or change the source."
        ) from error
    try:
        # Before fdopen, which raises an error of its own for a directory.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SecretError(f"{what}: {file} is not a regular file.", hint="Point the source at a file.")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            return stream.read(MAX_SECRET_BYTES + 1)
    finally:
        os.close(fd)


def _from_command(line: str, what: str) -> bytes:
    argv = shlex.split(line)
    try:
        # Its standard error and terminal stay: pass and sops may ask for a passphrase there.
        done = subprocess.run(
            argv, env=child_environment(), stdout=subprocess.PIPE, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise SecretError(
            f"{what}: cannot run {argv[0]}: {error.strerror}.", hint="Install it, or change the source."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SecretError(
            f"{what}: {argv[0]} took longer than {COMMAND_TIMEOUT_S} s.", hint="Run it by hand to see why."
        ) from error
    if done.returncode != 0:
        raise SecretError(
            f"{what}: {argv[0]} failed with exit code {done.returncode}.", hint="Run it by hand to see why."
        )
    return done.stdout
