"""The run's networks on this machine: free subnets, bridges, NAT, and what was changed put back.

A subnet is number N of 255: 10.213.N.0/24 and fd71:7069:6574:N::/64. Purposes: `service` (a bridge
without ports whose one address the lab's services listen on; containers and VMs route to it),
`container` (a Docker network) and `vm` (a libvirt network, made by `lab.vm`).
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab.engine import LABEL, Engine
from lab.process import LabError, run, succeeds
from lab.state import Run, Subnet, locked, write

IPV4_POOL = "10.213.{}.0/24"
IPV4_LAB = "10.213.0.0/16"
IPV6_POOL = "fd71:7069:6574:{}::/64"
PREFIXES = {"service": "qpl", "container": "qpc", "vm": "qpv"}
"""First letters of a bridge's name, by purpose; the run's tag follows."""
# What several labs on one machine must agree on; gone with a reboot, like what it speaks of.
MACHINE_DIR = Path("/run/quietport-lab")
# IPv4 alone: the lab's IPv6 stays on its bridges, and IPv6 forwarding would make this machine deaf to the
# router advertisements that it may have its own addresses from.
# The kernel counts inotify instances by user, and every container's systemd is this machine's root: with the
# usual 128 the sixth host's user managers fail with "too many open files".
SYSCTLS = {"net.ipv4.ip_forward": "1", "fs.inotify.max_user_instances": "8192"}


def claim(run_: Run, purpose: str) -> Subnet:
    """The run's subnet for a purpose: the one it has, else a free one, reserved until `release`.

    Raises LabError when all of them are taken.
    """
    networks = run_.read().networks
    if purpose in networks:
        return networks[purpose]
    with locked(MACHINE_DIR / "lock"):
        busy = taken()
        for number in range(1, 255):
            subnet = Subnet(
                bridge=f"{PREFIXES[purpose]}-{run_.tag}",
                ipv4=IPV4_POOL.format(number),
                ipv6=IPV6_POOL.format(number),
            )
            if _reserved(number) or overlaps(subnet, busy):
                continue
            # State first: whatever happens after this line, `down` knows what to take away.
            run_.update(lambda state, s=subnet: replace(state, networks={**state.networks, purpose: s}))  # type: ignore[misc]
            write(_reservation(number), str(run_.directory))
            return subnet
    raise LabError(
        f"All of the lab's networks in {IPV4_POOL.format('0-255')} are taken.", hint="End other labs."
    )


def taken() -> list[str]:
    """The networks this machine has routes to, the default route aside."""
    found: list[str] = []
    for family in ("-4", "-6"):
        done = run(["ip", "-json", family, "route", "show", "table", "all"], check=False)
        routes = json.loads(done.stdout or "[]")
        found += [route["dst"] for route in routes if re.match(r"^[0-9a-f.:]+(/\d+)?$", route.get("dst", ""))]
    return found


def overlaps(subnet: Subnet, networks: Iterable[str]) -> bool:
    """Whether one of `networks` (CIDR) has an address of the subnet."""
    ours = (ipaddress.ip_network(subnet.ipv4), ipaddress.ip_network(subnet.ipv6))
    for text in networks:
        other = ipaddress.ip_network(text, strict=False)
        # A route to everything (a VPN's 0.0.0.0/1 for one) takes nothing away from a longer one.
        if other.prefixlen > 4 and any(one.version == other.version and one.overlaps(other) for one in ours):
            return True
    return False


def _reservation(number: int) -> Path:
    directory = MACHINE_DIR / "subnets"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / str(number)


def _reserved(number: int) -> bool:
    path = _reservation(number)
    if not path.is_file():
        return False
    if (Path(path.read_text()) / "lab.json").is_file():
        return True
    path.unlink()  # its run is gone
    return False


# Bridges


def ensure_service(run_: Run) -> str:
    """Make the bridge the lab's services listen on. Returns its IPv4 address."""
    subnet = claim(run_, "service")
    prepare_machine(run_)
    if not succeeds(["ip", "link", "show", "dev", subnet.bridge]):
        run(["ip", "link", "add", subnet.bridge, "type", "bridge"])
    run(["ip", "address", "replace", f"{subnet.host4(1)}/24", "dev", subnet.bridge])
    # Without a port there is no carrier, and duplicate detection would leave the address unusable for ever.
    run(["ip", "-6", "address", "replace", f"{subnet.host6(1)}/64", "dev", subnet.bridge, "nodad"])
    run(["ip", "link", "set", subnet.bridge, "up"])
    return subnet.host4(1)


def ensure_container(run_: Run, engine: Engine) -> Subnet:
    """Make the Docker network that the run's container targets are on."""
    subnet = claim(run_, "container")
    prepare_machine(run_)
    name = subnet.bridge
    if engine.docker("network", "inspect", name, check=False).returncode != 0:
        options = [
            f"--label={LABEL}={run_.tag}",
            "--opt",
            f"com.docker.network.bridge.name={subnet.bridge}",
            "--opt",
            "com.docker.network.bridge.enable_icc=true",
        ]
        addresses = ["--ipv6", "--subnet", subnet.ipv4, "--gateway", subnet.host4(1)]
        addresses += ["--subnet", subnet.ipv6, "--gateway", subnet.host6(1)]
        engine.docker("network", "create", "--driver", "bridge", *options, *addresses, name)
    allow(run_, subnet)
    return subnet


def release(run_: Run, engine: Engine | None) -> None:
    """Take away the run's bridges and rules, and put the machine's settings back."""
    subnets = run_.read().networks
    if engine and (subnet := subnets.get("container")):
        engine.docker("network", "rm", subnet.bridge, check=False)
    remove_rules(run_)
    for subnet in subnets.values():
        if succeeds(["ip", "link", "show", "dev", subnet.bridge]):
            run(["ip", "link", "delete", subnet.bridge], check=False)
        number = int(subnet.ipv4.split(".")[2])
        with locked(MACHINE_DIR / "lock"):
            path = _reservation(number)
            if path.is_file() and path.read_text() == str(run_.directory):
                path.unlink()
    restore_machine(run_)


# Rules of this machine's firewall, each with the run's mark


@dataclass(frozen=True)
class Rule:
    """One rule, put first in its chain."""

    program: str
    """iptables or ip6tables."""
    table: str
    chain: str
    match: tuple[str, ...]


def rules_for(subnet: Subnet) -> list[Rule]:
    """Let targets reach each other, this machine's lab services, and (IPv4, by NAT) the world."""
    rules = []
    for program in ("iptables", "ip6tables"):
        rules += [
            Rule(program, "filter", "INPUT", ("-i", subnet.bridge, "-j", "ACCEPT")),
            Rule(program, "filter", "FORWARD", ("-i", subnet.bridge, "-j", "ACCEPT")),
            Rule(program, "filter", "FORWARD", ("-o", subnet.bridge, "-j", "ACCEPT")),
        ]
    # Among the lab's own networks addresses stay what they are: the tailnet's direct paths go by them.
    nat = ("-s", subnet.ipv4, "!", "-d", IPV4_LAB, "-j", "MASQUERADE")
    return [*rules, Rule("iptables", "nat", "POSTROUTING", nat)]


def mark(run_: Run) -> str:
    """The comment on the run's rules."""
    return f"quietport-lab-{run_.tag}"


def allow(run_: Run, subnet: Subnet) -> None:
    """Put the rules for a bridge in place; those that are there stay."""
    for rule in rules_for(subnet):
        match = [*rule.match[:-2], "-m", "comment", "--comment", mark(run_), *rule.match[-2:]]
        base = [rule.program, "-w", "10", "-t", rule.table]
        if not succeeds([*base, "-C", rule.chain, *match]):
            run([*base, "-I", rule.chain, "1", *match])


def remove_rules(run_: Run) -> None:
    """Delete the rules that carry the run's mark, whatever made them."""
    for program in ("iptables", "ip6tables"):
        saved = run([f"{program}-save"], check=False).stdout
        for table, words in marked(saved, mark(run_)):
            run([program, "-w", "10", "-t", table, *words], check=False)


def marked(saved: str, comment: str) -> list[tuple[str, list[str]]]:
    """From the text of iptables-save: table and deleting arguments of each rule with that comment."""
    found: list[tuple[str, list[str]]] = []
    table = "filter"
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith("-A "):
            words = shlex.split(line)
            if "--comment" in words and words[words.index("--comment") + 1] == comment:
                found.append((table, ["-D", *words[1:]]))
    return found


# Settings of the machine that every lab needs, counted by run


def prepare_machine(run_: Run) -> None:
    """Raise the settings that are lower than wanted, noting what they were before the first run."""
    if os.geteuid() != 0:
        raise LabError("The lab makes networks on this machine, which takes root.", hint="Run it as root.")
    with locked(MACHINE_DIR / "lock"):
        before = _machine()
        for key, wanted in SYSCTLS.items():
            now = _sysctl(key)
            if now is not None and int(now) < int(wanted):
                before.setdefault("sysctl", {})[key] = now
        before.setdefault("users", {})[run_.tag] = str(run_.directory)
        write(MACHINE_DIR / "machine.json", json.dumps(before))
        for key, wanted in SYSCTLS.items():
            now = _sysctl(key)
            if now is not None and int(now) < int(wanted):
                _sysctl_path(key).write_text(wanted)


def restore_machine(run_: Run) -> None:
    """Put the settings back when no other run needs them, unless someone has changed them since."""
    with locked(MACHINE_DIR / "lock"):
        before = _machine()
        users = {tag: where for tag, where in before.get("users", {}).items() if tag != run_.tag}
        users = {tag: where for tag, where in users.items() if (Path(where) / "lab.json").is_file()}
        if not users:
            for key, value in before.get("sysctl", {}).items():
                if _sysctl(key) == SYSCTLS.get(key):
                    _sysctl_path(key).write_text(value)
            (MACHINE_DIR / "machine.json").unlink(missing_ok=True)
            return
        write(MACHINE_DIR / "machine.json", json.dumps({**before, "users": users}))


def _machine() -> dict[str, dict[str, str]]:
    path = MACHINE_DIR / "machine.json"
    content: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _sysctl_path(key: str) -> Path:
    return Path("/proc/sys") / key.replace(".", "/")


def _sysctl(key: str) -> str | None:
    path = _sysctl_path(key)
    return path.read_text().strip() if path.is_file() else None


def default_nameservers(paths: Sequence[Path] = ()) -> list[str]:
    """The nameservers a guest can use too: this machine's, without its own loopback stubs."""
    for path in paths or (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf")):
        text = path.read_text() if path.is_file() else ""
        found = re.findall(r"^\s*nameserver\s+(\S+)", text, re.MULTILINE)
        usable = [server for server in found if not server.startswith("127.") and server != "::1"]
        if usable:
            return usable
    return []
