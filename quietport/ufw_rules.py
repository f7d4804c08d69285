"""The firewall's rules: which are wanted, what of them is not as wanted, and how ufw writes them down.

A rule is a text, as `ufw show added` prints it without its leading "ufw " (ufw 0.36.2, parser.py
get_command). A firewall is what the fact Ufw tells of it. Pure functions: the converge, the plan, the specs
and the doctor all ask these.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quietport.sshd import PORT

# Begins the comment of every rule of ours.
MARK = "quietport: "
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
DEFAULTS = {"incoming": "deny", "outgoing": "allow", "routed": "deny"}
KERNEL_POLICIES = {"allow": "ACCEPT", "deny": "DROP"}


def rules_for(break_glass: Sequence[str] = (), *, ipv6: bool = True) -> tuple[Rule, ...]:
    """The rules of a host: ours, and one for each network of `break_glass`, if the host has its family."""
    networks = [ipaddress.ip_network(text) for text in break_glass]
    return WANTED + tuple(
        Rule(f"allow from {_named(network)} to any port {PORT} proto tcp", "break-glass, ssh")
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


def families(*, ipv6: bool) -> tuple[str, ...]:
    """Those that a host has, as keys of the fact Ufw."""
    return ("ipv4", "ipv6") if ipv6 else ("ipv4",)


def other_policies(firewall: Mapping[str, Any], direction: str, policy: str, *, ipv6: bool) -> list[str]:
    """The families whose kernel does something else by default than an active ufw says, of what comes in.

    What is forwarded has other masters too: Docker sets that policy itself.
    """
    if direction != "incoming" or policy not in KERNEL_POLICIES or not firewall["active"]:
        return []
    policies = firewall.get("policies", {})
    found = {family: policies.get(family, {}).get("INPUT") for family in families(ipv6=ipv6)}
    return [family for family, now in found.items() if now not in (None, KERNEL_POLICIES[policy])]


def lost_of(firewall: Mapping[str, Any], *, ipv6: bool) -> dict[str, list[str]]:
    """Family = our rules that the kernel has lost, of the families that this host has."""
    lost = firewall.get("lost", {})
    return {family: rules for family in families(ipv6=ipv6) if (rules := lost.get(family))}


def stays_off(firewall: Mapping[str, Any]) -> bool:
    """Whether an active ufw is not started at the next boot, and leaves the kernel alone until then."""
    return bool(firewall["active"]) and firewall.get("enabled") is False


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
    for family, rules in lost_of(firewall, ipv6=ipv6).items():
        found += [f"the kernel has lost a rule, over {family}: {rule}" for rule in rules]
    if stays_off(firewall):
        found.append(f"{CONFIG_FILE} says that it does not come back after a boot")
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


def _why_gone(text: str, rules: Sequence[str], ours: Sequence[Rule]) -> str:
    shown = [rule for rule in rules if bare(rule) == text]
    if contradicting(shown, ours):
        return "that contradicts ours"
    return "of ours that is wanted no more" if any(map(is_ours, shown)) else "that is not ours"


# --- as the kernel has it ---


def kernel_policies(listing: str) -> dict[str, str]:
    """Built-in chain = policy, from `iptables -S` or a part of it."""
    return dict(re.findall(r"^-P (\S+) (\S+)$", listing, re.MULTILINE))


def in_kernel(rule: str, listing: str) -> bool:
    """Whether a rule of user.rules (`-A ufw-user-input ...`) stands in what `iptables -S` prints.

    The kernel names the protocol's match too, has its options in an order of its own, and comments.
    """
    wanted = _options(rule)
    return any(wanted == _options(line) for line in listing.splitlines() if line.startswith("-A "))


def lost_lines(kept: str, listing: str) -> list[tuple[str, str]]:
    """(rule, its line) of ours in one of RULES_FILES whose line the kernel, by `iptables -S`, has not.

    Somebody went past ufw, or changed its files while ENABLED=no kept it from the kernel. Raises ValueError
    for a file that is not understood.
    """
    return [
        (bare(rule), line)
        for rule, wanted in kept_rules(kept)
        for line in wanted
        if is_ours(rule) and not in_kernel(line, listing)
    ]


def _options(rule: str) -> frozenset[tuple[str, ...]]:
    try:
        words = shlex.split(rule)
    except ValueError:
        words = rule.split()
    found: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not found:
            found.append([])
        found[-1].append(word.removesuffix("/32").removesuffix("/128") if found[-1][:1] == ["-s"] else word)
    # The comment module, and the one of the protocol, which --dport implies (iptables-extensions(8)).
    return frozenset(tuple(option) for option in found if option[0] not in ("-m", "--comment"))


# --- as ufw keeps it ---

RULES_FILES = {"ipv4": "/etc/ufw/user.rules", "ipv6": "/etc/ufw/user6.rules"}
CONFIG_FILE = "/etc/ufw/ufw.conf"
_FILE_POLICIES = {"DROP": "deny", "REJECT": "reject", "ACCEPT": "allow"}
_EVERYWHERE = ("0.0.0.0/0", "::/0")
_TUPLE = "### tuple ### "


def assignments(text: str) -> dict[str, str]:
    """NAME=value lines of a shell-like file; the last one wins, as in the shell."""
    found = re.findall(r"^[ \t]*([A-Z0-9_]+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip().strip("\"'") for name, value in found}


def from_config(defaults: str, config: str) -> dict[str, Any]:
    """What DEFAULTS_FILE and CONFIG_FILE say: defaults, ipv6 and enabled, as the fact Ufw has them."""
    values = assignments(defaults)
    chains = {"incoming": "INPUT", "outgoing": "OUTPUT", "routed": "FORWARD"}
    return {
        "enabled": assignments(config).get("ENABLED", "").lower() == "yes",
        "defaults": {
            name: _FILE_POLICIES.get(values.get(f"DEFAULT_{chain}_POLICY", "").upper())
            for name, chain in chains.items()
        },
        "ipv6": values.get("IPV6", "").lower() == "yes",
    }


def kept_rules(text: str) -> list[tuple[str, list[str]]]:
    """(rule as ufw shows it, the iptables rules that it stands for) of each rule in one of RULES_FILES.

    The line before is a tuple of its parts (backend_iptables.py _write_rules). Raises ValueError for one that
    is not understood.
    """
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith(_TUPLE):
            found.append((_from_tuple(line.removeprefix(_TUPLE)), []))
        elif not line.strip() or line.startswith("### END"):
            # What follows is no rule's, but ufw's own.
            found.append(("", []))
        elif found and found[-1][0] and line.startswith("-A "):
            found[-1][1].append(line.strip())
    return [(rule, kernel) for rule, kernel in found if rule]


def kept_added(texts: Iterable[str]) -> list[str]:
    """The rules of RULES_FILES, in this order, as `ufw show added` lists them: one of both families once."""
    return list(dict.fromkeys(rule for text in texts for rule, _ in kept_rules(text)))


def _from_tuple(line: str) -> str:
    """A tuple's rule, as parser.py get_command writes it."""
    words = line.split()
    comment = ""
    if words and words[-1].startswith("comment="):
        comment = bytes.fromhex(words.pop().removeprefix("comment=")).decode(errors="replace")
    if len(words) not in (7, 9):
        raise ValueError(f"a rule of {len(words)} parts: {line[:80]}")
    action, protocol, dport, dst, sport, src = words[:6]
    dapp, sapp = (word.replace("%20", " ") for word in words[6:8]) if len(words) == 9 else ("-", "-")
    action, _, log = action.removeprefix("route:").partition("_")
    came_in, went_out, direction = _interfaces(words[-1])
    logged = [log] if log else []
    anywhere = dst in _EVERYWHERE and src in _EVERYWHERE and (sport, sapp) == ("any", "-")
    if anywhere and not came_in and not went_out and dport != "any":
        protocol_of = "" if protocol == "any" else f"/{protocol}"
        parts = [action, *(["out"] if direction == "out" else []), *logged]
        parts.append(f"{dport}{protocol_of}" if dapp == "-" else _quoted(dapp))
    else:
        parts = [action, *(["in", "on", came_in] if came_in else [])]
        parts += ["out", "on", went_out] if went_out else ["out"] if direction == "out" else []
        parts += [*logged, *_end("from", src, sport, sapp), *_end("to", dst, dport, dapp)]
        if not {"from", "to"} & set(parts) and not came_in and not went_out:
            parts += ["to", "any"]
        parts += ["proto", protocol] if protocol != "any" and (dapp, sapp) == ("-", "-") else []
    parts = ["route", *parts] if line.startswith("route:") else parts
    return " ".join(parts) + (f" comment '{comment}'" if comment else "")


def _interfaces(word: str) -> tuple[str, str, str]:
    """Where it comes in, where it goes out, and the direction: from in, out, in_eth0, in_eth0!out_eth1."""
    names = {"in": "", "out": ""}
    for part in word.split("!"):
        direction, _, name = part.partition("_")
        if direction not in names:
            raise ValueError(f"a rule for {word[:40]}")
        names[direction] = name
    return names["in"], names["out"], word[:3].rstrip("_!")


def _end(word: str, address: str, port: str, app: str) -> list[str]:
    place = "any" if address in _EVERYWHERE else address
    if (place, port, app) == ("any", "any", "-"):
        return []
    return [word, place, *(["app", _quoted(app)] if app != "-" else ["port", port] if port != "any" else [])]


def _quoted(app: str) -> str:
    return f"'{app}'" if " " in app else app


# --- as ufw shows it ---


def parse_added(text: str) -> list[str]:
    """The rules in what `ufw show added` printed."""
    return [line.removeprefix("ufw ").strip() for line in text.splitlines() if line.startswith("ufw ")]


def shown(text: str, why: str) -> str:
    """The rule `text` with our mark and the reason, as ufw shows it."""
    return f"{text} comment '{MARK}{why}'"


def bare(rule: str) -> str:
    """A shown rule without its comment: what `ufw delete` takes."""
    return rule.partition(" comment '")[0]


def is_ours(rule: str) -> bool:
    """Whether a shown rule carries our mark."""
    return f" comment '{MARK}" in rule


def traffic(rule: str) -> str:
    """What a rule is about, whatever it does with it: ufw keeps one rule for that, the last one given."""
    _, *words = bare(rule).split()
    return " ".join(word for word in words if word not in ("log", "log-all"))


def words_of(rule: str) -> list[str]:
    """A shown rule as arguments. Application profiles have blanks in their names and stand in quotes."""
    words: list[str] = []
    for at, part in enumerate(rule.split("'")):
        words += [part] if at % 2 else part.split()
    return words
