"""Back to a public host: what is ours is found by its marks, and taken away; what is not ours stays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyinfra.api.command import FunctionCommand, PyinfraCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import host

from control import pins, reach
from control import state as remembered
from control.guard import LAUNCHER
from control.settings import settings_for
from facts.files import FileText
from facts.sshd import SshdFiles
from facts.system import System
from facts.ufw import Ufw
from facts.units import Units
from operations import publicly, ufw
from operations.common import (
    Commands,
    executing,
    one_host_at_most,
    operation,
    program,
    refuse,
    show_diff,
    warn,
)
from operations.programs import files_if_needed as programs_if_needed
from quietport import sshd, ufw_rules
from quietport.hostfile import HOST_JSON
from quietport.ufw_rules import MARK, bare, is_ours, words_of
from quietport.unit_names import UNIT_FOLDER

WAY_IN = "undo, the way in"
# Hosts on which this run has put sshd back, or would, were it no dry run.
_restored: set[str] = set()


@dataclass(frozen=True)
class Seen:
    """What of ours is on the host: files of sshd and its unit's drop-in with their texts, masked units."""

    files: Mapping[str, str]
    unit_drop_in: str | None
    masked: tuple[str, ...]


def look() -> Seen:
    """What the host shows of it. On a host that was never converged the masks are somebody else's."""
    units = host.get_fact(Units, names=list(sshd.SOCKETS))
    drop_in = host.get_fact(FileText, path=sshd.UNIT_DROP_IN)
    return Seen(
        files=_files(),
        unit_drop_in=drop_in if drop_in is not None and drop_in.startswith(sshd.OURS) else None,
        masked=tuple(name for name in sshd.SOCKETS if units[name]["enabled"].startswith("masked"))
        if host.get_fact(FileText, path=str(HOST_JSON)) is not None
        else (),
    )


def of_sshd(seen: Seen) -> list[str]:
    """What of sshd is ours, a phrase each."""
    before = sshd.without_ours(seen.files)
    found = [f"{path} is ours" for path in seen.files if path not in before]
    found += [
        f"{path} has lines that we commented out or added"
        for path, text in before.items()
        if text != seen.files[path]
    ]
    found += [f"{sshd.UNIT_DROP_IN} is ours"] if seen.unit_drop_in is not None else []
    return found + [f"{name} is masked" for name in seen.masked]


def way_in(ports: Iterable[int]) -> tuple[ufw_rules.Rule, ...]:
    """The rules that let everybody at these ports."""
    return tuple(ufw_rules.Rule(f"allow {port}/tcp", WAY_IN) for port in ports)


def opening(rules: Sequence[str], ports: Iterable[int]) -> list[ufw_rules.Rule]:
    """The rules to add so that strangers reach the ports. One of somebody else's that does it is left."""
    foreign = {bare(rule) for rule in rules if not is_ours(rule)}
    return [rule for rule in way_in(ports) if rule.text not in foreign and rule.shown() not in rules]


def contradicting(rules: Sequence[str], ports: Iterable[int]) -> list[str]:
    """Rules of others about just these ports that close them. ufw would replace them."""
    return [rule for rule in ufw_rules.contradicting(rules, way_in(ports)) if not is_ours(rule)]


@dataclass(frozen=True)
class Before:
    """What ufw was before the first converge. `known`: an older version did not write it down."""

    known: bool = False
    active: bool = True
    defaults: Mapping[str, str] | None = None


def parse_record(text: str | None) -> Before:
    """The text of ufw.RECORD. One that cannot be read tells nothing."""
    try:
        document = json.loads(text or "")
        if document["schema"] != 1 or not isinstance(document["active"], bool):
            return Before()
        policies = {
            str(name): str(policy)
            for name, policy in document["defaults"].items()
            if name in ufw_rules.DEFAULTS and policy in ("allow", "deny")
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return Before()
    return Before(known=True, active=document["active"], defaults=policies)


def closing(
    firewall: Mapping[str, Any], before: Before, *, ports: Iterable[int], ipv6: bool
) -> list[PyinfraCommand]:
    """From the firewall of a converged host, with the way in open, to what it was before.

    It is switched off only when it is known to have been off. Otherwise it goes on, with the way in: what it
    keeps away besides ssh was perhaps kept away before.
    """
    ours = [rule for rule in firewall["rules"] if is_ours(rule)]
    commands: list[PyinfraCommand] = []
    if before.known and not before.active:
        if firewall["active"]:
            commands.append(program("ufw", "disable"))
        stay: set[str] = set()
    else:
        # While it is off they would say nothing, and are taken away with the rest.
        stay = {rule.shown() for rule in way_in(ports)} if firewall["active"] else set()
    commands += [ufw.delete(bare(rule)) for rule in ours if rule not in stay]
    if before.defaults:
        state = {**firewall, "active": firewall["active"] and before.active}
        commands += ufw.default_commands(state, ipv6=ipv6, wanted=before.defaults)
    return commands


def _files() -> dict[str, str]:
    found: dict[str, str] = host.get_fact(SshdFiles)
    return found


def _ports() -> list[int]:
    return sshd.public_ports(sshd.without_ours(_files()))


def anything_left() -> list[str]:
    """What of the project's closes this host still, a phrase each; empty when it is public."""
    rules = host.get_fact(Ufw)["rules"]
    marked = [rule for rule in rules if is_ours(rule) and not rule.endswith(f"'{MARK}{WAY_IN}'")]
    return of_sshd(look()) + [f"ufw has {rule}" for rule in marked]


@operation()
def programs_ready(pyz: bytes) -> Commands:
    """The host has the programs that the way back needs; nothing to do where nothing is left to undo."""
    changed = False
    for command in programs_if_needed(pyz) if anything_left() else ():
        changed = True
        yield command
    if not changed:
        host.noop("the programs are as built, or not needed")


@operation()
def firewall_opened() -> Commands:
    """An active ufw lets everybody at the ports on which sshd will listen. Refused: a rule that says no."""
    firewall = host.get_fact(Ufw)
    ports = _ports()
    missing = opening(firewall["rules"], ports)
    if not firewall["active"] or not missing or not anything_left():
        host.noop("the firewall is in nobody's way")
        return
    against = contradicting(firewall["rules"], ports)
    if against:
        yield refuse(
            f"the firewall has {'; '.join(against)}, which is not ours and keeps everybody from the public "
            f"way. Remove it on the host (`ufw delete {bare(against[0])}`), then run again."
        )
        return
    # First, so that no rule before them closes what they open. One of ours that says the same for another
    # reason (`quietport open`) gets the new reason in its place.
    present = {bare(rule) for rule in firewall["rules"]}
    commands = [
        program("ufw", *([] if rule.text in present else ["prepend"]), *words_of(rule.shown()))
        for rule in reversed(missing)
    ]
    yield from publicly.opening(host, commands)


@operation()
def sshd_as_shipped(login_user: str) -> Commands:
    """sshd listens as it did without us: our files gone, marked lines back, sockets as they are shipped."""
    seen = look()
    found = of_sshd(seen)
    if not found:
        host.noop("sshd is as the distribution ships it")
        return
    before = sshd.without_ours(seen.files)
    for path, text in seen.files.items():
        if before.get(path) != text:
            show_diff(path, text, before.get(path))
    if seen.unit_drop_in is not None:
        show_diff(sshd.UNIT_DROP_IN, seen.unit_drop_in, None)
    _restored.add(host.name)
    ports = [word for port in _ports() for word in ("--port", str(port))]
    command = program(LAUNCHER, "sshd-restore", "--user", login_user, *ports)
    yield from publicly.opening(host, [command])
    if not executing():
        return
    if left := of_sshd(look()):
        yield refuse(f"sshd-restore succeeded, and yet {'; '.join(left)}. Run again.")
        return
    # Where it answers from now on, by whichever address.
    reach.remember_port(host.name, _ports()[0])


@operation()
def firewall_as_before() -> Commands:
    """ufw without our rules; off when it is known to have been off before us, else on with the way in."""
    firewall = host.get_fact(Ufw)
    before = parse_record(host.get_fact(FileText, path=ufw.RECORD))
    ipv6 = host.get_fact(System)["ipv6"]
    commands = closing(firewall, before, ports=_ports(), ipv6=ipv6)
    if not commands:
        host.noop("the firewall has no rule of ours but the way in")
        return
    if firewall["active"] and not before.known:
        warn(
            "firewall: whether ufw was on before quietport is not known. It stays on, with the way in open "
            "to everybody; `ufw disable` on the host switches it off."
        )
    yield from publicly.risky(host, commands)


@operation()
def unit_gone(unit: str, files: Sequence[str]) -> Commands:
    """A unit of ours is stopped and gone, or our drop-ins for another's. A file that is not ours is left."""
    ours = [path for path in files if (host.get_fact(FileText, path=path) or "").startswith(sshd.OURS)]
    if not ours:
        host.noop(f"{', '.join(files)} gone")
        return
    if f"{UNIT_FOLDER}/{unit}" in ours:
        yield program("systemctl", "disable", "--now", unit)
    for path in ours:
        show_diff(path, host.get_fact(FileText, path=path), None)
        yield program("rm", "-f", "--", path)
    yield program("systemctl", "daemon-reload")


@operation()
def way_forgotten() -> Commands:
    """The operator's side goes by the public address again. The pinned key stays: it is the same host."""
    if host.name not in _restored:
        host.noop("the way is as it was")
        return
    yield FunctionCommand(_forget_way, (), {})


@one_host_at_most
def _forget_way(state: State, host: Host) -> bool:
    remembered.update(host.name, lambda old: replace(old, tailnet_addresses=(), tailnet_port=None))
    pins.write_known_hosts(host.name, settings=settings_for(host.name))
    return True
