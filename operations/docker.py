"""The engine, its configuration, and the chain that keeps what containers publish off the public side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfra.context import host

from facts.docker import DAEMON_JSON, Docker, PublishedPorts
from facts.docker_user import DockerUserChain
from facts.files import FileState, FileText
from facts.system import System
from facts.units import Units
from facts.users import GroupMembers
from operations import apt, notes
from operations.common import Commands, operation, program, refuse, script, warn
from operations.files import is_private, loosened, put_if_needed
from operations.programs import PROGRAMS
from operations.units import enable_if_needed, files_if_needed
from quietport.containers import EVERY_ADDRESS
from quietport.unit_names import CHAIN_UNIT
from quietport.unit_names import DOCKER as SERVICE

CHAIN_UNIT_PATH = f"/etc/systemd/system/{CHAIN_UNIT}"
LOOPBACK = "127.0.0.1"
# What a plan calls changes that others may depend on.
INSTALLATION, RESTART = "Docker's installation", "the engine's restart"
# daemon.json's mode, unless its owner made it private.
READABLE = "0644"
BIND_OPTION = "com.docker.network.bridge.host_binding_ipv4"
ROOT_IN_ALL_BUT_NAME = "who can start containers can read and write every file"
LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}

# Without its parser and with AppArmor in the kernel, 20.10 starts no container, and newer engines start them
# without a profile (https://github.com/docker/for-linux/issues/974). Engines only recommend it.
PROFILES = "apparmor"
# Debian 12's compose is version 1; Debian 13 only recommends the command line, so it is named.
DISTRIBUTION_PACKAGES = {
    "bookworm": ("docker.io", "docker-compose"),
    "trixie": ("docker.io", "docker-cli", "docker-compose"),
    "noble": ("docker.io", "docker-compose-v2"),
}
UPSTREAM_PACKAGES = ("docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin")
# What Docker's repository may give: the packages above and what they suggest.
UPSTREAM_ALLOWED = (*UPSTREAM_PACKAGES, "docker-buildx-plugin", "docker-ce-rootless-extras")
# 20.10 reads default-network-opts without an error and does nothing with it (read, and ran).
WITHOUT_NETWORK_DEFAULTS = ("bookworm",)

# live-restore first, by reload: a restart before it is on would stop every container.
_APPLY = """set -eu
systemctl reload docker.service
for try in $(seq 20); do
  if [ "$(timeout 10 docker info --format '{{.LiveRestoreEnabled}}' 2>/dev/null)" = true ]; then
    exec systemctl restart docker.service
  fi
  sleep 0.5
done
echo "Docker did not switch live-restore on when reloaded. It is not restarted: containers would stop." >&2
echo "See 'journalctl -u docker'; a swarm cannot have live-restore." >&2
exit 1
"""


@dataclass(frozen=True)
class Merge:
    """daemon.json as it will be, or why it cannot be made, as a sentence."""

    text: str = ""
    refusal: str | None = None
    changed: bool = True


def merged(existing: str | None, *, network_defaults: bool) -> Merge:
    """`existing` (the text of daemon.json, None when there is none) with what we need in it.

    Ours are the address ports are published on, live-restore, and log rotation where no log driver was
    chosen; every other key stays. `network_defaults`: whether the engine has default-network-opts.
    """
    try:
        config = json.loads(existing) if existing and existing.strip() else {}
    except ValueError as error:
        return Merge(refusal=f"{DAEMON_JSON} is not JSON ({error}). Correct it; it is not overwritten.")
    if not isinstance(config, dict):
        return Merge(refusal=f"{DAEMON_JSON} is not a JSON object. Correct it; it is not overwritten.")
    wanted = {**config, "ip": LOOPBACK, "live-restore": True, **_log(config)}
    if network_defaults:
        wanted["default-network-opts"] = _network_options(config.get("default-network-opts"))
    return Merge(text=json.dumps(wanted, indent=2) + "\n", changed=wanted != config)


def firewall_refusal(docker: dict[str, Any]) -> str | None:
    """Why published ports could not be kept off the public side with this engine, as a sentence."""
    if docker["firewall"] == "none":
        return (
            "Docker is told not to use iptables here (in daemon.json or by a flag), so no chain keeps "
            "published ports off the public side. Remove that, then run again."
        )
    if docker["firewall"] == "nftables":
        return (
            "Docker is told to use its nftables backend here, where the chain that keeps published ports off "
            "the public side does not exist. Remove that, then run again."
        )
    return None


def _log(config: dict[str, Any]) -> dict[str, Any]:
    """Log rotation, unless the host's owner chose a driver that rotates (or ships) by itself."""
    if config.get("log-driver", "json-file") not in ("json-file", "local"):
        return {}
    options = config.get("log-opts")
    return {
        "log-driver": config.get("log-driver", "json-file"),
        "log-opts": {**LOG_OPTIONS, **(options if isinstance(options, dict) else {})},
    }


def _network_options(options: Any) -> dict[str, Any]:
    options = options if isinstance(options, dict) else {}
    bridge = options.get("bridge") if isinstance(options.get("bridge"), dict) else {}
    return {**options, "bridge": {**bridge, BIND_OPTION: LOOPBACK}}


def has_network_defaults(*, source: str, codename: str) -> bool:
    """Whether the engine that `source` gives on this release has default-network-opts."""
    return source == "docker" or codename not in WITHOUT_NETWORK_DEFAULTS


def packages_for(*, source: str, codename: str) -> tuple[str, ...]:
    """Engine, compose, and what loads its profiles. A release that is not known gets Debian 13's names."""
    distribution = DISTRIBUTION_PACKAGES.get(codename, DISTRIBUTION_PACKAGES["trixie"])
    return (*(UPSTREAM_PACKAGES if source == "docker" else distribution), PROFILES)


def source_refusal(docker: dict[str, Any], source: str) -> str | None:
    """Why the engine cannot come from `source` on this host, as a sentence; None when it can."""
    if docker["source"] in (None, source) or docker["containers"] == 0:
        return None
    return (
        f'Docker is installed from "{docker["source"]}" and has {docker["containers"]} containers; changing '
        f'docker_source to "{source}" would replace the engine under them. Set docker_source = '
        f'"{docker["source"]}", or remove the containers first.'
    )


def kept(state: dict[str, Any]) -> tuple[str, str]:
    """Mode and group that daemon.json has or gets, from its state. Root writes it, and nobody else.

    A proxy's password may be in it (https://docs.docker.com/engine/daemon/proxy/): where its owner made it
    private, it stays so. A link gives way to a private file: what it points to may be private.
    """
    if is_private(state):
        return f"{int(state['mode'], 8) & ~0o022:04o}", str(state["group"])
    return ("0600" if state["kind"] == "link" else READABLE), "root"


@operation()
def configured(source: str) -> Commands:
    """daemon.json has what keeps published ports on loopback, and a running engine uses it.

    Before the engine is installed the file is written only: it is there at the first start. A running engine
    gets live-restore by reload, then a restart that leaves containers running.
    """
    docker = host.get_fact(Docker)
    network_defaults = has_network_defaults(source=source, codename=host.get_fact(System)["codename"])
    result = merged(host.get_fact(FileText, path=DAEMON_JSON), network_defaults=network_defaults)
    state = host.get_fact(FileState, path=DAEMON_JSON)
    mode, group = kept(state)
    refusal = source_refusal(docker, source) or result.refusal or firewall_refusal(docker)
    if refusal is not None:
        yield refuse(refusal)
        return
    wrong = [] if result.changed else loosened(DAEMON_JSON, state, mode=mode, group=group)
    if result.changed:
        # Made into a list first: a plan ends at the first command, and the difference is shown before it.
        private = mode != READABLE
        write = list(put_if_needed(DAEMON_JSON, result.text, mode=mode, group=group, secret=private))
        yield program("install", "-d", "-m", "0755", "--", str(Path(DAEMON_JSON).parent))
        yield from write
    elif wrong:
        # Not written anew: the engine would be older than it, and be restarted.
        notes.because(*wrong)
        yield program("chown", "--", f"root:{group}", DAEMON_JSON)
        yield program("chmod", "--", mode, DAEMON_JSON)
    if docker["running"] and (result.changed or docker["config_stale"]):
        if not result.changed:
            notes.because(f"the engine runs with an older {DAEMON_JSON}")
        notes.brings(RESTART)
        yield script(_APPLY, timeout=180)
    elif not (result.changed or wrong):
        host.noop("daemon.json is as wanted, and in use")


@operation()
def shielded(unit_text: str) -> Commands:
    """What containers publish is not reachable from the public side, from before Docker's start.

    The unit that docker.service requires is installed and has run; its rules are put back when they are not
    as wanted. Never restarted: docker.service requires it, so that would restart Docker too.
    Ports that were published on every address before stay so, and are named.
    """
    for sentence in on_every_address(host.get_fact(PublishedPorts)):
        warn(sentence)
    changed = False
    for step in (files_if_needed({CHAIN_UNIT_PATH: unit_text}), _chain_runs()):
        for command in step:
            changed = True
            yield command
    if not changed:
        host.noop("the chain is in place")


def on_every_address(ports: list[dict[str, Any]]) -> list[str]:
    """What there is to say of ports that containers publish on all addresses, as sentences; one at most."""
    found = {
        f"{port['host_port']}/{port['protocol']} of {port['container']}"
        for port in ports
        if port["host_ip"] in EVERY_ADDRESS
    }
    if not found:
        return []
    return [
        f"docker: published on every address, and shielded by the chain alone: {', '.join(sorted(found))}. "
        "The tailnet reaches them; publish them on 127.0.0.1 when it need not."
    ]


def _chain_runs() -> Commands:
    unit = host.get_fact(Units, names=[CHAIN_UNIT])[CHAIN_UNIT]
    if unit["active"] != "active" or unit["enabled"] != "enabled":
        yield from enable_if_needed(CHAIN_UNIT)
    elif not host.get_fact(DockerUserChain)["as_wanted"]:
        notes.because("the rules that shield containers are not in place")
        # The unit is a part of the engine's, and runs again with it.
        notes.after(RESTART)
        notes.after(PROGRAMS)
        yield program("systemctl", "reload", CHAIN_UNIT, timeout=60)


@operation()
def installed(source: str) -> Commands:
    """Engine and compose of `source` are installed; the engine is enabled and running."""
    refusal = source_refusal(host.get_fact(Docker), source)
    if refusal is not None:
        yield refuse(refusal)
        return
    absent = apt.missing(packages_for(source=source, codename=host.get_fact(System)["codename"]))
    changed = False
    if absent:
        changed = True
        notes.because(*(f"{name} is not installed" for name in absent))
        notes.brings(INSTALLATION)
        yield apt.install(absent)
    for command in enable_if_needed(SERVICE):
        changed = True
        yield command
    if not changed:
        host.noop("engine and compose are installed, and the engine runs")


@operation()
def group(users: tuple[str, ...]) -> Commands:
    """`users` are in the docker group. Others who are there are reported, not removed."""
    members = host.get_fact(GroupMembers, group="docker")
    for user in users:
        warn(f"{user} is put into the docker group, as docker_users asks: {ROOT_IN_ALL_BUT_NAME}.")
    for user in sorted(set(members) - set(users)):
        warn(f"{user} is in the docker group, and docker_users does not ask for it: {ROOT_IN_ALL_BUT_NAME}.")
    absent = [user for user in users if user not in members]
    if not absent:
        host.noop("the docker group is as asked for")
    notes.because(*(f"{user} is not in the docker group" for user in absent))
    notes.after(INSTALLATION)
    for user in absent:
        yield program("usermod", "--append", "--groups", "docker", user)
