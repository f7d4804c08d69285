"""The keys an operator has, in the order ssh would offer them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getpass
from pathlib import Path

import paramiko
from pyinfra.api.exceptions import PyinfraError
from pyinfra.connectors.ssh_util import _patch_paramiko_sk_key_support, load_key_with_certificate

from control.errors import ReachError

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
PROMPTS = 3
_agent_lock = threading.Lock()
_unlocked: dict[str, paramiko.PKey] = {}


@dataclass
class Keys:
    """Keys to offer, each with what to call it, and those that could not be used."""

    offers: list[tuple[str, paramiko.PKey]] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)

    def add(self, label: str, key: paramiko.PKey) -> None:
        """Append a key unless it is there already (an agent holds what files hold, too)."""
        blob = bytes(key.asbytes())
        if all(
            bytes(known.asbytes()) != blob or _certified(known) != _certified(key) for _, known in self.offers
        ):
            self.offers.append((label, key))


def one_key(name: str, path: Path, agent_keys: list[paramiko.PKey]) -> Keys:
    """The key the settings name, from its file or, when it is encrypted, from the agent.

    Raises ReachError when it is missing, unusable, or encrypted with nobody to ask for the passphrase.
    """
    keys = Keys()
    if not _is_file(path):
        raise ReachError(
            f"{name}: identity_file {path} is not there, or may not be looked at.",
            hint="Create the key, or correct identity_file.",
        )
    held = _held_by_agent(path, agent_keys)
    if held is not None:
        keys.add(f"{path} (agent)", held)
        return keys
    try:
        keys.add(str(path), _load(path))
    except _Encrypted:
        keys.add(str(path), _ask(name, path))
    except (PyinfraError, paramiko.SSHException, OSError, ValueError) as error:
        raise ReachError(
            f"{name}: identity_file {path} cannot be used: {error}.",
            hint="It must be a private key that is no security key; those work through the SSH agent.",
        ) from error
    return keys


def all_keys(files: tuple[str, ...], agent_keys: list[paramiko.PKey], *, only_files: bool) -> Keys:
    """What ssh would offer: the configured files, the agent's keys, the default files. Never asks anything.

    `only_files` is IdentitiesOnly: of the agent's keys only those whose public half is among the files.
    """
    keys = Keys()
    for text in files:
        _add_file(keys, Path(text).expanduser(), agent_keys)
    if not only_files:
        for key in agent_keys:
            keys.add(f"agent key {key.fingerprint}", key)
    if not files:
        for text in DEFAULT_KEYS:
            _add_file(keys, Path(text).expanduser(), agent_keys)
    return keys


@contextmanager
def agent(socket_path: str | None = None) -> Iterator[list[paramiko.PKey]]:
    """The keys of the SSH agent, usable inside the block. Empty when none runs."""
    _patch_paramiko_sk_key_support()
    if socket_path == "none":
        yield []
        return
    try:
        connection = _connect_agent(socket_path)
    except (OSError, paramiko.SSHException):
        yield []
        return
    try:
        yield list(connection.get_keys())
    finally:
        connection.close()


def _connect_agent(socket_path: str | None) -> paramiko.Agent:
    if socket_path is None:
        return paramiko.Agent()
    # paramiko looks at the environment only; other hosts may connect at the same time.
    with _agent_lock:
        before = os.environ.get("SSH_AUTH_SOCK")
        os.environ["SSH_AUTH_SOCK"] = str(Path(socket_path).expanduser())
        try:
            return paramiko.Agent()
        finally:
            if before is None:
                del os.environ["SSH_AUTH_SOCK"]
            else:
                os.environ["SSH_AUTH_SOCK"] = before


class _Encrypted(Exception):
    """The key's file needs a passphrase."""


def _load(path: Path, passphrase: str | None = None) -> paramiko.PKey:
    if str(path) in _unlocked:
        return _unlocked[str(path)]
    try:
        return load_key_with_certificate(str(path), key_password=passphrase, allow_prompt=False)
    except PyinfraError as error:
        if "is encrypted" in str(error):
            raise _Encrypted from error
        raise


def _ask(name: str, path: Path) -> paramiko.PKey:
    if not sys.stdin.isatty():
        raise ReachError(
            f"{name}: identity_file {path} is encrypted, and no SSH agent holds it.",
            hint=f"Run `ssh-add {path}` first.",
        )
    for _ in range(PROMPTS):
        try:
            _unlocked[str(path)] = _load(path, getpass(f"Passphrase of {path}: "))
        except (PyinfraError, paramiko.SSHException, ValueError, _Encrypted):
            continue
        return _unlocked[str(path)]
    raise ReachError(f"{name}: no passphrase opened {path}.", hint=f"Run `ssh-add {path}` first.")


def _add_file(keys: Keys, path: Path, agent_keys: list[paramiko.PKey]) -> None:
    held = _held_by_agent(path, agent_keys)
    if held is not None:
        keys.add(f"{path} (agent)", held)
        return
    if not _is_file(path):
        return
    try:
        keys.add(str(path), _load(path))
    except _Encrypted:
        keys.locked.append(str(path))
    except (PyinfraError, paramiko.SSHException, OSError, ValueError):
        return


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a directory that this user may not enter
        return False


def _held_by_agent(path: Path, agent_keys: list[paramiko.PKey]) -> paramiko.PKey | None:
    public = path.with_name(path.name + ".pub")
    try:
        words = public.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return None
    return next((key for key in agent_keys if words[1:2] == [key.get_base64()]), None)


def _certified(key: paramiko.PKey) -> bool:
    return getattr(key, "public_blob", None) is not None
