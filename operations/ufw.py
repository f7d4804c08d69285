"""The firewall: an exact rule set, computed against `ufw show added`, without a moment without rules.

An active ufw is never reloaded, disabled, reset or restarted: `ufw reload` and `ufw default` are a stop and a
start, with INPUT at ACCEPT in between (ufw 0.36.2, frontend.py set_default_policy, ufw-init-functions). Rules
are added and deleted one by one: ufw then refills its own user chains, while the policy stays DROP and
established connections pass by an earlier chain (before.rules).
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pyinfra.api.command import PyinfraCommand
from pyinfra.context import host

from facts.files import FileState
from facts.packetfilter import PacketFilter
from facts.system import System
from facts.ufw import Ufw
from facts.units import Units
from operations import gate, notes
from operations.common import Commands, executing, operation, program, refuse, script, warn
from operations.files import write
from operations.units import is_enabled
from quietport.ufw_rules import bare, is_ours, shown, traffic, words_of

DEFAULTS_FILE = "/etc/default/ufw"
SERVICE = "ufw.service"


@dataclass(frozen=True)
class Rule:
    """A rule as ufw takes it, and why it is there (the comment that marks it as ours)."""

    text: str
    why: str

    def shown(self) -> str:
        """As `ufw show added` prints it (parser.py get_command)."""
        return shown(self.text, self.why)


# tailscaled's own chain lets the tailnet in before ufw sees it; the rule is for the day it does not.
# 41641 is tailscaled's port as its package configures it (/etc/default/tailscaled).
WANTED = (
    Rule("allow in on tailscale0", "the tailnet may come in"),
    Rule("allow 41641/udp", "WireGuard, for direct paths"),
)
SSH_PORT = 22
# What was there before the first change: for the way back (operations/undo.py).
RECORD = "/var/lib/quietport/ufw-before.json"
DEFAULTS = {"incoming": "deny", "outgoing": "allow", "routed": "deny"}
_POLICIES = {"allow": "ACCEPT", "deny": "DROP"}
_CHAINS = {"incoming": "input", "outgoing": "output", "routed": "forward"}


def rules_for(break_glass: Sequence[str] = (), *, ipv6: bool = True) -> tuple[Rule, ...]:
    """The rules of a host: ours, and one for each network of `break_glass`, if the host has its family."""
    networks = [ipaddress.ip_network(text) for text in break_glass]
    return WANTED + tuple(
        Rule(f"allow from {_named(network)} to any port {SSH_PORT} proto tcp", "break-glass, ssh")
        for network in networks
        if network.version == 4 or ipv6
    )


def _named(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    """A network as `ufw show added` has it (util.py normalize_address): by inet_ntop, a lone address bare."""
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, network.network_address.packed)
    return address if network.prefixlen == network.max_prefixlen else f"{address}/{network.prefixlen}"


def for_ipv6_alone(rule: str) -> bool:
    """Whether a shown rule names an IPv6 address. ufw lists those after all others."""
    return any(_is_ipv6(word) for word in bare(rule).split())


def _is_ipv6(word: str) -> bool:
    try:
        return ipaddress.ip_interface(word).version == 6
    except ValueError:
        return False


@dataclass(frozen=True)
class Changes:
    """What to do to a rule set: delete these (without comments), then add these, first ones first."""

    delete: tuple[str, ...] = ()
    add: tuple[Rule, ...] = ()
    prepend: tuple[Rule, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.delete or self.add or self.prepend)


def contradicting(rules: Sequence[str], ours: Sequence[Rule] = WANTED) -> list[str]:
    """The rules that say something else about the very traffic of ours. They cannot stand beside them."""
    about = {traffic(rule.text) for rule in ours}
    wanted = {rule.text for rule in ours}
    return [rule for rule in rules if traffic(rule) in about and bare(rule) not in wanted]


def foreign(rules: Sequence[str], ours: Sequence[Rule] = WANTED) -> list[str]:
    """The rules that are not ours: neither marked nor about the traffic ours are about."""
    about = {traffic(rule.text) for rule in ours}
    return [rule for rule in rules if not is_ours(rule) and traffic(rule) not in about]


def closes(rule: str) -> bool:
    """Whether a rule, standing before ours, may take away what ours lets in."""
    words = rule.split()
    return words[0] in ("deny", "reject", "limit") and words[1:2] != ["out"]


def changes(rules: Sequence[str], *, prune_foreign: bool, ours: Sequence[Rule] = WANTED) -> Changes:
    """From the rules that are there to those that are wanted, `ours`.

    A rule of ours behind a foreign one that closes is taken out and put first: of two rules the first counts.
    (ufw lists a rule for IPv6 alone after all others; where such a one stands among those for both families
    is not seen. One of ours is put first when it is made, and compared with its like afterwards.)
    """
    texts = {rule.text for rule in ours}
    gone = [rule for rule in rules if is_ours(rule) and bare(rule) not in texts] + contradicting(rules, ours)
    delete = list(dict.fromkeys(bare(rule) for rule in gone))
    kept = [rule for rule in rules if bare(rule) not in delete]
    if prune_foreign:
        strangers = foreign(kept, ours)
        delete += [bare(rule) for rule in strangers]
        kept = [rule for rule in kept if rule not in strangers]
    closing = [at for at, rule in enumerate(kept) if closes(rule) and bare(rule) not in texts]
    first_closing = min(closing, default=len(kept))
    closing_ipv6 = [at for at in closing if for_ipv6_alone(kept[at])]
    first_closing_ipv6 = min(closing_ipv6, default=len(kept))
    add: list[Rule] = []
    prepend: list[Rule] = []
    for rule in ours:
        place = next((at for at, shown in enumerate(kept) if bare(shown) == rule.text), None)
        limit = first_closing_ipv6 if for_ipv6_alone(rule.text) else first_closing
        if place is not None and place > limit:
            delete.append(rule.text)
            prepend.append(rule)
        elif place is None and first_closing < len(kept):
            prepend.append(rule)
        elif place is None or kept[place] != rule.shown():
            # ufw replaces a rule that differs in its comment alone, in its place.
            add.append(rule)
    return Changes(tuple(delete), tuple(add), tuple(prepend))


def delete(rule: str) -> PyinfraCommand:
    """The command that deletes a shown rule."""
    words = words_of(rule)
    if words[0] == "route":
        return program("ufw", "route", "delete", *words[1:])
    return program("ufw", "delete", *words)


def _rule_commands(wanted: Changes) -> list[PyinfraCommand]:
    # ufw does not insert a rule it has: one that moves goes out and comes in again at once. Connections that
    # are there live on meanwhile, and new ones from the tailnet pass by tailscaled's own chain.
    commands = [delete(text) for text in wanted.delete]
    commands += [program("ufw", "prepend", *words_of(rule.shown())) for rule in reversed(wanted.prepend)]
    return commands + [program("ufw", *words_of(rule.shown())) for rule in wanted.add]


def live_policy(direction: str, policy: str, *, family: str) -> str:
    """Input of `iptables-restore -n` that makes `policy` the default of an active ufw in one step.

    What ufw-init-functions lays down at start for that policy: the built-in chain's own policy, and the
    chains whose content depends on it. `family` is "" or "6".
    """
    target = _POLICIES[policy]
    chain = _CHAINS[direction]
    lines = ["*filter", f":{chain.upper()} {target} [0:0]"]
    lines += [f"-F ufw{family}-{part}-{chain}" for part in ("reject", "track", "skip-to-policy")]
    lines.append(f"-A ufw{family}-skip-to-policy-{chain} -j {target}")
    if target == "ACCEPT":
        tracked = "-m conntrack --ctstate NEW -j ACCEPT"
        lines += [f"-A ufw{family}-track-{chain} -p {protocol} {tracked}" for protocol in ("tcp", "udp")]
    return "\n".join([*lines, "COMMIT", ""])


# After the kernel: the file is what the next run reads, and must not claim what the kernel does not do yet.
_SET_DEFAULT = """set -eu
sed -i "s/^DEFAULT_$1_POLICY=.*/DEFAULT_$1_POLICY=\\"$2\\"/" "$3"
grep -qx "DEFAULT_$1_POLICY=\\"$2\\"" "$3" || printf 'DEFAULT_%s_POLICY="%s"\\n' "$1" "$2" >>"$3"
"""
_SET_IPV6 = """set -eu
sed -i 's/^IPV6=.*/IPV6=yes/' "$1"
grep -qx 'IPV6=yes' "$1" || echo 'IPV6=yes' >>"$1"
"""


def other_policies(firewall: Mapping[str, Any], direction: str, policy: str, *, ipv6: bool) -> list[str]:
    """The families whose kernel does something else by default than an active ufw says, of what comes in.

    What is forwarded has other masters too: Docker sets that policy itself.
    """
    if direction != "incoming" or policy not in _POLICIES or not firewall["active"]:
        return []
    policies = firewall.get("policies", {})
    found = {family: policies.get(family, {}).get("INPUT") for family in ("ipv4", "ipv6")[: 2 if ipv6 else 1]}
    return [family for family, now in found.items() if now not in (None, _POLICIES[policy])]


def default_commands(
    firewall: Mapping[str, Any], *, ipv6: bool, wanted: Mapping[str, str] = DEFAULTS
) -> list[PyinfraCommand]:
    """What makes the defaults `wanted` ones, without a reload of an active ufw."""
    commands: list[PyinfraCommand] = []
    for direction, policy in wanted.items():
        in_kernel = not other_policies(firewall, direction, policy, ipv6=ipv6)
        if firewall["defaults"].get(direction) == policy and in_kernel:
            continue
        if not firewall["active"]:
            commands.append(program("ufw", "default", policy, direction))
            continue
        for restore, family in (("iptables-restore", ""), ("ip6tables-restore", "6"))[: 2 if ipv6 else 1]:
            text = live_policy(direction, policy, family=family)
            commands.append(program(restore, "-n", stdin=text.encode()))
        chain = _CHAINS[direction].upper()
        commands.append(script(_SET_DEFAULT, chain, _POLICIES[policy], DEFAULTS_FILE))
    return commands


def _commands(
    firewall: Mapping[str, Any], *, ipv6: bool, at_boot: bool, prune_foreign: bool, break_glass: Sequence[str]
) -> list[PyinfraCommand]:
    """Everything to do, in order: nothing is closed before what must stay open is open."""
    commands: list[PyinfraCommand] = []
    ours = rules_for(break_glass, ipv6=ipv6)
    wanted = changes(firewall["rules"], prune_foreign=prune_foreign, ours=ours)
    if ipv6 and not firewall["ipv6"]:
        commands.append(script(_SET_IPV6, DEFAULTS_FILE))
        # The rules there are hold for IPv4 alone, and look the same in `ufw show added`.
        present = tuple(rule for rule in ours if rule not in wanted.add + wanted.prepend)
        wanted = Changes(wanted.delete, wanted.add + present, wanted.prepend)
    commands += _rule_commands(wanted)
    commands += default_commands(firewall, ipv6=ipv6)
    if not at_boot:
        commands.append(program("systemctl", "enable", SERVICE))
    if not firewall["active"]:
        commands.append(program("ufw", "--force", "enable"))
    return commands


def reasons(
    firewall: Mapping[str, Any],
    *,
    ipv6: bool,
    at_boot: bool,
    prune_foreign: bool = False,
    break_glass: Sequence[str] = (),
) -> list[str]:
    """What of the firewall is not as wanted, a phrase each; empty when `exactly` has nothing to do."""
    if not firewall["installed"]:
        return ["ufw is not installed"]
    ours = rules_for(break_glass, ipv6=ipv6)
    wanted = changes(firewall["rules"], prune_foreign=prune_foreign, ours=ours)
    moved = [rule.text for rule in wanted.prepend if rule.text in wanted.delete]
    found = [
        f"rule {_why_gone(text, firewall['rules'], ours)}: {text}"
        for text in wanted.delete
        if text not in moved
    ]
    found += [f"rule behind one that closes: {text}" for text in moved]
    there = {bare(rule) for rule in firewall["rules"]}
    for rule in (*wanted.prepend, *wanted.add):
        if rule.text not in moved:
            found.append(f"rule {'without our mark' if rule.text in there else 'missing'}: {rule.text}")
    if ipv6 and not firewall["ipv6"]:
        found.append("IPv6 is left out")
    for direction, policy in DEFAULTS.items():
        if (now := firewall["defaults"].get(direction)) != policy:
            found.append(f"{direction} is {now or 'not set'} by default, not {policy}")
        for family in other_policies(firewall, direction, policy, ipv6=ipv6):
            found.append(f"the kernel does not {policy} what is {direction} by default, over {family}")
    if not at_boot:
        found.append(f"{SERVICE} is not enabled")
    if not firewall["active"]:
        found.append("the firewall is not active")
    return found


# A jump from INPUT that ufw or tailscaled made.
_KNOWN_JUMP = re.compile(r" -j (ufw6?|ts)-\S+$")


def past_ufw(listing: str) -> list[str]:
    """The rules in `iptables -S` that stand in INPUT and are neither ufw's nor tailscaled's.

    ufw knows nothing of them; what they let in is not asked about in its chains any more.
    """
    rules = (line.strip() for line in listing.splitlines())
    return [rule for rule in rules if rule.startswith("-A INPUT ") and not _KNOWN_JUMP.search(rule)]


def _name_past_ufw() -> None:
    for family, listing in sorted(host.get_fact(PacketFilter).items()):
        for rule in past_ufw(listing):
            notes.remark(f"firewall: left alone, not ours and not ufw's (IPv{family}): {rule}")


def _why_gone(text: str, rules: Sequence[str], ours: Sequence[Rule]) -> str:
    shown = [rule for rule in rules if bare(rule) == text]
    if contradicting(shown, ours):
        return "that contradicts ours"
    return "of ours that is wanted no more" if any(map(is_ours, shown)) else "that is not ours"


def _work(*, prune_foreign: bool, break_glass: Sequence[str] = ()) -> list[PyinfraCommand]:
    firewall = host.get_fact(Ufw)
    ipv6 = host.get_fact(System)["ipv6"]
    at_boot = is_enabled(host.get_fact(Units, names=[SERVICE])[SERVICE])
    return _commands(
        firewall, ipv6=ipv6, at_boot=at_boot, prune_foreign=prune_foreign, break_glass=break_glass
    )


def not_as_wanted(*, prune_foreign: bool = False, break_glass: Sequence[str] = ()) -> list[str]:
    """What is wrong with the firewall now, as phrases; empty when it is as `exactly` leaves it."""
    if not host.get_fact(Ufw)["active"]:
        return ["the firewall is not active"]
    left = _work(prune_foreign=prune_foreign, break_glass=break_glass)
    return ["the firewall's rules are not as wanted"] if left else []


def record(firewall: Mapping[str, Any]) -> str:
    """The text of RECORD, schema 1: active, defaults and ipv6 as the fact Ufw has them, and the rules."""
    kept = {key: firewall[key] for key in ("active", "defaults", "ipv6", "rules")}
    return json.dumps({"schema": 1, **kept}, indent=2) + "\n"


def _remember(firewall: Mapping[str, Any]) -> Commands:
    """Write down what a firewall was that we have never changed."""
    if any(map(is_ours, firewall["rules"])) or host.get_fact(FileState, path=RECORD)["kind"] != "absent":
        return
    yield program("install", "-d", "-m", "0750", "--", str(PurePosixPath(RECORD).parent))
    yield write(RECORD, record(firewall), mode="0640")


@operation()
def exactly(prune_foreign: bool = False, break_glass: Sequence[str] = ()) -> Commands:
    """ufw is active, also after a boot, with our defaults and rules; foreign rules go with `prune_foreign`.

    Otherwise they are reported and left. `break_glass` are networks that may come to port 22. Refused: an
    active ufw that leaves IPv6 out, because only a reload (a moment with an open INPUT) would take it in.
    """
    firewall = host.get_fact(Ufw)
    ipv6 = host.get_fact(System)["ipv6"]
    ours = rules_for(break_glass, ipv6=ipv6)
    replaced = contradicting(firewall["rules"], ours)
    if replaced:
        warn(f"firewall: replaced by ours, which they contradict: {'; '.join(replaced)}")
    if notes.collecting() and firewall["active"]:
        _name_past_ufw()
    strangers = foreign(firewall["rules"], ours)
    if strangers and not prune_foreign:
        warn(f"firewall: left alone, not ours: {'; '.join(strangers)} (prune_foreign = true removes them)")
    if ipv6 and firewall["active"] and not firewall["ipv6"]:
        yield refuse(
            f"ufw is active with IPV6=no in {DEFAULTS_FILE}, and taking IPv6 in needs a reload, which opens "
            "the firewall for a moment. When that is fine: `ufw disable` on the host, then run again."
        )
        return
    commands = _work(prune_foreign=prune_foreign, break_glass=break_glass)
    if not commands:
        host.noop("firewall: exactly as wanted")
        return
    notes.because(
        *reasons(
            firewall,
            ipv6=ipv6,
            at_boot=is_enabled(host.get_fact(Units, names=[SERVICE])[SERVICE]),
            prune_foreign=prune_foreign,
            break_glass=break_glass,
        )
    )
    if not firewall["installed"]:
        notes.depends("the packages")
    yield from _remember(firewall)
    yield from gate.risky(host, commands)
    if executing() and _work(prune_foreign=prune_foreign, break_glass=break_glass):
        yield refuse(
            "the firewall is not as wanted although every command succeeded. Compare `ufw show added` and "
            "`ufw status verbose` on the host with docs/firewall.md."
        )
