"""How a host is reached now: one function that inventory, proof, specs and doctor all ask.

A host is reached by its tailnet address once one is known, by its public address before. Its host key is
the pinned one on either way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from pyinfra import logger

from control import dial, peers, pins, sshconfig, state
from control.dial import NoAnswer, Refused, Route
from control.errors import ReachError
from control.secret import Secret, resolve
from control.session import Session, Way
from control.settings import HostSettings, fleet, settings_for

__all__ = [
    "Route",
    "combined",
    "open_session",
    "public_route",
    "remember_port",
    "remember_tailnet",
    "route",
    "ssh_config",
]

CONNECT_TIMEOUT_S = 10.0
# A host that is on the tailnet and has nothing at sshd's port: so it is while sshd restarts, which takes
# seconds on a busy host, and a converge that was killed may have begun just that.
RESTART_S = 15.0
RETRY_S = 1.0
HOST_JSON = "/etc/quietport/host.json"
# Which host a warning in the log is about: a plan, which shows no log, tells it as a note.
ABOUT = "quietport_host"


def route(name: str) -> Route:
    """The way to `name` as known now, without connecting. Raises SettingsError or ReachError."""
    settings = settings_for(name)
    known = _known_addresses(settings, state.load(name))
    return _tailnet_route(name, known[0]) if known else public_route(name)


def public_route(name: str) -> Route:
    """The way to `name` at its public address, as ~/.ssh/config has it. Raises as `route` does."""
    settings = settings_for(name)
    options = (
        sshconfig.SshOptions() if state.is_lab_file(fleet().file) else sshconfig.lookup(settings.address)
    )
    base = _base_route(name, settings)
    port = settings.port if "port" in settings.model_fields_set else options.port or settings.port
    if settings.break_glass_cidrs and state.load(name).tailnet_port == pins.SSH_PORT:
        # Once converged, sshd listens on one port, at every address; `port` is that of the blank host.
        port = pins.SSH_PORT
    return replace(
        base,
        way="public",
        address=options.hostname or settings.address,
        port=port,
        proxy=options.proxy,
        identity_files=options.identity_files,
        identities_only=options.identities_only,
        identity_agent=options.identity_agent,
    )


def open_session(
    name: str,
    *,
    way: Way | None = None,
    keys_only: bool = False,
    timeout: float = CONNECT_TIMEOUT_S,
    addresses: Sequence[str] | None = None,
) -> Session:
    """Open a new session to `name`.

    Without `way`: by a known tailnet address, then publicly, saying so; where both fail, and sshd may just be
    restarting on the tailnet, there again for RESTART_S. `addresses` are the tailnet
    addresses to try instead of the known ones. With `keys_only` no password is sent. `timeout` (seconds)
    bounds connecting, the banner and the key exchange each.
    Raises ReachError with every way that was tried, SettingsError for an unknown name.
    """
    settings = settings_for(name)
    failures: list[ReachError] = []
    restarting: list[_Attempt] = []
    for attempt in _attempts(name, settings, way, addresses):
        try:
            session = _open(attempt, settings, keys_only=keys_only, timeout=timeout)
        except ReachError as error:
            failures.append(error)
            if isinstance(error, Refused) and way is None and attempt.route.way == "tailnet":
                restarting.append(attempt)
            continue
        for failure in failures:
            _warn(name, f"{failure.what} Going on by the {session.way} address {session.address}.")
        return session
    deadline = time.monotonic() + RESTART_S
    while restarting and time.monotonic() < deadline:
        time.sleep(RETRY_S)
        for attempt in restarting:
            with contextlib.suppress(ReachError):
                return _open(attempt, settings, keys_only=keys_only, timeout=timeout)
    raise combined(name, failures)


def _warn(name: str, sentence: str) -> None:
    logger.warning(sentence, extra={ABOUT: name})


def combined(name: str, failures: Sequence[ReachError]) -> ReachError:
    """One error for every way to `name` that failed, each next step once."""
    if not failures:
        return ReachError(
            f"{name}: no tailnet address is known: the host has not joined, or not from here.",
            hint="Run the converge, or set tailnet_address.",
        )
    if len(failures) == 1:
        return failures[0]
    first, *others = failures
    words = " ".join([first.what, *(error.what.removeprefix(f"{name}: ") for error in others)])
    # Each way has a next step of its own; two ways that failed alike have one.
    hints = dict.fromkeys(error.hint for error in failures if error.hint)
    return ReachError(words, hint=" ".join(hints))


def remember_tailnet(name: str, addresses: Iterable[str]) -> None:
    """Remember the tailnet addresses of `name` for every later run. Nothing happens when there are none."""
    checked = tuple(str(ipaddress.ip_address(address)) for address in addresses)
    if checked and state.load(name).tailnet_addresses != checked:
        state.set_tailnet(name, checked)
        pins.write_known_hosts(name, settings=settings_for(name))


def remember_port(name: str, port: int) -> None:
    """Remember the port on which sshd of `name` answers over the tailnet, for every later run."""
    if state.load(name).tailnet_port != port:
        state.update(name, lambda old: replace(old, tailnet_port=port))
        pins.write_known_hosts(name, settings=settings_for(name))


def ssh_config(names: Sequence[str] = ()) -> Path:
    """Write an OpenSSH configuration for these hosts (all by default) and return its path.

    It matches each host's name and all its addresses. Raises SettingsError or ReachError.
    """
    blocks = [block for name in names or list(fleet().hosts) for block in _config_blocks(name)]
    path = state.directory() / "ssh_config"
    header = f"# Written by `quietport ssh-config` from {fleet().file}; use it as `ssh -F {path} NAME`.\n"
    state.write_private(path, header + "\n".join(blocks))
    return path


@dataclass(frozen=True)
class _Attempt:
    """One route to try. `claimed`: found by name alone, so the host must say itself that it is the one."""

    route: Route
    claimed: bool = False


def _attempts(
    name: str, settings: HostSettings, way: Way | None, addresses: Sequence[str] | None
) -> Iterator[_Attempt]:
    known = state.load(name)
    chosen = tuple(addresses) if addresses is not None else _known_addresses(settings, known)
    if way == "public":
        yield _Attempt(public_route(name))
        return
    for address in chosen:
        yield _Attempt(_tailnet_route(name, address))
    if addresses is not None:
        return
    identified = bool(known.host_keys or settings.host_key)
    # A node found by its name alone may be another machine: it goes first only when its key can be checked.
    if identified or way == "tailnet":
        yield from _found_attempts(name, settings, chosen, claimed=not identified)
    if way is None:
        yield _Attempt(public_route(name))
        if not identified:
            yield from _found_attempts(name, settings, chosen, claimed=True)


def _found_attempts(
    name: str, settings: HostSettings, tried: Sequence[str], *, claimed: bool
) -> Iterator[_Attempt]:
    # With a proxy of its own, the host is on another tailnet than the operator's machine.
    if settings.tailnet_proxy or state.is_lab_file(fleet().file):
        return
    for peer in _peers(name, settings.hostname or name):
        for address in peer.addresses:
            if peer.online and address not in tried:
                yield _Attempt(_tailnet_route(name, address), claimed=claimed)


@cache
def _peers(name: str, hostname: str) -> tuple[peers.Peer, ...]:
    found = peers.peers(hostname)
    if sentence := peers.duplicates(name, found):
        _warn(name, sentence)
    return tuple(found)


def _known_addresses(settings: HostSettings, known: state.HostState) -> tuple[str, ...]:
    stated = (str(ipaddress.ip_address(settings.tailnet_address)),) if settings.tailnet_address else ()
    return tuple(dict.fromkeys(stated + known.tailnet_addresses))


def _tailnet_route(name: str, address: str) -> Route:
    settings = settings_for(name)
    # The keys are those of the public address: it is the same login on the same host.
    public = public_route(name)
    known_port = state.load(name).tailnet_port
    return replace(
        public, way="tailnet", address=address, port=known_port or pins.SSH_PORT, proxy=settings.tailnet_proxy
    )


def _base_route(name: str, settings: HostSettings) -> Route:
    identity = Path(settings.identity_file).expanduser() if settings.identity_file else None
    return Route(
        name=name,
        way="public",
        address=settings.address,
        port=settings.port,
        user=settings.user,
        identity_file=identity,
        known_hosts=pins.known_hosts_path(name),
    )


def _open(attempt: _Attempt, settings: HostSettings, *, keys_only: bool, timeout: float) -> Session:
    target = attempt.route
    pinned = state.load(target.name).host_keys
    password = None
    if settings.login_password and not keys_only and not attempt.claimed:
        password = partial(_secret, settings.login_password, f"{target.name}: login_password")
    target, entered = _log_in(target, settings, pinned, password, timeout)
    sudo: Callable[[], Secret] | None = None
    if settings.sudo_password and not attempt.claimed:
        sudo = partial(_secret, settings.sudo_password, f"{target.name}: sudo_password")
    session = Session(
        entered.line.transport,
        name=target.name,
        way=target.way,
        address=target.address,
        port=target.port,
        user=target.user,
        auth=entered.auth,
        sudo_password=sudo,
        close_route=entered.line.close_route,
    )
    try:
        if attempt.claimed:
            _require_claim(session)
        _note(target, entered.line.shown, settings)
    except BaseException:
        session.close()
        raise
    return session


def _log_in(
    target: Route,
    settings: HostSettings,
    pinned: Sequence[str],
    password: Callable[[], Secret] | None,
    timeout: float,
) -> tuple[Route, dial.LoggedIn]:
    try:
        return target, dial.log_in(
            target, settings=settings, pinned=pinned, password=password, timeout=timeout
        )
    except Refused:
        # sshd moves to port 22 of the tailnet address only in the last step; before, it is where it was.
        other = settings.port if target.port == pins.SSH_PORT else pins.SSH_PORT
        if target.way == "public" or other == target.port:
            raise
        moved = replace(target, port=other)
        try:
            return moved, dial.log_in(
                moved, settings=settings, pinned=pinned, password=password, timeout=timeout
            )
        except NoAnswer as second:
            raise type(second)(
                f"{second.what.rstrip('.')}, nor on port {target.port}.", hint=second.hint
            ) from second


def _note(target: Route, shown: str, settings: HostSettings) -> None:
    """Pin what this login showed, and remember what worked."""
    if target.way == "tailnet":
        known = state.load(target.name)
        remember_port(target.name, target.port)
        if target.address not in _known_addresses(settings, known):
            state.set_tailnet(target.name, (target.address, *known.tailnet_addresses))
    pins.pin(target.name, shown, settings=settings)


def _require_claim(session: Session) -> None:
    """A node that was found by its name alone must carry our own file with that name."""
    answer = session.run(f"cat {HOST_JSON}", timeout=CONNECT_TIMEOUT_S, escalate=False)
    try:
        claimed = json.loads(answer.stdout)["name"] == session.name
    except (ValueError, TypeError, KeyError, RecursionError):
        claimed = False
    if not claimed:
        raise ReachError(
            f"{session.name}: the tailnet node {session.address} has that name, "
            f"but {HOST_JSON} there does not say so.",
            hint="If it is the host, set tailnet_address; if not, set another hostname.",
        )


@cache
def _secret(source: str, what: str) -> Secret:
    return resolve(source, what=what)


def _config_blocks(name: str) -> Iterator[str]:
    settings = settings_for(name)
    known = state.load(name)
    pins.write_known_hosts(name, settings=settings)
    strict = bool(known.host_keys)
    public = public_route(name)
    tailnet = [_tailnet_route(name, address) for address in _known_addresses(settings, known)]
    now = tailnet[0] if tailnet else public
    yield _block([name], now, strict=strict, host_name=now.address)
    if tailnet:
        yield _block([way.address for way in tailnet], now, strict=strict)
    yield _block(
        list(dict.fromkeys([settings.address, public.address])),
        public,
        strict=strict,
        host_name=public.address,
    )


def _block(patterns: list[str], way: Route, *, strict: bool, host_name: str | None = None) -> str:
    lines = [f"Host {' '.join(patterns)}"]
    if host_name:
        lines.append(f"  HostName {host_name}")
    lines += [f"  User {way.user}", f"  Port {way.port}"]
    files = (
        [str(way.identity_file)]
        if way.identity_file
        else [str(Path(text).expanduser()) for text in way.identity_files]
    )
    lines += [f"  IdentityFile {_quoted(file)}" for file in files]
    if way.identity_file or way.identities_only:
        lines.append("  IdentitiesOnly yes")
    if way.identity_agent:
        lines.append(f"  IdentityAgent {_quoted(way.identity_agent)}")
    lines.append(f"  HostKeyAlias {way.name}")
    lines.append(f"  UserKnownHostsFile {_quoted(str(way.known_hosts))}")
    lines.append("  GlobalKnownHostsFile /dev/null")
    # Nothing is pinned before the first converge: ssh then asks a person.
    lines.append(f"  StrictHostKeyChecking {'yes' if strict else 'ask'}")
    if way.proxy:
        lines.append(f"  ProxyCommand {way.proxy}")
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    escaped = path.replace("%", "%%")
    return f'"{escaped}"'
