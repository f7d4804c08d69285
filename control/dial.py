"""One connection: the stream, the host key that must be the pinned one, and the login.

Every wait has an end: connecting, the banner, the key exchange, the login.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko
from paramiko.ssh_exception import BadAuthenticationType, IncompatiblePeer

from control import login, pins
from control.errors import ReachError
from control.proxy import Proxy, expand
from control.secret import Secret
from control.session import Auth, Way
from control.settings import HostSettings

# paramiko logs tracebacks of what we raise as a sentence; without a handler Python prints them.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

REDIALS = 3
# What tailscaled calls itself where it answers port 22 itself (tailscale/tailscale, ssh/tailssh).
TAILSCALE_SSH = "SSH-2.0-Tailscale"
_SILENCE_MS = 60_000
_MAC_TCP_RXT_CONNDROPTIME = 0x80
_MAC_TCP_KEEPALIVE = 0x10


class NoAnswer(ReachError):
    """Nothing that speaks SSH answered at this address and port."""


class Refused(NoAnswer):
    """The host is there, and nothing listens at this port."""


@dataclass(frozen=True)
class Route:
    """One way to a host. `proxy` is a command with %h and %p, or None for a plain TCP connection."""

    name: str
    way: Way
    address: str
    port: int
    user: str
    identity_file: Path | None
    known_hosts: Path
    proxy: str | None = None
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None

    @property
    def where(self) -> str:
        """The address as it is written in sentences."""
        if self.port == pins.SSH_PORT:
            return self.address
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass
class Line:
    """A connection whose host key was checked; nobody is logged in yet."""

    transport: paramiko.Transport
    shown: str
    close_route: Callable[[], None]

    def close(self) -> None:
        """Close it and end the program that carried it."""
        self.transport.close()
        self.close_route()


@dataclass(frozen=True)
class LoggedIn:
    """A line and how the login was made."""

    line: Line
    auth: Auth


def connect(route: Route, *, settings: HostSettings, pinned: Sequence[str], timeout: float) -> Line:
    """Connect and check the host key. Raises ReachError, NoAnswer when nothing answered."""
    shown: list[str] = []
    wanted = pins.types_to_ask(settings, pinned)
    while wanted:
        line = _try_types(route, wanted, timeout)
        if line is None:
            break
        if pins.is_accepted(line.shown, settings=settings, pinned=pinned):
            return line
        line.close()
        shown.append(line.shown)
        wanted = [kind for kind in wanted if kind != line.shown.split(" ")[0]]
        if not settings.host_key:
            break
    if not shown and (line := _try_types(route, list(pins.ALGORITHMS), timeout)) is not None:
        line.close()
        shown.append(line.shown)
    raise pins.mismatch(route.name, route.where, settings=settings, pinned=pinned, shown=shown)


def log_in(
    route: Route,
    *,
    settings: HostSettings,
    pinned: Sequence[str],
    password: Callable[[], Secret] | None,
    timeout: float,
) -> LoggedIn:
    """Connect and log in: with keys, then with `password` when there is one. Raises ReachError."""
    with login.agent(route.identity_agent) as agent_keys:
        keys = _keys(route, agent_keys)
        left = list(keys.offers)
        # A server hangs up after MaxAuthTries keys: the others are offered on a new connection.
        for _ in range(REDIALS):
            line = connect(route, settings=settings, pinned=pinned, timeout=timeout)
            try:
                left, accepts = _offer(line.transport, route.user, left)
                if line.transport.is_authenticated():
                    return LoggedIn(line, "publickey")
                if not left:
                    return _with_password(line, route, keys, accepts, password)
            except (paramiko.SSHException, EOFError, OSError) as error:
                line.close()
                raise ReachError(
                    f"{route.name}: {route.where} broke off while {route.user} logged in: {_why(error)}.",
                    hint="Try again in a minute; the host may be blocking this address.",
                ) from error
            except BaseException:
                line.close()
                raise
            line.close()
    raise _refused(route, keys, [])


def _keys(route: Route, agent_keys: list[paramiko.PKey]) -> login.Keys:
    if route.identity_file is not None:
        return login.one_key(route.name, route.identity_file, agent_keys)
    return login.all_keys(route.identity_files, agent_keys, only_files=route.identities_only)


def _offer(
    transport: paramiko.Transport, user: str, offers: list[tuple[str, paramiko.PKey]]
) -> tuple[list[tuple[str, paramiko.PKey]], list[str]]:
    """Offer keys until one is accepted. Returns those never tried, and the methods the server takes."""
    accepts: list[str] = []
    for index, (_, key) in enumerate(offers):
        try:
            transport.auth_publickey(user, key)
        except BadAuthenticationType as error:
            return [], list(error.allowed_types)
        except paramiko.AuthenticationException as error:
            # "Authentication timeout" comes as this type, too; the connection is gone then.
            if not transport.is_active():
                if "timeout" in str(error).lower():
                    raise
                return offers[index + 1 :], accepts
        except (paramiko.SSHException, EOFError):
            if index == 0:
                raise
            return offers[index:], accepts
        if transport.is_authenticated():
            return [], accepts
    return [], accepts


def _with_password(
    line: Line,
    route: Route,
    keys: login.Keys,
    accepts: list[str],
    password: Callable[[], Secret] | None,
) -> LoggedIn:
    if password is not None:
        secret = password().stripped()
        with contextlib.suppress(paramiko.AuthenticationException):
            line.transport.auth_password(route.user, secret.reveal().decode("utf-8", "surrogateescape"))
        if line.transport.is_authenticated():
            return LoggedIn(line, "password")
    raise _refused(
        route,
        keys,
        accepts or _accepted_methods(line.transport, route),
        password=password is not None,
        version=line.transport.remote_version,
    )


def _accepted_methods(transport: paramiko.Transport, route: Route) -> list[str]:
    """What the server takes instead, as it says when it refuses a login without anything."""
    try:
        transport.auth_none(route.user)
    except BadAuthenticationType as error:
        return list(error.allowed_types)
    except (paramiko.SSHException, EOFError, OSError):
        return []
    return ["none"]


def _refused(
    route: Route, keys: login.Keys, accepts: list[str], *, password: bool = False, version: str = ""
) -> ReachError:
    """`version` is what the server calls itself in its first line (RFC 4253, 4.2)."""
    if version.startswith(TAILSCALE_SSH):
        # It asks the tailnet's policy, and no key of the host's.
        return ReachError(
            f"{route.name}: Tailscale SSH answered at {route.where} instead of sshd, and refused the login "
            f"of {route.user}.",
            hint="Run `tailscale set --ssh=false` on the host, over another way or the provider's console.",
        )
    tried = [label for label, _ in keys.offers] + (["login_password"] if password else [])
    words = f"{route.name}: {route.where} refused the login of {route.user}"
    words += f" (tried: {', '.join(tried)})" if tried else " (no key found to try)"
    if accepts:
        words += f"; it accepts {', '.join(accepts)}"
    hint = "Correct user or identity_file in hosts.toml, or load the key into the SSH agent."
    if password:
        hint = "Correct user or what login_password points at."
    if keys.locked:
        hint = f"{', '.join(keys.locked)} is encrypted and was not tried: run `ssh-add`."
    return ReachError(words + ".", hint=hint)


def _try_types(route: Route, types: list[str], timeout: float) -> Line | None:
    """Connect, asking for host keys of these types. None when the host has none of them."""
    proxy = None
    if route.proxy:
        proxy = Proxy(route.name, expand(route.proxy, address=route.address, port=route.port))
        stream = proxy.stream
    else:
        stream = _tcp(route, timeout)
    close_route = proxy.close if proxy else stream.close
    transport: paramiko.Transport | None = None
    began = time.monotonic()
    try:
        transport = paramiko.Transport(stream)
        transport.banner_timeout = timeout
        transport.handshake_timeout = timeout
        transport.auth_timeout = timeout + 15
        options = transport.get_security_options()
        options.key_types = pins.algorithms(types)
        transport.start_client(timeout=timeout * 2)
        return Line(transport, pins.line(transport.get_remote_server_key()), close_route)
    except IncompatiblePeer as error:
        _hang_up(transport, close_route)
        if "key" in str(error).lower():
            return None
        raise ReachError(f"{route.name}: {route.where} has no common way to encrypt: {error}.") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        said = proxy.complaint() if proxy else ""
        _hang_up(transport, close_route)
        # A proxy that ends at once was told so by the other end; one that waits heard nothing.
        kind = Refused if proxy and time.monotonic() - began < timeout / 2 else NoAnswer
        raise kind(
            f"{route.name}: {route.where} does not answer as SSH: {said or _why(error)}.", hint=_hint(route)
        ) from error
    except BaseException:
        _hang_up(transport, close_route)
        raise


def _hang_up(transport: paramiko.Transport | None, close_route: Callable[[], None]) -> None:
    if transport is not None:
        transport.close()
    close_route()


def _tcp(route: Route, timeout: float) -> socket.socket:
    try:
        stream = socket.create_connection((route.address, route.port), timeout)
    except TimeoutError as error:
        raise NoAnswer(
            f"{route.name}: no answer from {route.where} in {timeout:.0f} s.", hint=_hint(route)
        ) from error
    except socket.gaierror as error:
        raise NoAnswer(
            f"{route.name}: cannot resolve {route.address}: {error.strerror}.", hint="Correct its address."
        ) from error
    except OSError as error:
        kind = Refused if isinstance(error, ConnectionRefusedError) else NoAnswer
        raise kind(
            f"{route.name}: cannot connect to {route.where}: {error.strerror or error}.", hint=_hint(route)
        ) from error
    # Without it every command pays 40 ms: Nagle waits for the delayed acknowledgement.
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_MS // 2000)
    elif sys.platform == "darwin":
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.IPPROTO_TCP, _MAC_TCP_RXT_CONNDROPTIME, _SILENCE_MS // 1000)
            stream.setsockopt(socket.IPPROTO_TCP, _MAC_TCP_KEEPALIVE, _SILENCE_MS // 2000)
    return stream


def _hint(route: Route) -> str:
    if route.way == "tailnet":
        return "Is this machine on the tailnet, and the host up?"
    # A host that became private elsewhere, or that was forgotten here, is known by its public address only.
    return "Is the host up, and the address right? If only its tailnet can see it, set tailnet_address."


def _why(error: BaseException) -> str:
    """paramiko's message as part of a sentence."""
    text = str(error).strip().rstrip(".")
    return text or "the connection was closed"
