"""The private key on its way from the caller to ssh-add.

It comes in a variable or on a descriptor. Taking a variable out of os.environ leaves it in /proc/PID/environ,
which shows the memory that execve(2) filled: so the wrapper looks at the key, writes it into a pipe and
executes itself again, with an environment that lacks the variable; ssh-add then reads from the pipe. The
process that lives as long as the session has never had the key in its memory.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
from collections.abc import Sequence

from quietport.sshagent.names import KEY_VARIABLE, AgentAccessError

# The buffer of a pipe is smaller for users that have very many (pipe(7)); RSA with 4096 bits takes 3.4 kB.
MAX_KEY = 16 << 10
_BLOCK = re.compile(
    rb"\s*-----BEGIN ((?:[A-Z0-9]+ )*)PRIVATE KEY-----\n((?:(?!-----).)+)\n-----END \1PRIVATE KEY-----\s*",
    re.DOTALL,
)
_MAGIC = b"openssh-key-v1\0"


def from_variable(variable: str) -> bytes:
    """The key in an environment variable, ready for ssh-add. Raises AgentAccessError."""
    value = os.environb.get(os.fsencode(variable))
    if not value:
        raise AgentAccessError(
            f"The variable {variable} is not set: put the private key into it, or name one with --key-fd."
        )
    return checked(value, f"The value of {variable}")


def from_descriptor(descriptor: int) -> bytes:
    """The key that can be read from an open descriptor, ready for ssh-add; closed but for standard input.

    Raises AgentAccessError.
    """
    parts: list[bytes] = []
    left = MAX_KEY + 1
    try:
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        if descriptor > 2:
            os.close(descriptor)
    except OSError as error:
        raise AgentAccessError(
            f"The key cannot be read from descriptor {descriptor}: {error.strerror}."
        ) from error
    return checked(b"".join(parts), f"What descriptor {descriptor} holds")


def checked(data: bytes, what: str) -> bytes:
    """`data` as ssh-add takes it: lines that end in a line feed, the last one too.

    `what` begins the sentence of an error, which never has anything of the key in it. Raises AgentAccessError
    for what is no private key, or one with a passphrase (PROTOCOL.key of OpenSSH; RFC 1421, RFC 5958).
    """
    if len(data) > MAX_KEY:
        raise AgentAccessError(f"{what} is larger than {MAX_KEY} bytes: it is not a private key.")
    match = _BLOCK.fullmatch(data.replace(b"\r\n", b"\n"))
    if match is None:
        raise AgentAccessError(f"{what} is not a private key: it has no BEGIN and END lines of one.")
    if _has_passphrase(match[1], match[2], what):
        raise AgentAccessError(
            f"{what} is a key with a passphrase, which nobody could type here: use a key without one."
        )
    return data.replace(b"\r\n", b"\n").strip() + b"\n"


def hand_over(
    key: bytes, arguments: Sequence[str], *, began_with: Sequence[str], variable: str | None
) -> None:
    """Execute this program again with `arguments` after --handed-over FD. Does not return.

    `began_with` are the arguments it has now. The variable of the key, and the usual one, are left out of the
    environment. Raises AgentAccessError.
    """
    count = len(began_with)
    split = len(sys.orig_argv) - count
    if not sys.executable or split < 1 or sys.orig_argv[split:] != list(began_with):
        raise AgentAccessError(
            "How this program was started cannot be told, so it cannot start itself again."
        )
    gone = {os.fsencode(name) for name in (variable, KEY_VARIABLE) if name is not None}
    environment = {name: value for name, value in os.environb.items() if name not in gone}
    before = sys.orig_argv[1:split]
    try:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        if os.write(writer, key) != len(key):
            raise BlockingIOError(0, "the pipe is too small for it")
        os.close(writer)
        os.set_inheritable(reader, True)
        argv = [sys.executable, *before, "--handed-over", str(reader), *arguments]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, argv, environment)  # noqa: S606 - no shell on purpose
    except OSError as error:
        raise AgentAccessError(f"The key cannot be handed over: {error.strerror}.") from error


def _has_passphrase(kind: bytes, body: bytes, what: str) -> bool:
    if kind == b"ENCRYPTED ":
        return True
    if kind != b"OPENSSH ":
        return b"\nProc-Type: 4,ENCRYPTED" in b"\n" + body
    try:
        blob = base64.b64decode(body, validate=False)
    except (binascii.Error, ValueError):
        blob = b""
    if not blob.startswith(_MAGIC):
        raise AgentAccessError(f"{what} is a damaged private key.")
    # string ciphername: "none" for a key without a passphrase.
    start = len(_MAGIC) + 4
    length = int.from_bytes(blob[len(_MAGIC) : start], "big")
    return blob[start : start + length] != b"none"
