"""Docker: the engine, and the ports its containers publish."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, quoted, sections, split
from quietport.containers import ATTEMPTS, FORMAT, SHIM, UNKNOWN_PORTS, parse_published
from quietport.docker_user import backend_of
from quietport.errors import HostProgramError
from quietport.processes import shell_is_running
from quietport.times import SHOW_START, newest, properties, stale, started_at
from quietport.unit_names import DOCKER

DAEMON_JSON = "/etc/docker/daemon.json"
_SOURCES = (("docker-ce", "docker"), ("docker.io", "debian"))
# What quietport.containers.published does, in shell: fails when Docker does not say and containers run.
READ_PUBLISHED = (
    f"if ! {shell_is_running('dockerd')}; then ! {shell_is_running(SHIM)}; exit; fi; "
    f"for again in $(seq {ATTEMPTS}); do ids=$(docker ps -q --no-trunc) || continue; "
    'test -n "$ids" || exit 0; '
    f"found=$(docker inspect --format {quoted([FORMAT])} $ids) || continue; "
    "printf '%s\\n' \"$found\"; exit 0; done; exit 1"
)
_SECTIONS = ("installed", "info", "config", "process", "mtimes", "now", "packages", "containers")


class PublishedPorts(FactBase[list[dict[str, Any]]]):
    """Ports of running containers that Docker forwards, with or without a proxy process.

    A list of {container, host_ip, host_port, container_port, protocol}; [] when nothing runs, and while
    docker.service itself does not. The host fails when it runs and does not say.
    """

    @override
    def command(self) -> str:
        return sections(engine=f"systemctl is-active -q {DOCKER}", ports=READ_PUBLISHED)

    @override
    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[dict[str, Any]]:
        parts = split(output, "engine", "ports")
        # Else it may be another program's containers; and a converge is what starts an engine that is down.
        if parts["ports"].code != 0 and parts["engine"].code == 0:
            raise FactProcessError(UNKNOWN_PORTS)
        return [asdict(port) for port in parse_published(parts["ports"].text)]


class Docker(FactBase[dict[str, Any]]):
    """The engine.

    {installed, running (it answers), version, iptables (it makes rules with iptables: the DOCKER-USER chain
    counts), firewall: iptables|nftables|none, or unknown where daemon.json is no JSON, live_restore (of the
    running engine), config_stale (daemon.json is newer than the running engine), containers (made, running
    or not), source: "debian" (docker.io), "docker" (docker-ce) or None}.
    """

    @override
    def command(self) -> str:
        return sections(
            installed="command -v dockerd",
            info="docker info --format '{{json .}}'",
            config=f"test ! -e {DAEMON_JSON} || cat {DAEMON_JSON}",
            process=f"{SHOW_START} -p ExecStart docker.service",
            mtimes=f"stat -L -c %.9Y {DAEMON_JSON}",
            now="date +%s.%N",
            packages="dpkg-query -W -f '${db:Status-Status} ${Package}\\n' docker.io docker-ce",
            containers="ls -1 /var/lib/docker/containers | wc -l",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return {
            "installed": False,
            "running": False,
            "version": None,
            "iptables": True,
            "firewall": "iptables",
            "live_restore": False,
            "config_stale": False,
            "containers": 0,
            "source": None,
        }

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, *_SECTIONS)
        shown = properties(parts["process"].text)
        info = _info(parts["info"].text)
        started = started_at(shown.get("ExecMainStartTimestamp", ""))
        alive = shown.get("MainPID", "0") != "0"
        firewall = _firewall(parts["config"].text, shown.get("ExecStart", ""))
        packages = parts["packages"].text.split("\n")
        running = bool(info.get("ServerVersion"))
        return self.default() | {
            "installed": parts["installed"].code == 0,
            "running": running,
            "version": info.get("ServerVersion") or None,
            "iptables": firewall == "iptables",
            "firewall": firewall,
            "live_restore": bool(info.get("LiveRestoreEnabled", False)),
            "config_stale": alive
            and stale(started, newest(parts["mtimes"].text, now=float(parts["now"].text or 0))),
            "containers": int(info["Containers"]) if running else int(parts["containers"].text or 0),
            "source": next(
                (source for package, source in _SOURCES if f"installed {package}" in packages), None
            ),
        }


def _info(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _firewall(daemon_json: str, command_line: str) -> str:
    try:
        return backend_of(daemon_json, command_line)
    except HostProgramError:
        # Not this fact's to refuse: an exception here would stop every host of the run.
        return "unknown"
