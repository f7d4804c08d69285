"""What is read out of a target past its sshd and firewall: for failed tests, and for the probe."""

from __future__ import annotations

import json
import time
from pathlib import Path

from lab import targets
from lab.process import LabError
from lab.state import Run, Target, write

# File name: command. Each says what there is even where the program is missing.
COMMANDS = {
    "journal.txt": "journalctl --no-pager --boot --lines 5000",
    "failed-units.txt": "systemctl --failed --no-pager",
    "sshd-T.txt": "sshd -T",
    "ufw.txt": "ufw status verbose; ufw show added",
    "ss.txt": "ss -lntup",
    "tailscale.txt": "tailscale status; tailscale debug prefs",
    "addresses.txt": "ip address; ip route; ip -6 route",
    "firewall.txt": "iptables-save; ip6tables-save",
    "docker.txt": "docker ps --all --no-trunc",
}


def collect(run_: Run, target: Target) -> Path:
    """Put what a failed test needs into a new directory of the run's logs, and return that."""
    directory = run_.logs / f"{target.name}-{time.strftime('%Y%m%dT%H%M%S')}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        try:
            done = targets.execute(run_, target, ["sh", "-c", f"{{ {command}; }} 2>&1"], check=False)
            text = done.stdout + done.stderr
        except LabError as error:
            text = f"could not be asked: {error}\n"
        write(directory / name, text)
    return directory


def container_addresses(run_: Run, target: Target) -> list[str]:
    """Addresses of the containers that run in a target; none where Docker is not."""
    script = (
        "command -v docker >/dev/null || exit 0; docker ps --quiet | xargs --no-run-if-empty docker inspect"
    )
    return addresses_in(targets.execute(run_, target, ["sh", "-c", script]).stdout)


def addresses_in(text: str) -> list[str]:
    """IPv4 and IPv6 addresses in the output of `docker inspect`, each once."""
    found: list[str] = []
    for item in json.loads(text) if text.strip() else []:
        for net in item["NetworkSettings"]["Networks"].values():
            found += [net[key] for key in ("IPAddress", "GlobalIPv6Address") if net.get(key)]
    return list(dict.fromkeys(found))
