"""What tailscaled serves: to the tailnet (serve) and to the Internet (Funnel), without any public socket.

The keys are those of ServeConfig in tailscale's ipn/serve.go. Where requests go is not read: an address of a
backend may carry a password.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from quietport.commands import run
from quietport.errors import HostProgramError
from quietport.processes import is_running

COMMAND = ("tailscale", "serve", "status", "--json")
TIMEOUT_S = 10.0
UNKNOWN_CONFIG = (
    "tailscaled runs and does not say what it serves: look at `tailscale serve status`, and run this as root."
)


@dataclass(frozen=True)
class Served:
    """One port that tailscaled answers by itself; 0 is every port of a service that gets its own address.

    `name` is a service's (svc:...) or, with Funnel, the host's name on the Internet; else "". `kind` is how
    the port was made. `foreground`: it ends with the command that made it.
    """

    port: int
    funnel: bool = False
    name: str = ""
    kind: Literal["https", "http", "tcp", "tls-terminated-tcp"] = "https"
    foreground: bool = False


def parse_serve(text: str) -> list[Served]:
    """Read what `tailscale serve status --json` prints. Raises ValueError for what is not understood."""
    document = json.loads(text)
    return [] if document is None else list(dict.fromkeys(_served(_table(document), foreground=False)))


def _served(config: dict[str, Any], *, foreground: bool) -> Iterator[Served]:
    handlers = {int(port): _table(handler) for port, handler in _table(config.get("TCP")).items()}
    for port, handler in handlers.items():
        yield Served(port, kind=_kind(handler), foreground=foreground)
    for place, allowed in _table(config.get("AllowFunnel")).items():
        if allowed is not False:
            name, _, number = place.rpartition(":")
            port = int(number)
            yield Served(port, True, name, _kind(handlers.get(port, {"HTTPS": True})), foreground)
    for service, value in _table(config.get("Services")).items():
        own = _table(value)
        if own.get("Tun"):
            yield Served(0, name=service, kind="tcp", foreground=foreground)
        for number, handler in _table(own.get("TCP")).items():
            yield Served(int(number), name=service, kind=_kind(_table(handler)), foreground=foreground)
    for session in _table(config.get("Foreground")).values():
        yield from _served(_table(session), foreground=True)


def _kind(handler: dict[str, Any]) -> Literal["https", "http", "tcp", "tls-terminated-tcp"]:
    if handler.get("HTTPS"):
        return "https"
    if handler.get("HTTP"):
        return "http"
    return "tls-terminated-tcp" if handler.get("TerminateTLS") else "tcp"


def _table(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("a part of the configuration is no object")
    return value


def served() -> list[Served]:
    """What tailscaled of this host serves; [] where none runs. Raises HostProgramError."""
    if not is_running("tailscaled"):
        return []
    done = run(COMMAND, timeout=TIMEOUT_S)
    if done.code != 0:
        raise HostProgramError(UNKNOWN_CONFIG)
    try:
        return parse_serve(done.out)
    except (ValueError, RecursionError) as error:
        raise HostProgramError(f"{' '.join(COMMAND)} printed what is not understood: {error}.") from error
