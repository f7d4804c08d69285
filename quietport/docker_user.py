"""`quietport docker-user`: keep the public side away from containers, also while Docker rearranges its rules.

DOCKER-USER is the chain Docker leaves to the host's owner. Docker deletes its jump to it and inserts it again
whenever it starts or makes a network (EnsureJumpRule in moby's libnetwork), for IPv4 and, from 27 on, IPv6;
older ones make no IPv6 chain at all. What slips through in between stays established. So the same rules also
stand in a chain of our own in the table mangle, which packets pass first and which neither Docker nor ufw
nor tailscaled touches; that one is the guarantee.

A packet that Docker does not rewrite goes to docker-proxy on the host instead: with IPv6 that is so wherever
the container has no IPv6 address. There ufw is asked, and a rule that someone made for the port lets
everybody in (ran). So published ports are closed in INPUT too, read from what Docker keeps of its containers,
which is there before it starts them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietport.commands import output_of, run
from quietport.errors import FINE, PROBLEM, HostProgramError, printable
from quietport.hostfile import HostFileError, HostFileMissingError, read_bytes
from quietport.net import TAILNET_INTERFACE, parse_address

DAEMON_JSON = Path("/etc/docker/daemon.json")
MARK = "-m comment --comment quietport"
# Where a rule goes wrong, another program may just have changed the table under us.
ATTEMPTS = 5
LOCK_WAIT_S = "10"
_CLOSED = re.compile(r" -p (\w+) -m \w+ --dport (\S+) .*-j DROP$")


@dataclass(frozen=True)
class Place:
    """A chain of ours and the jump to it from a built-in one; `harmless` jumps may stand before it."""

    table: str
    chain: str
    jump: str
    harmless: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The built-in chain."""
        return self.jump.split()[1]


PLACES = (
    Place("mangle", "QUIETPORT-FORWARD", f"-A FORWARD {MARK} -j QUIETPORT-FORWARD"),
    # Written as Docker writes it: it then moves this jump instead of adding one. tailscaled puts its own
    # chain first when it starts; that one accepts only what comes from or goes to the tailnet. Older Dockers
    # put their isolation first; that one accepts nothing.
    Place(
        "filter",
        "DOCKER-USER",
        "-A FORWARD -j DOCKER-USER",
        harmless=("-A FORWARD -j ts-forward", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1"),
    ),
    Place("mangle", "QUIETPORT-INPUT", f"-A INPUT {MARK} -j QUIETPORT-INPUT"),
)


@dataclass(frozen=True, order=True)
class Port:
    """A port that a container publishes, or a range of them (`8000:8010`, as iptables writes it)."""

    protocol: str
    number: str


@dataclass(frozen=True)
class Fault:
    """Something that is not as wanted. `late`: only the ports of a new container are not closed in INPUT yet,
    where ufw denies them too."""

    sentence: str
    late: bool = False


def rules(place: Place, ports: Sequence[Port] = ()) -> list[str]:
    """The rules of a place, as `iptables -S` prints them.

    Replies first (also those to connections that containers opened), then what the tailnet and Docker's own
    bridges begin, by interface and never by source, which can be forged. Of what is forwarded everything else
    is dropped, of what is for the host itself only the published `ports`.
    """
    chain = place.chain
    dropped = [f"-p {port.protocol} -m {port.protocol} --dport {port.number} " for port in ports]
    inside: tuple[str, ...] = (TAILNET_INTERFACE, "docker0", "br-+")
    if place.origin == "INPUT":
        inside = ("lo", *inside)
    else:
        dropped = [""]
    return [
        f"-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED {MARK} -j RETURN",
        *(f"-A {chain} -i {name} {MARK} -j RETURN" for name in inside),
        *(f"-A {chain} {what}{MARK} -j DROP" for what in dropped),
    ]


def published(host_configs: Iterable[Mapping[str, Any]]) -> tuple[Port, ...]:
    """The ports that containers publish beyond loopback, from their HostConfig as Docker keeps it.

    A port of Docker's choice (`-p 80`) is not among them: no rule of a firewall is made for it beforehand.
    """
    found: set[Port] = set()
    for config in host_configs:
        for inner, bindings in (config.get("PortBindings") or {}).items():
            protocol = inner.partition("/")[2] or "tcp"
            for binding in bindings or []:
                number = str(binding.get("HostPort") or "").replace("-", ":")
                public = not _is_loopback(str(binding.get("HostIp") or ""))
                if public and protocol in ("tcp", "udp") and re.fullmatch(r"\d{1,5}(:\d{1,5})?", number):
                    found.add(Port(protocol, number))
    return tuple(sorted(found))


def _is_loopback(address: str) -> bool:
    try:
        return parse_address(address).is_loopback
    except ValueError:
        return False


def data_root_of(daemon_json: str, command_line: str = "") -> Path:
    """Where dockerd keeps its containers; arguments as for `backend_of`, which has judged them before."""
    flag = re.search(r"--data-root[= ](\S+)", command_line)
    named = (json.loads(daemon_json) if daemon_json.strip() else {}).get("data-root")
    return Path(flag[1] if flag else named or "/var/lib/docker")


def problems(place: Place, listing: str, ports: Sequence[Port] = ()) -> list[str]:
    """What is not as wanted in `listing`, the text of `iptables -t TABLE -S`; empty when all is."""
    found: list[str] = []
    held = rules_in(listing, place.chain)
    wanted = rules(place, ports)
    if held[: len(wanted)] != wanted:
        found.append(f"{place.table}: the chain {place.chain} does not begin with the rules of quietport")
    if any(is_ours(rule) for rule in held[len(wanted) :]):
        found.append(f"{place.table}: the chain {place.chain} has rules of quietport more than once")
    return found + _wrong_jump(place, listing)


def _wrong_jump(place: Place, listing: str) -> list[str]:
    origin = rules_in(listing, place.origin)
    if place.jump not in origin:
        return [f"{place.table}: {place.origin} does not jump to {place.chain}"]
    if any(rule not in place.harmless for rule in origin[: origin.index(place.jump)]):
        return [f"{place.table}: {place.origin} has other rules before the jump to {place.chain}"]
    return []


def foreign_rules(place: Place, listing: str) -> list[str]:
    """Rules of others in our chain. They stay, behind a DROP that leaves them nothing."""
    held = [rule for rule in rules_in(listing, place.chain) if not is_ours(rule)]
    # Docker's own last rule.
    return [rule for rule in held if rule != f"-A {place.chain} -j RETURN"]


def restore_text(place: Place, listing: str, ports: Sequence[Port] = ()) -> str:
    """What `iptables-restore --noflush` makes one commit of: the chain, its rules, the jump at the top."""
    others = [rule for rule in rules_in(listing, place.chain) if not is_ours(rule)]
    jumps = [rule for rule in rules_in(listing, place.origin) if rule == place.jump]
    append = f"-A {place.origin}"
    lines = [
        f"*{place.table}",
        # Makes the chain, or empties it.
        f":{place.chain} - [0:0]",
        *rules(place, ports),
        *others,
        *(rule.replace(append, f"-D {place.origin}", 1) for rule in jumps),
        place.jump.replace(append, f"-I {place.origin} 1", 1),
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


def rules_in(listing: str, chain: str) -> list[str]:
    """The rules of `chain` in what `iptables -S` printed."""
    return [line.strip() for line in listing.splitlines() if line.startswith(f"-A {chain} ")]


def ports_in(place: Place, listing: str) -> tuple[Port, ...]:
    """The ports that our rules close in a place now."""
    held = [rule for rule in rules_in(listing, place.chain) if is_ours(rule)]
    return tuple(sorted({Port(*found) for rule in held for found in _CLOSED.findall(rule)}))


def is_ours(rule: str) -> bool:
    """Whether `rule` carries our mark and not merely a comment that contains it."""
    return re.search(r"--comment \"?quietport\"?( |$)", rule) is not None


def backend_of(daemon_json: str, command_line: str = "") -> str:
    """The firewall dockerd uses: iptables, nftables or none (`"iptables": false`).

    `daemon_json` is the text of daemon.json ("" when absent), `command_line` any text with dockerd's flags.
    Raises HostProgramError when daemon.json is not a JSON object.
    """
    try:
        config = json.loads(daemon_json) if daemon_json.strip() else {}
    except ValueError as error:
        raise HostProgramError("daemon.json is not JSON: dockerd itself would not start with it.") from error
    if not isinstance(config, dict):
        raise HostProgramError("daemon.json is not a JSON object.")
    flags = command_line.replace("--firewall-backend ", "--firewall-backend=")
    if config.get("firewall-backend") == "nftables" or "--firewall-backend=nftables" in flags:
        return "nftables"
    if config.get("iptables") is False or "--iptables=false" in flags:
        return "none"
    return "iptables"


def refusal(backend: str) -> str:
    """Why nothing is done with that backend, or nothing to say."""
    where = f"in {DAEMON_JSON} or in dockerd's options"
    if backend == "nftables":
        return (
            f'Docker uses nftables itself ("firewall-backend" {where}), where no DOCKER-USER chain exists: '
            "set it to iptables, and restart docker."
        )
    if backend == "none":
        return (
            f'Docker makes no firewall rules ("iptables": false {where}), so nothing here can say which '
            "container is published: remove that setting, and restart docker."
        )
    return ""


def main(argv: list[str]) -> int:
    """Exit code 0 when the chains are as wanted, 1 when they are not (and cannot be made so) or refused.

    Where it cannot be read what containers publish, that is told and the chains are made all the same.
    """
    parser = argparse.ArgumentParser(prog="quietport docker-user", description="Keep the public side away.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when not as wanted")
    options = parser.parse_args(argv)
    if options.check:
        found = [fault.sentence for fault in faults()]
    else:
        ports = _ports_to_close_if_known()
        places = [(program, place) for program in _programs() for place in PLACES]
        found = [line for program, place in places for line in _settle(program, place, ports)]
    for problem in found:
        print(f"quietport docker-user: {problem}")
    return PROBLEM if found else FINE


def faults(*, timeout: float = 30) -> list[Fault]:
    """What is not as wanted on this host; nothing is changed. `timeout` is each command's, in seconds.

    Raises HostProgramError, with PROBLEM where Docker has no chain that could be held.
    """
    ports = published(_host_configs(_data_root()))
    found: list[Fault] = []
    for program in _programs():
        listings = {table: _listing(program, table, timeout=timeout) for table in {p.table for p in PLACES}}
        for place in PLACES:
            listing = listings[place.table]
            late = is_late(place, listing)
            found += [Fault(f"{program} {line}", late) for line in problems(place, listing, ports)]
    return found


def is_late(place: Place, listing: str) -> bool:
    """Whether a place is as wanted, but for the ports: a container came or went since the rules were made."""
    held = rules_in(listing, place.chain)
    base = rules(place)
    old = [rule for rule in held[len(base) :] if is_ours(rule)]
    return (
        place.origin == "INPUT"
        and held[: len(base)] == base
        and all(rule.endswith("-j DROP") for rule in old)
        and len(old) == len(set(old))
        and not _wrong_jump(place, listing)
    )


def _data_root() -> Path:
    """Where Docker keeps its containers. Raises HostProgramError (PROBLEM) where no chain can be held."""
    daemon_json, command_line = _daemon_json(), _command_line()
    sentence = refusal(backend_of(daemon_json, command_line))
    if sentence:
        raise HostProgramError(sentence, code=PROBLEM)
    return data_root_of(daemon_json, command_line)


def _ports_to_close_if_known() -> tuple[Port, ...] | None:
    """What containers publish; None, and a line about it, where that cannot be read. Raises as _data_root."""
    data_root = _data_root()
    try:
        return published(_host_configs(data_root))
    except HostFileError as error:
        # docker.service requires the unit: an engine that does not start would help nobody.
        print(f"quietport docker-user: the ports that containers publish are not known: {error}")
        return None


def _host_configs(data_root: Path) -> Iterator[Mapping[str, Any]]:
    """What Docker has written down of each container; nothing where there is none. Raises HostFileError."""
    try:
        # Docker follows a link to another disk too; below that path none is followed.
        folder = (data_root / "containers").resolve()
        containers = sorted(one for one in folder.iterdir() if not one.is_file())
    except FileNotFoundError:
        return
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise HostFileError(f"{data_root}/containers cannot be read: {why}.") from error
    for container in containers:
        # One that is just being removed, or half made, publishes nothing.
        with suppress(HostFileMissingError, ValueError):
            config = json.loads(read_bytes(container / "hostconfig.json"))
            if isinstance(config, dict):
                yield config


def _settle(program: str, place: Place, ports: Sequence[Port] | None = ()) -> list[str]:
    """Bring one table of one family to what is wanted; returns what is still wrong.

    Where the ports are not known (None), those that are closed stay closed.
    """
    listing = _listing(program, place.table)
    if ports is None:
        ports = ports_in(place, listing)
    found = problems(place, listing, ports)
    complaint = ""
    for _ in range(ATTEMPTS):
        if not found:
            break
        restore = [f"{program}-restore", "--noflush", "-w", LOCK_WAIT_S]
        done = run(restore, stdin=restore_text(place, listing, ports))
        complaint = f" ({done.complaint})" if done.code != 0 else ""
        listing = _listing(program, place.table)
        found = problems(place, listing, ports)
    for rule in foreign_rules(place, listing):
        print(f"{program} {place.table}: a rule of someone else has no effect behind ours: {printable(rule)}")
    return [f"{program} {problem}{complaint}" for problem in found]


def _listing(program: str, table: str, *, timeout: float = 30) -> str:
    return output_of([program, "-w", LOCK_WAIT_S, "-t", table, "-S"], timeout=timeout)


def _programs() -> tuple[str, ...]:
    # Without IPv6 in the kernel ip6tables fails, and there is nothing to keep away.
    return ("iptables", "ip6tables") if Path("/proc/net/if_inet6").exists() else ("iptables",)


def _daemon_json() -> str:
    try:
        return read_bytes(DAEMON_JSON, trusted=False).decode(errors="replace")
    except HostFileMissingError:
        return ""


def _command_line() -> str:
    """dockerd's flags, from its unit; nothing where systemd does not know it."""
    try:
        return run(["systemctl", "show", "-p", "ExecStart", "docker.service"], timeout=10).out
    except HostProgramError:
        return ""
