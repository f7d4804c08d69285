"""The ports that Docker forwards to containers, by a proxy process or by packet filter rules alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from quietport.commands import run
from quietport.errors import HostProgramError
from quietport.net import parse_address
from quietport.processes import is_running
from quietport.ss import Listener, Protocol

# One line a container. The names are the engine's own: Go templates of `docker inspect`.
FORMAT = "{{json .Name}} {{json .NetworkSettings.Ports}}"
# What is published there is published to everybody.
EVERY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104, what is looked for
# Whoever holds a container's end while the engine itself is away (live-restore).
SHIM = "containerd-shim"
# A container may end between being listed and being looked at.
ATTEMPTS = 3
TIMEOUT_S = 10.0
UNKNOWN_PORTS = (
    "Docker does not say which ports its containers publish, and there are containers: look at "
    "`systemctl status docker`, and run this as root."
)

_PROTOCOLS: dict[str, Protocol] = {"tcp": "tcp", "udp": "udp", "sctp": "sctp"}


@dataclass(frozen=True)
class Published:
    """One port of a running container. `host_ip` is "" for every address, `host_port` 0 for none."""

    container: str
    host_ip: str
    host_port: int
    container_port: int
    protocol: Protocol

    def is_held_by(self, listener: Listener) -> bool:
        """Whether a socket of Docker's at the place of `listener` is this port's."""
        if (listener.protocol, listener.port) != (self.protocol, self.host_port):
            return False
        return listener.address in (self.host_ip, "*") or not self.host_ip


def parse_published(text: str) -> list[Published]:
    """Read what `docker inspect` prints with FORMAT. Raises ValueError for a container not understood.

    Lines that are no container's, such as a warning of the client, are passed over.
    """
    found: list[Published] = []
    for line in text.splitlines():
        if not line.startswith('"'):
            continue
        name, end = json.JSONDecoder().raw_decode(line)
        ports = json.loads(line[end:]) or {}
        if not isinstance(ports, dict):
            raise ValueError("a container's ports are no object")
        for port, bindings in ports.items():
            number, _, named = port.partition("/")
            protocol = _PROTOCOLS[named or "tcp"]
            found += [
                Published(
                    container=str(name).lstrip("/"),
                    host_ip=str(binding.get("HostIp") or ""),
                    host_port=int(binding.get("HostPort") or 0),
                    container_port=int(number),
                    protocol=protocol,
                )
                for binding in bindings or []
            ]
    for one in found:
        if one.host_ip:
            parse_address(one.host_ip)
    return found


def published() -> list[Published]:
    """The ports that containers of this host publish. [] without Docker, and when nothing runs.

    Raises HostProgramError when Docker does not answer and containers run: their ports are then forwarded
    as before, and nobody says which. Docker is not started by the question.
    """
    if not is_running("dockerd"):
        if is_running(SHIM):
            raise HostProgramError(UNKNOWN_PORTS)
        return []
    for _ in range(ATTEMPTS):
        listed = run(["docker", "ps", "-q", "--no-trunc"], timeout=TIMEOUT_S)
        names = listed.out.split()
        if listed.code == 0 and not names:
            return []
        seen = run(["docker", "inspect", "--format", FORMAT, *names], timeout=TIMEOUT_S)
        if listed.code == 0 and seen.code == 0:
            try:
                return parse_published(seen.out)
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise HostProgramError(f"docker inspect printed what is not understood: {error}.") from error
    raise HostProgramError(UNKNOWN_PORTS)
