"""Pinned host keys: what the first connection showed is what every later one must show, on either way.

A pin is a line `TYPE BASE64`, as in known_hosts. paramiko negotiates one key type; the pinned one is asked
for afterwards, so that a host with several keys is not taken for another one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import paramiko

from control import state
from control.errors import ReachError
from control.settings import HostSettings

SSH_PORT = 22
# Host key type -> the signature algorithms that show it. A SHA-1 signature (ssh-rsa) is never asked for.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


def line(key: paramiko.PKey) -> str:
    """The key as `TYPE BASE64`."""
    return f"{key.get_name()} {key.get_base64()}"


def fingerprint(pin: str) -> str:
    """`SHA256:...` of a pin, as ssh-keygen -lf prints it."""
    digest = hashlib.sha256(base64.b64decode(pin.split(" ")[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def algorithms(types: Iterable[str]) -> tuple[str, ...]:
    """The algorithms to ask for, so that the host shows a key of one of these types."""
    return tuple(algorithm for kind in types for algorithm in ALGORITHMS.get(kind, ()))


def is_accepted(pin: str, *, settings: HostSettings, pinned: Sequence[str]) -> bool:
    """Whether a host that shows `pin` is the one we know. A fingerprint in hosts.toml decides alone."""
    if settings.host_key:
        return fingerprint(pin) == settings.host_key
    return not pinned or pin in pinned


def types_to_ask(settings: HostSettings, pinned: Sequence[str]) -> list[str]:
    """Host key types in the order to ask for; a known pin's type alone."""
    known = [pin for pin in pinned if not settings.host_key or fingerprint(pin) == settings.host_key]
    return [pin.split(" ")[0] for pin in known] or list(ALGORITHMS)


def mismatch(
    name: str, address: str, *, settings: HostSettings, pinned: Sequence[str], shown: Sequence[str]
) -> ReachError:
    """The error for a host that shows another key than the one it must show."""
    now = ", ".join(f"{fingerprint(pin)} ({pin.split(' ')[0]})" for pin in shown) or "none of that type"
    if settings.host_key:
        return ReachError(
            f"{name}: {address} shows the host key {now}, and hosts.toml says {settings.host_key}.",
            hint="Compare with the provider's console; if the host was reinstalled, correct host_key.",
        )
    was = ", ".join(f"{fingerprint(pin)} ({pin.split(' ')[0]})" for pin in pinned)
    return ReachError(
        f"{name}: the host key has changed: pinned is {was}, {address} shows {now}.",
        hint=f"If {name} was reinstalled: `quietport forget {name}`. "
        "If not, do not go on: this is another machine.",
    )


def pin(name: str, shown: str, *, settings: HostSettings) -> None:
    """Remember the key that `name` showed at its first accepted login, and write its known_hosts."""
    known = state.load(name)
    if shown not in known.host_keys:
        # A fingerprint in hosts.toml outranks an earlier pin; without one, nothing gets here but a first key.
        known = state.update(name, lambda old: replace(old, host_keys=(shown,)))
    write_known_hosts(name, settings=settings)


def known_hosts_path(name: str) -> Path:
    """The known_hosts file of `name`; it may not be there yet."""
    return state.directory() / f"{name}.known_hosts"


def write_known_hosts(name: str, *, settings: HostSettings) -> Path:
    """Write the known_hosts of `name`: its keys for its name, its public and its tailnet addresses."""
    known = state.load(name)
    patterns = sorted(_patterns(name, settings, known))
    text = "".join(f"{','.join(patterns)} {key}\n" for key in known.host_keys)
    path = known_hosts_path(name)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        state.write_private(path, text)
    return path


def _patterns(name: str, settings: HostSettings, known: state.HostState) -> set[str]:
    hosts = {name, settings.address, *known.tailnet_addresses}
    hosts |= {word for word in (settings.hostname, settings.tailnet_address) if word}
    ports = {SSH_PORT, settings.port, known.tailnet_port or SSH_PORT}
    # https://man.openbsd.org/sshd#SSH_KNOWN_HOSTS_FILE_FORMAT: another port than 22 is written [host]:port.
    return {host if port == SSH_PORT else f"[{host}]:{port}" for host in hosts for port in ports}
