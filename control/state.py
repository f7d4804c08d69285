"""What the operator's side remembers of a host: its pinned host keys and its tailnet addresses.

One JSON file a host, in a directory of its own for each hosts file, so that two checkouts or two labs
never share a pin:

    {"schema": 1, "name": "vps1", "hosts_file": "/home/me/hosts.toml",
     "tailnet_addresses": ["100.64.0.3"], "tailnet_port": 22, "host_keys": ["ssh-ed25519 AAAA..."]}

`tailnet_port` is the port that last answered on the tailnet. Files are 0600 in a directory that is 0700,
written beside and renamed, and changed under a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from control.errors import ReachError
from control.settings import fleet

SCHEMA = 1
ENV_STATE = "QUIETPORT_STATE"
LAB_MARK = "lab.json"


@dataclass(frozen=True)
class HostState:
    """What is remembered of one host. The empty one is a host that was never reached."""

    tailnet_addresses: tuple[str, ...] = ()
    tailnet_port: int | None = None
    host_keys: tuple[str, ...] = ()


def is_lab_file(hosts_file: Path) -> bool:
    """Whether a hosts file belongs to a lab run: then everything about it stays in the run's directory."""
    return (hosts_file.resolve().parent / LAB_MARK).is_file()


def state_dir(hosts_file: Path, environ: dict[str, str] | None = None) -> Path:
    """Where the hosts of this file are remembered. Nothing is made."""
    environ = dict(os.environ) if environ is None else environ
    file = hosts_file.resolve()
    if is_lab_file(file):
        return file.parent / "operator"
    if named := environ.get(ENV_STATE):
        root = Path(named).expanduser()
    else:
        root = Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "quietport"
    return root / hashlib.sha256(os.fsencode(file)).hexdigest()[:16]


def directory() -> Path:
    """The state directory of this process's hosts file, made when missing.

    Raises ReachError when it cannot be made, or others could write into it.
    """
    path = state_dir(fleet().file)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ReachError(
            f"{path}: cannot be used: {error.strerror}.", hint=f"Mend it, or set {ENV_STATE}."
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ReachError(
            f"{path}: pinned host keys would be in a directory that others can change.",
            hint=f"Make it yours with mode 0700, or set {ENV_STATE}.",
        )
    return path


def load(name: str) -> HostState:
    """What is remembered of `name`. Raises ReachError when the file is damaged."""
    path = directory() / f"{name}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return HostState()
    except (OSError, UnicodeDecodeError) as error:
        raise ReachError(
            f"{path}: cannot be read: {error}.", hint=f"`quietport forget {name}` removes it."
        ) from error
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ReachError(f"{path}: is damaged.", hint=f"`quietport forget {name}` removes it.") from error


def update(name: str, change: Callable[[HostState], HostState]) -> HostState:
    """Apply `change` to what is remembered of `name`, under a lock, and return the new state.

    `change` must be quick and must not wait: the lock would hold up other hosts of the same run.
    """
    with _locked():
        old = load(name)
        new = change(old)
        if new != old:
            document = {
                "schema": SCHEMA,
                "name": name,
                "hosts_file": str(fleet().file.resolve()),
                **_plain(new),
            }
            write_private(directory() / f"{name}.json", json.dumps(document, indent=2) + "\n")
        return new


def set_tailnet(name: str, addresses: tuple[str, ...]) -> HostState:
    """Remember the tailnet addresses of `name`, in place of earlier ones."""
    return update(name, lambda old: replace(old, tailnet_addresses=addresses))


def forget(name: str) -> bool:
    """Remove everything remembered of `name`. Returns whether there was anything."""
    with _locked():
        found = [
            path for suffix in ("json", "known_hosts") if (path := directory() / f"{name}.{suffix}").exists()
        ]
        for path in found:
            path.unlink()
    return bool(found)


def remembered() -> list[str]:
    """The names of the hosts something is remembered of."""
    return sorted(path.stem for path in directory().glob("*.json"))


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` with mode 0600, by a rename: a reader sees the old or the new text."""
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temp).replace(path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


def _plain(state: HostState) -> dict[str, Any]:
    return {
        "tailnet_addresses": list(state.tailnet_addresses),
        "tailnet_port": state.tailnet_port,
        "host_keys": list(state.host_keys),
    }


def _parse(document: Any) -> HostState:
    if document["schema"] != SCHEMA:
        raise ValueError("another schema")
    addresses = tuple(str(ipaddress.ip_address(address)) for address in document["tailnet_addresses"])
    keys = tuple(str(key) for key in document["host_keys"])
    if any(len(key.split(" ")) != 2 for key in keys):
        raise ValueError("not a host key")
    port = document["tailnet_port"]
    if port is not None and not (isinstance(port, int) and 1 <= port <= 65535):
        raise ValueError("not a port")
    return HostState(tailnet_addresses=addresses, tailnet_port=port, host_keys=keys)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    fd = os.open(directory() / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
