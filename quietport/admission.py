"""Whom the host's packet filter lets in at a TCP port, from what `iptables -S` prints.

Judged on the side of caution: a rule that accepts counts also where an earlier one has already denied, and a
match that is not understood is taken to match. What is not seen here cannot open anything: other tables and
other programs' chains of nftables only take away.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quietport.commands import output_of
from quietport.errors import HostProgramError
from quietport.net import TAILNET_INTERFACE

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PROGRAMS = {4: "iptables", 6: "ip6tables"}
LOCK_WAIT_S = "5"
# What arrives there comes from the host itself, its containers, or the tailnet.
INSIDE = ("lo", TAILNET_INTERFACE, "docker0", "br-+")
_NEW = frozenset({"NEW"})
_FOR_US = frozenset({"LOCAL", "UNICAST"})
# The kernel refuses loops of chains; a text need not.
_DEEPEST = 20
_TCP = ("tcp", "6", "all", "0")


@dataclass(frozen=True)
class _Rule:
    """One rule of `iptables -S`: its text, its target, and its matches as option = (value, negated)."""

    text: str
    target: str
    matches: Mapping[str, tuple[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    policies: Mapping[str, str]
    chains: Mapping[str, Sequence[_Rule]]


_LONG = {
    "--in-interface": "-i",
    "--protocol": "-p",
    "--source": "-s",
    "--dports": "--dport",
    "--state": "--ctstate",
    "--jump": "-j",
    "--goto": "-j",
    "-g": "-j",
}


def _parse(text: str) -> _Table:
    policies: dict[str, str] = {}
    chains: dict[str, list[_Rule]] = {}
    for line in text.splitlines():
        try:
            words = shlex.split(line)
        except ValueError:
            words = line.split()
        if len(words) >= 3 and words[0] == "-P":
            policies[words[1]] = words[2]
        elif len(words) >= 2 and words[0] == "-N":
            chains.setdefault(words[1], [])
        elif len(words) >= 2 and words[0] == "-A":
            chains.setdefault(words[1], []).append(_rule(line.strip(), words[2:]))
    return _Table(policies, chains)


def _rule(text: str, words: Sequence[str]) -> _Rule:
    matches: dict[str, tuple[str, bool]] = {}
    target = ""
    negated = False
    for at, word in enumerate(words):
        if word == "!":
            negated = True
            continue
        value = words[at + 1] if at + 1 < len(words) else ""
        option = _LONG.get(word, word)
        if option == "-j":
            target = value
            break  # what follows are the target's own options
        if option in ("-i", "-p", "-s", "--dport", "--ctstate", "--dst-type"):
            matches[option] = (value, negated)
        if word.startswith("-"):
            negated = False
    return _Rule(text, target, matches)


def openings(text: str, *, port: int, networks: Iterable[str] = ()) -> list[str]:
    """What lets a stranger in at this TCP port; empty when nothing does.

    `text` is what `iptables -S` or `ip6tables -S` prints. A stranger comes from outside of `networks`, and
    not through one of the INSIDE interfaces.
    """
    table = _parse(text)
    if "INPUT" not in table.policies:
        return ["the packet filter cannot be read"]
    found: list[str] = []
    if table.policies["INPUT"] == "ACCEPT":
        found.append("-P INPUT ACCEPT")
    allowed = [ipaddress.ip_network(network) for network in networks]
    seen: set[str] = set()
    todo = [("INPUT", "")]
    while todo:
        chain, via = todo.pop(0)
        if chain in seen:
            continue
        seen.add(chain)
        for rule in table.chains.get(chain, ()):
            if not _lets_stranger_pass(rule, port=port, allowed=allowed):
                continue
            # A chain that only accepts says nothing; the rule that leads there does.
            shown = rule.text if rule.matches or not via else via
            if rule.target == "ACCEPT":
                found.append(shown)
            elif rule.target in table.chains:
                todo.append((rule.target, shown if rule.matches else via))
    return list(dict.fromkeys(found))


def lets_strangers_in(text: str, *, port: int) -> bool:
    """Whether a stranger really gets to this TCP port: of rules that may match, the first decides.

    Judged on the other side of caution than `openings`: a rule that may drop it does, but for one that is
    about single sources.
    """
    table = _parse(text)
    return _decision(table, "INPUT", port=port, depth=0) == "ACCEPT"


def _decision(table: _Table, chain: str, *, port: int, depth: int) -> str:
    """ACCEPT or DROP, or "" for a chain of users that does not decide."""
    for rule in table.chains.get(chain, ()) if depth < _DEEPEST else ():
        if not _lets_stranger_pass(rule, port=port, allowed=()):
            continue
        source, negated = rule.matches.get("-s", ("", False))
        if rule.target in ("ACCEPT", "DROP", "REJECT"):
            if not source or negated:
                return "ACCEPT" if rule.target == "ACCEPT" else "DROP"
        elif rule.target == "RETURN":
            if not source:
                break
        elif rule.target in table.chains and not source:
            decided = _decision(table, rule.target, port=port, depth=depth + 1)
            if decided:
                return decided
    return {"ACCEPT": "ACCEPT"}.get(table.policies[chain], "DROP") if chain in table.policies else ""


def _lets_stranger_pass(rule: _Rule, *, port: int, allowed: Sequence[Network]) -> bool:
    """Whether a stranger's first packet to the port may match the rule."""
    tests = {
        "-i": lambda value: not any(_same_interface(value, inside) for inside in INSIDE),
        "-p": lambda value: value.lower() in _TCP,
        "-s": lambda value: not _within(value, allowed),
        "--dport": lambda value: _names(value, port),
        "--ctstate": lambda value: bool(_NEW & set(value.upper().split(","))),
        # What is for the host itself is neither broadcast nor multicast.
        "--dst-type": lambda value: bool(_FOR_US & set(value.upper().split(","))),
    }
    for option, (value, negated) in rule.matches.items():
        if not negated and not tests[option](value):
            return False
        if negated and option in ("-p", "--dport", "--ctstate") and tests[option](value):
            return False
    return True


def _same_interface(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.endswith("+") and name.startswith(pattern[:-1]))


def _within(source: str, allowed: Sequence[Network]) -> bool:
    try:
        network = ipaddress.ip_network(source)
    except ValueError:
        return False
    return any(
        network.subnet_of(other)  # type: ignore[arg-type]
        for other in allowed
        if other.version == network.version
    )


def _names(ports: str, port: int) -> bool:
    for part in ports.split(","):
        first, _, last = part.partition(":")
        try:
            if int(first or 0) <= port <= int((last or 65535) if ":" in part else first):
                return True
        except ValueError:
            return True
    return False


def closed_by_default(text: str) -> bool:
    """Whether ufw is at work in `iptables -S`: what no rule of its lets in is dropped."""
    table = _parse(text)
    if table.policies.get("INPUT") not in ("DROP", "REJECT"):
        return False
    return any(name in table.chains for name in ("ufw-user-input", "ufw6-user-input"))


def families(if_inet6: Path = Path("/proc/net/if_inet6")) -> tuple[int, ...]:
    """The families of this host: 6 is one of them when some interface has an IPv6 address."""
    try:
        return (4, 6) if if_inet6.read_text().strip() else (4,)
    except OSError:
        return (4,)


def read(family: int) -> str:
    """The filter table of this host. Raises HostProgramError."""
    return output_of([PROGRAMS[family], "-w", LOCK_WAIT_S, "-S"])


def firewall_problem() -> str:
    """Why the firewall of this host does not keep strangers out by default; "" when it does."""
    try:
        open_families = [family for family in families() if not closed_by_default(read(family))]
    except HostProgramError as error:
        return f"The firewall cannot be read: {error}"
    if not open_families:
        return ""
    names = " and ".join(f"IPv{family}" for family in open_families)
    return f"ufw does not keep {names} closed: see `ufw status verbose`."


def admission_problem(texts: Mapping[int, str], *, port: int, networks: Sequence[str]) -> str:
    """Why a firewall (family = `iptables -S`) admits not `networks` alone at the port; "" when it does."""
    if not networks:
        return "No network is declared for it (break_glass_cidrs)."
    found: list[str] = [] if texts else ["the packet filter cannot be read"]
    for family, text in texts.items():
        if not closed_by_default(text):
            return f"ufw does not keep IPv{family} closed: see `ufw status verbose`."
        found += [f"{PROGRAMS[family]} {rule}" for rule in openings(text, port=port, networks=networks)]
    if not found:
        return ""
    return f"The firewall lets others than break_glass_cidrs in at port {port}: {'; '.join(found)}."
