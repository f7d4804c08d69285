"""sshd answers the tailnet alone, to keys alone: planned here, applied whole by `quietport sshd-apply`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfra.context import host

from control import reach
from control.guard import LAUNCHER
from facts.files import FileState, FileText
from facts.packetfilter import PacketFilter
from facts.sockets import ListeningSockets
from facts.sshd import SshdEffective, SshdFiles, SshdProcess
from facts.system import System
from facts.tailnet import Tailnet
from facts.units import Units
from operations import gate, notes
from operations.common import Commands, executing, operation, program, refuse, show_diff, warn
from operations.files import loosened
from operations.units import (
    enable_if_needed,
    files_if_needed,
    is_enabled,
    is_masked,
    name_others,
)
from quietport import admission, sshd
from quietport.errors import printable
from quietport.unit_names import FOLLOWER, UNIT_FOLDER

_TEMPLATES = Path(__file__).parents[1] / "templates/ssh"
UNIT_DROP_IN_TEXT = (_TEMPLATES / "ssh.service.conf").read_text()
FOLLOWER_FILES = {f"{UNIT_FOLDER}/{FOLLOWER}": (_TEMPLATES / FOLLOWER).read_text()}
# Who may write them says where sshd listens. sshd-apply makes them for root alone to write, and all to read.
OUR_FILES = (sshd.DROP_IN, sshd.UNIT_DROP_IN)
# Lines of others' files that a sentence names; `--diff` shows them all.
MAX_SHOWN = 6
# The follower may have sshd reload just then: for an instant it listens nowhere.
SETTLED_WITHIN_S = 20.0
SETTLES_S = 2.0


@dataclass(frozen=True)
class Seen:
    """What the host shows of its sshd. `public`: where it is to listen behind the firewall (break-glass)."""

    files: dict[str, str]
    unit_drop_in: str | None
    addresses: tuple[str, ...]
    service: Mapping[str, Any]
    sockets: Mapping[str, Mapping[str, Any]]
    listeners: frozenset[sshd.Listener]
    stray_sockets: tuple[str, ...]
    stale: bool
    effective: tuple[dict[str, list[str]], ...]
    modes: tuple[str, ...] = ()
    """What of mode and owner of our files is not as we made it, a phrase each."""
    public: tuple[sshd.Listener, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What it must show: files with their texts, and where sshd listens."""

    files: Mapping[str, str]
    listeners: frozenset[sshd.Listener]


def wanted(seen: Seen, *, login_user: str) -> Wanted:
    """The wanted state, from the tailnet addresses and from what others wrote into sshd's files."""
    drop_in = sshd.render(
        seen.addresses,
        permit_root_login=sshd.root_login(seen.files, login_user=login_user),
        penalties=any("persourcepenalties" in effective for effective in seen.effective),
        public=seen.public,
    )
    files = {**sshd.wanted_files(seen.files, drop_in), sshd.UNIT_DROP_IN: UNIT_DROP_IN_TEXT}
    listeners = seen.public or sshd.wanted_listeners(seen.addresses)
    return Wanted(files=files, listeners=frozenset(listeners))


def differences(seen: Seen, target: Wanted) -> list[str]:
    """Why the host is not as wanted, one phrase each; empty when it is. Files, units and what really runs."""
    found = [f"{path} differs" for path, text in target.files.items() if _old(seen, path) != text]
    found += seen.modes
    found += [f"{unit} is not masked" for unit, state in seen.sockets.items() if not is_masked(state)]
    found += [f"{unit} is active" for unit in seen.stray_sockets]
    if not is_enabled(seen.service):
        found.append(f"{sshd.UNIT} is not enabled")
    if seen.service["need_reload"]:
        found.append("systemd has not read its unit")
    if seen.stale:
        found.append("sshd runs with an older configuration")
    if seen.listeners != target.listeners:
        listening = ", ".join(sorted(map(sshd.endpoint, seen.listeners)))
        found.append(f"sshd listens on {listening or 'nothing'}")
    for effective in seen.effective:
        found += sshd.not_keys_only(effective)
    return list(dict.fromkeys(found))


def plan(seen: Seen, target: Wanted, *, users: Iterable[str]) -> bytes:
    """The plan for `quietport sshd-apply` (quietport/sshd_apply.py documents its keys)."""
    # A file of others that stays as it is, is none of sshd-apply's business: it may well be a link.
    files = {
        path: {"old_sha256": _sha256(_old(seen, path)), "text": text}
        for path, text in target.files.items()
        if path in OUR_FILES or _old(seen, path) != text
    }
    document = {
        "schema": 1,
        "files": files,
        "mask": list(sshd.SOCKETS),
        "listeners": sorted(list(listener) for listener in target.listeners),
        "users": list(dict.fromkeys(users)),
    }
    return json.dumps(document).encode()


def remarks(seen: Seen, target: Wanted) -> list[str]:
    """What of others' doing is undone here, a sentence each: nobody should have to find it out later."""
    found = []
    undone = sshd.neutralised(seen.files, target.files)
    lines = list(dict.fromkeys(f"{path}: {line}" for path, line in undone))
    if lines:
        more = f" and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
        shown = "; ".join(lines[:MAX_SHOWN])
        found.append(f"ssh: commented out with a mark, because they win or stay active: {shown}{more}")
    if seen.files.get(sshd.MAIN) and not sshd.reads_drop_in(seen.files):
        found.append(f"ssh: {sshd.MAIN} does not read {sshd.DROP_IN}: it gets an Include line for it")
    active = [unit for unit in sshd.SERVICE_SOCKETS if seen.sockets[unit]["active"] == "active"]
    if active:
        found.append(f"ssh: {', '.join(active)} listens in sshd's place: masked, {sshd.UNIT} takes over")
    return [printable(sentence) for sentence in found]


def _old(seen: Seen, path: str) -> str | None:
    return seen.unit_drop_in if path == sshd.UNIT_DROP_IN else seen.files.get(path)


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _look(login_user: str, *, break_glass: Sequence[str] = ()) -> Seen:
    units = host.get_fact(Units, names=[sshd.UNIT, *sshd.SOCKETS])
    service = units[sshd.UNIT]
    sockets = [socket for socket in host.get_fact(ListeningSockets) if socket["protocol"].startswith("tcp")]
    # Both units hold a socket whose service is at work.
    holding = {unit for socket in sockets for unit in str(socket["unit"]).split(", ")}
    stray = {unit for unit in holding if unit.startswith(("ssh@", "sshd@"))}
    return Seen(
        files=host.get_fact(SshdFiles),
        unit_drop_in=host.get_fact(FileText, path=sshd.UNIT_DROP_IN),
        addresses=tuple(host.get_fact(Tailnet)["addresses"]),
        service=service,
        sockets={name: units[name] for name in sshd.SOCKETS},
        # By process: sessions of sshd listen too, for forwarded ports.
        listeners=frozenset(
            (str(socket["address"]), int(socket["port"]))
            for socket in sockets
            if service["main_pid"] and socket["pid"] == service["main_pid"]
        ),
        stray_sockets=tuple(sorted(unit for unit in stray if unit.endswith(".socket"))),
        stale=bool(host.get_fact(SshdProcess)["stale"]),
        effective=tuple(host.get_fact(SshdEffective, user=login_user, addr=addr) for addr in sshd.ASKED_FROM),
        modes=tuple(_modes()),
        public=tuple(sshd.public_listeners(ipv6=host.get_fact(System)["ipv6"])) if break_glass else (),
    )


def _modes() -> Iterator[str]:
    for path in OUR_FILES:
        yield from loosened(path, host.get_fact(FileState, path=path))


def _strangers_come_in(break_glass: Sequence[str]) -> str:
    """Why sshd may not listen on every address of this host yet, as a sentence; "" when it may."""
    texts = {int(family): text for family, text in host.get_fact(PacketFilter).items()}
    return admission.admission_problem(texts, port=sshd.PORT, networks=break_glass)


@operation()
def followed() -> Commands:
    """A service keeps sshd on the addresses of tailscale0. It leaves an sshd that is not ours yet alone."""
    changed = False
    for command in files_if_needed(FOLLOWER_FILES):
        changed = True
        yield command
    if changed:
        # One that runs has the old unit's limits. A new program it notices by itself.
        yield program("systemctl", "try-restart", FOLLOWER)
    for command in enable_if_needed(FOLLOWER):
        changed = True
        yield command
    if not changed:
        host.noop(f"{FOLLOWER} follows the addresses")


def not_as_wanted(login_user: str, *, break_glass: Sequence[str] = ()) -> list[str]:
    """What is wrong with sshd on this host now, as phrases; empty when it is as `tailnet_only` leaves it."""
    end = time.monotonic() + SETTLED_WITHIN_S
    while True:
        seen = _look(login_user, break_glass=break_glass)
        left = differences(seen, wanted(seen, login_user=login_user))
        if not left or time.monotonic() > end:
            return left
        time.sleep(SETTLES_S)


@operation()
def tailnet_only(login_user: str, users: list[str], break_glass: Sequence[str] = ()) -> Commands:
    """sshd listens on every tailnet address and nowhere else, and takes keys alone, from everyone.

    With networks in `break_glass` it listens on every address, once the firewall admits those alone.

    `login_user` is whom the operator logs in as: the gate's keys-only login just before is the proof that
    passwords may go. `users` are checked besides everyone with a login shell. If any step fails, the old
    state is back and the host fails.
    """
    seen = _look(login_user, break_glass=break_glass)
    if executing() and not seen.files.get(sshd.MAIN):
        yield refuse(f"there is no {sshd.MAIN} here. Install openssh-server, then run again.")
        return
    name_others(sshd.UNIT, seen.service)
    target = wanted(seen, login_user=login_user)
    if not differences(seen, target):
        host.noop("sshd answers the tailnet alone, to keys alone")
        return
    notes.because(*differences(seen, target))
    if not (seen.addresses or seen.public):
        notes.depends("the join")
    # Before: when the plan is made, the firewall may be about to change.
    if executing() and break_glass and (problem := _strangers_come_in(break_glass)):
        yield refuse(f"sshd shall listen on every address, as break_glass_cidrs asks. {problem}")
        return
    for sentence in remarks(seen, target):
        warn(sentence)
    if seen.addresses or seen.public:
        for path, text in target.files.items():
            if _old(seen, path) != text:
                show_diff(path, _old(seen, path), text)
    data = plan(seen, target, users=[login_user, *users])
    yield from gate.risky(host, [program(LAUNCHER, "sshd-apply", stdin=data)])
    if not executing():
        return
    left = not_as_wanted(login_user, break_glass=break_glass)
    if left:
        yield refuse(f"sshd is not as wanted although sshd-apply succeeded: {'; '.join(left)}. Run again.")
        return
    # It may have answered on a port of its own until now, which is where the next connection would knock.
    reach.remember_port(host.name, sshd.PORT)
