"""Docker: the engine, its containers, those of compose, and the chain that shields what they publish.

The engine is asked through its socket (https://docs.docker.com/reference/api/engine): its command line takes
a tenth of a second to start. It is asked only while dockerd runs, since docker.socket would start it.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from quietport import docker_user
from quietport.containers import EVERY_ADDRESS
from quietport.doctor.model import Check, Finding, keeping
from quietport.doctor.place import HERE, QUICK_S, Place, by_converge
from quietport.errors import PROBLEM, HostProgramError, printable
from quietport.processes import is_running
from quietport.unit_names import CHAIN_UNIT
from quietport.unit_names import DOCKER as SERVICE

SOCKET = "/run/docker.sock"
MAX_BYTES = 16 << 20
# Labels that compose gives its containers (docker/compose, pkg/api/labels.go).
PROJECT, COMPOSE_SERVICE, ONE_OFF = (
    f"com.docker.compose.{label}" for label in ("project", "service", "oneoff")
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Restart policies under which a container that ended well has done what it was for.
_MAY_END = ("", "no", "on-failure")
_UNASKED = "The engine runs and cannot be asked"

Ask = Callable[[str], Any]
Container = Mapping[str, Any]


class _OverSocket(http.client.HTTPConnection):
    """HTTP over the engine's socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=QUICK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_engine(path: str, *, at: str = SOCKET) -> Any:
    """What the engine answers to GET `path`, as JSON. Raises HostProgramError."""
    connection = _OverSocket(at)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(MAX_BYTES)
        if answer.status != http.HTTPStatus.OK:
            raise HostProgramError(f"Docker answers {path.partition('?')[0]} with {answer.status}.")
        return json.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise HostProgramError(f"Docker does not answer ({type(error).__name__}).") from error
    finally:
        connection.close()


def docker(declared: Mapping[str, Any], *, place: Place = HERE, ask: Ask = ask_engine) -> list[Finding]:
    """The engine runs, comes back at boot and answers; no container of its own accord is in trouble."""
    skipped = _not_declared(declared)
    if skipped:
        return [skipped]
    (unit,) = place.show(SERVICE, properties=("LoadState", "ActiveState", "UnitFileState"))
    found = [*_of_unit(unit, declared)]
    if unit.get("ActiveState") != "active":
        return found
    with keeping(found):
        if not _runs(place):
            return [*found, _not_running("active, and there is no dockerd")]
        found += _of_engine(declared, ask)
        if any(one.reason.startswith(_UNASKED) for one in found):
            return found
        containers = _containers(ask)
        for sick in _in_trouble((one for one in containers if PROJECT not in _labels(one)), ask):
            found.append(sick)
    running = sum(one.get("State") == "running" for one in containers)
    return found or [Finding("PASS", f"The engine answers; running containers: {running}.")]


def compose(declared: Mapping[str, Any], *, place: Place = HERE, ask: Ask = ask_engine) -> list[Finding]:
    """Every container that compose has made runs and is healthy, or has ended as it may.

    A service whose container was removed is not known to the engine, and is not missed here.
    """
    skipped = _not_declared(declared)
    if skipped:
        return [skipped]
    if not _runs(place):
        return [Finding("SKIP", "The engine does not run (see docker).")]
    services = [one for one in _containers(ask) if PROJECT in _labels(one)]
    if not services:
        return [Finding("SKIP", "No container of compose is here.")]
    found: list[Finding] = []
    with keeping(found):
        for sick in _in_trouble((one for one in services if _labels(one).get(ONE_OFF) != "True"), ask):
            found.append(sick)
    projects = {_labels(one)[PROJECT] for one in services}
    shown = ", ".join(sorted(printable(str(name), limit=60) for name in projects))
    return found or [Finding("PASS", f"Every service is well: {shown}.")]


def shielded(
    declared: Mapping[str, Any],
    *,
    place: Place = HERE,
    ask: Ask = ask_engine,
    faults: Callable[[], list[docker_user.Fault]] = lambda: docker_user.faults(timeout=QUICK_S),
) -> list[Finding]:
    """The chain keeps what containers publish off the public side, from before the engine's start."""
    skipped = _not_declared(declared)
    if skipped:
        return [skipped]
    (unit,) = place.show(CHAIN_UNIT, properties=("LoadState", "ActiveState", "UnitFileState"))
    if unit.get("LoadState") != "loaded":
        return [Finding("FAIL", f"{CHAIN_UNIT} is {unit.get('LoadState')}.", by_converge(declared))]
    found = []
    if (unit.get("ActiveState"), unit.get("UnitFileState")) != ("active", "enabled"):
        reason = f"{CHAIN_UNIT} is {unit.get('ActiveState')} and {unit.get('UnitFileState')}."
        found.append(Finding("FAIL", reason, f"`systemctl enable --now {CHAIN_UNIT}`."))
    with keeping(found):
        try:
            wrong = faults()
        except HostProgramError as error:
            if error.code != PROBLEM:
                raise
            step = f"Then `systemctl restart {SERVICE}`. {by_converge(declared)}"
            return [*found, Finding("FAIL", str(error), step)]
    again = f"`systemctl reload-or-restart {CHAIN_UNIT}`."
    found += [Finding("WARN" if one.late else "FAIL", f"{one.sentence}.", again) for one in wrong]
    everywhere = _on_every_address(_containers(ask)) if not found and _runs(place) else []
    more = f"; published on every address and shielded by it: {', '.join(everywhere)}" if everywhere else ""
    return found or [Finding("PASS", f"The chain is in place{more}.")]


def _on_every_address(containers: Iterable[Container]) -> list[str]:
    """Ports as people write them. Whether they may be published so is the listeners' check."""
    found = set()
    for container in containers:
        for port in container.get("Ports") or []:
            if port.get("PublicPort") and str(port.get("IP") or "") in EVERY_ADDRESS:
                found.add(printable(f"{port['PublicPort']}/{port.get('Type')}", limit=20))
    return sorted(found)


def _not_declared(declared: Mapping[str, Any]) -> Finding | None:
    source = declared.get("docker_source")
    if source is None:
        return Finding("SKIP", "Nothing is declared of Docker here.")
    return Finding("SKIP", "No Docker is declared.") if source == "none" else None


def _runs(place: Place) -> bool:
    return is_running("dockerd", proc=place.path("/proc"))


def _of_unit(unit: Mapping[str, str], declared: Mapping[str, Any]) -> Iterable[Finding]:
    load, active, enabled = (unit.get(key, "") for key in ("LoadState", "ActiveState", "UnitFileState"))
    if load == "masked":
        step = f"`systemctl unmask {SERVICE}` and `systemctl enable --now {SERVICE}`."
        yield Finding("FAIL", f"{SERVICE} is masked.", step)
        return
    if load != "loaded":
        yield Finding("FAIL", f"{SERVICE} is {load or 'unknown'}.", by_converge(declared))
        return
    if enabled != "enabled":
        reason = f"{SERVICE} is {enabled or 'not enabled'}: it does not start at boot."
        yield Finding("FAIL", reason, f"`systemctl enable {SERVICE}`.")
    if active != "active":
        yield _not_running(active)


def _not_running(state: str) -> Finding:
    step = (
        f"`journalctl -u {SERVICE} -n 20 --no-pager` says why. Then `systemctl reset-failed {SERVICE}` and "
        f"`systemctl start {SERVICE}`."
    )
    return Finding("FAIL", f"The engine does not run: {SERVICE} is {state or 'unknown'}.", step)


def _of_engine(declared: Mapping[str, Any], ask: Ask) -> Iterable[Finding]:
    try:
        info = ask("/info")
        live_restore = bool(info.get("LiveRestoreEnabled"))
    except (HostProgramError, AttributeError) as error:
        reason = f"{_UNASKED}: {printable(str(error), limit=200)}"
        yield Finding("FAIL", reason, f"`systemctl restart {SERVICE}`.")
        return
    if not live_restore:
        reason = "live-restore is off: a restart of the engine would stop every container."
        yield Finding("WARN", reason, by_converge(declared))


def _containers(ask: Ask) -> list[Container]:
    listed = ask("/containers/json?all=1")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise HostProgramError("Docker's list of containers is not understood.")
    return listed


def _labels(container: Container) -> Mapping[str, Any]:
    labels = container.get("Labels")
    return labels if isinstance(labels, dict) else {}


def _in_trouble(containers: Iterable[Container], ask: Ask) -> Iterable[Finding]:
    for container in containers:
        state = trouble(container, ask)
        if state:
            name, shown = _names(container)
            yield Finding("FAIL", f"{shown} {state}.", _step(container, name))


def trouble(container: Container, ask: Ask) -> str:
    """What is wrong with a container of `/containers/json`, as the rest of a sentence; "" when nothing is.

    One that ended with 0 and is not to be started again has done its work. Of those that are none of
    compose's, one that somebody made or stopped by hand is as somebody wants it.
    """
    state, status = str(container.get("State", "")), str(container.get("Status", ""))
    of_compose = PROJECT in _labels(container)
    if state == "running":
        return "is unhealthy" if "(unhealthy)" in status else ""
    if state == "created":
        return "was never started" if of_compose else ""
    if state != "exited":
        return f"is {printable(state, limit=20)}" if state else "is in no state that is known"
    policy, code = _end(str(container.get("Id", "")), ask)
    if policy in _MAY_END:
        # Not to be started again: by hand, by a scheduler, or never.
        failed = code != 0 and (of_compose or policy == "on-failure")
        return f"ended with exit code {code}" if failed else ""
    # Where it ends by itself the engine starts it again: this one was stopped, and that is to last.
    if policy == "unless-stopped" and not of_compose:
        return ""
    return f"does not run (exit code {code}), and is to be restarted whenever it ends ({policy})"


def _end(identity: str, ask: Ask) -> tuple[str, int]:
    """Restart policy and exit code of a container."""
    try:
        shown = ask(f"/containers/{quote(identity, safe='')}/json")
        policy = str(shown["HostConfig"]["RestartPolicy"]["Name"])
        return policy, int(shown["State"]["ExitCode"])
    except (LookupError, TypeError, ValueError) as error:
        raise HostProgramError("What Docker says of a container is not understood.") from error


def _names(container: Container) -> tuple[str, str]:
    """What a command calls it, and what a reader does."""
    names = container.get("Names")
    name = str(names[0]).lstrip("/") if isinstance(names, list) and names else ""
    if not _NAME.fullmatch(name):
        name = re.sub(r"[^0-9a-f]", "", str(container.get("Id", "")))[:12]
    labels = _labels(container)
    if PROJECT not in labels:
        return name, f"The container {name}"
    service = printable(f"{labels[PROJECT]}/{labels.get(COMPOSE_SERVICE, '?')}", limit=100)
    return name, f"The service {service} ({name})"


def _step(container: Container, name: str) -> str:
    if container.get("State") == "paused":
        return f"`docker unpause {name}`."
    verb = "start" if container.get("State") in ("exited", "created") else "restart"
    return f"`docker logs --tail 20 {name}` says why. Then `docker {verb} {name}`."


CHECKS = (Check("docker", docker), Check("compose", compose), Check("published", shielded))
