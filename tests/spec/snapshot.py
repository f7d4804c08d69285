"""What a host is asked all at once before its first spec, so that a spec costs no round trip.

What the specs read and is not here is asked for by itself, later and one by one. `QUESTIONS` and
`facts_of` are held against the specs by tests/unit/test_spec_snapshot.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from pyinfra.api import FactBase
from testinfra.backend.base import BaseBackend

from control.settings import HostSettings
from deploys.agent_access import KNOWN_HOSTS, LAUNCHERS
from deploys.programs import HOST_JSON
from deploys.timers import declared, prune_of
from deploys.users import DIRECTORIES
from facts.apt import Keyring
from facts.docker import DAEMON_JSON, Docker, PublishedPorts
from facts.files import FileState, FileText
from facts.guard import Guard
from facts.packages import Packages
from facts.packetfilter import PacketFilter
from facts.sessions import Sessions
from facts.sockets import ListeningSockets
from facts.sshd import SshdEffective, SshdFiles, SshdProcess
from facts.system import System
from facts.tailnet import Tailnet
from facts.ufw import Ufw
from facts.units import Units
from operations.agent_access import STATE
from operations.programs import LAUNCHER, ZIPAPP
from quietport.doctor.place import LATEST
from quietport.sshagent.names import LINGER
from quietport.sshd import ASKED_FROM, SOCKETS
from quietport.unit_names import BOOT_UNIT, FOLLOWER
from tests.spec.reading import UNIT, line_of

NEEDED = ("ufw", "openssh-server", "tailscale", "python3", "unattended-upgrades")
SOURCES = "/etc/apt/sources.list.d/tailscale.sources"
KEYRING = "/etc/apt/keyrings/tailscale.gpg"
REPORT = "/var/lib/quietport/ports.json"
# What Docker leaves to us, and the one that stands while Docker rearranges its own rules.
CHAINS = (("filter", "DOCKER-USER"), ("mangle", "QUIETPORT-FORWARD"))
FAMILIES = ("iptables", "ip6tables")

Question = tuple[str, ...]
QUESTIONS: tuple[Question, ...] = (
    ("apt-cache policy tailscale openssh-server",),
    ("apt-config dump APT::Periodic",),
    ("apt-config dump Unattended-Upgrade::Origins-Pattern",),
    ("dpkg --audit",),
    ("docker compose version 2>/dev/null || docker-compose version",),
    ("find /run /tmp /var/tmp -xdev -name %s", "*auth*key*"),
    ("getent group docker",),
    ("ip -j addr show scope global",),
    ("iptables -S INPUT",),
    ("ip6tables -S INPUT",),
    ("%s -S %s", "iptables", "ufw-user-input"),
    ("%s -S %s", "ip6tables", "ufw6-user-input"),
    *((f"{program} -t {table} -S {chain}",) for program in FAMILIES for table, chain in CHAINS),
    *((f"{program} -t {table} -S FORWARD",) for program in FAMILIES for table, _ in CHAINS),
    ("quietport docker-user --check; echo $?",),
    (f"{LAUNCHER} --help",),
    *((f"{path} --version",) for path in LAUNCHERS),
    ("stat -c %s /usr/sbin /usr/bin /dev / /var/lib", "%U"),
    ("systemctl cat -- ssh.service",),
    ("systemctl list-unit-files --type=timer --no-legend --no-pager %s", "quietport-*"),
    ("systemctl list-units --failed --plain --no-legend --no-pager",),
    ("systemctl list-units --type=socket --state=active --plain --no-legend --no-pager",),
    ("systemctl show --value -p After -- ssh.service",),
    ("systemctl show --value -p Before -- %s", BOOT_UNIT),
    ("systemctl show --value -p RequiredBy -- %s", BOOT_UNIT),
    ("systemctl show -p Requires,After -- docker.service",),
    ("systemctl show ufw.service --property=ExecStart,ExecStop",),
    ("systemd-analyze security --no-pager %s", FOLLOWER),
    ("tailscale serve status --json",),
)


def lines(settings: HostSettings) -> list[str]:
    """Everything to ask of a host that is told `settings`, as it goes to a shell there."""
    asked = [*QUESTIONS, *_of_users(settings), *_of_timers(settings)]
    return [BaseBackend.quote(*question) for question in asked] + [*_facts(settings)]


def _facts(settings: HostSettings) -> Iterator[str]:
    for fact, *args in facts_of(settings):
        made = fact()
        if needed := made.requires_command(*args):
            yield BaseBackend.quote("command -v %s", needed)
        yield BaseBackend.quote("sh -c %s", line_of(made, *args))


def facts_of(settings: HostSettings) -> Iterator[tuple[Any, ...]]:
    """Facts and their arguments."""
    plain: tuple[type[FactBase[Any]], ...] = (
        Docker, Guard, ListeningSockets, PacketFilter, PublishedPorts, Sessions, SshdFiles, SshdProcess,
        System, Tailnet, Ufw,
    )  # fmt: skip
    yield from ((fact,) for fact in plain)
    yield Packages, list(NEEDED)
    yield Keyring, KEYRING
    users = {settings.user, "root", *settings.agents}
    yield from ((SshdEffective, user, address) for user in users for address in ASKED_FROM)
    services = ("docker", "quietport-docker-user", "ssh", "tailscaled", "ufw")
    for unit in (*(f"{name}.service" for name in services), FOLLOWER, BOOT_UNIT):
        yield Units, [unit]
    yield Units, list(SOCKETS)
    yield Units, [f"{unit}.timer" for unit in sorted(_timers(settings))]
    texts = (*LAUNCHERS, DAEMON_JSON, HOST_JSON, SOURCES, REPORT, LATEST)
    yield from ((FileText, path) for path in texts)
    yield from ((FileState, path) for path in _paths(settings))


def _paths(settings: HostSettings) -> Iterable[str]:
    homes = [f"/home/{user}" for user in settings.agents]
    roots = [f"{home}/{STATE}" for home in homes]
    folders = {str(PurePosixPath(path).parent) for path in settings.secrets}
    lingering = [f"{LINGER}/{user}" for user in settings.agents]
    sessions = [f"{root}/sessions" for root in roots]
    files = (*LAUNCHERS, LAUNCHER, ZIPAPP, KNOWN_HOSTS, KEYRING, REPORT, LATEST)
    directories = (path for path, _ in DIRECTORIES)
    ours = (*files, *directories, *folders, *settings.secrets)
    return (*ours, *homes, *roots, *sessions, *lingering)


def _of_users(settings: HostSettings) -> Iterator[Question]:
    for user in settings.agents:
        for command in ("getent passwd %s", "getent shadow %s", "id -nG %s", "id -u %s"):
            yield command, user
    for folder in sorted({str(PurePosixPath(path).parent) for path in settings.secrets}):
        yield "find %s -type f", folder


def _timers(settings: HostSettings) -> list[str]:
    wanted = [*declared(settings), *(prune_of(user, f"/home/{user}") for user in settings.agents)]
    return [timer.unit for timer in wanted]


def _of_timers(settings: HostSettings) -> Iterator[Question]:
    for unit in _timers(settings):
        yield "systemctl cat -- %s", f"{unit}.timer"
        yield "systemd-analyze security --no-pager %s", f"{unit}.service"
        yield UNIT, f"{unit}.service"
