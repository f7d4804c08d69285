"""The firewall: an exact rule set, computed against `ufw show added`, without a moment without rules.

An active ufw is never reloaded, disabled, reset or restarted: `ufw reload` and `ufw default` are a stop and a
start, with INPUT at ACCEPT in between (ufw 0.36.2, frontend.py set_default_policy, ufw-init-functions). Rules
are added and deleted one by one: ufw then refills its own user chains, while the policy stays DROP and
established connections pass by an earlier chain (before.rules).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from quietport.ufw_rules import (
    CONFIG_FILE,
    DEFAULTS,
    DEFAULTS_FILE,
    KERNEL_POLICIES,
    RULES_FILES,
    SERVICE,
    Changes,
    changes,
    contradicting,
    families,
    foreign,
    is_ours,
    lost_of,
    other_policies,
    past_ufw,
    reasons,
    rules_for,
    stays_off,
    words_of,
)

# What was there before the first change: for the way back (operations/undo.py).
RECORD = "/var/lib/quietport/ufw-before.json"
_RESTORE = {"ipv4": "iptables-restore", "ipv6": "ip6tables-restore"}
_CHAINS = {"incoming": "input", "outgoing": "output", "routed": "forward"}


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
    target = KERNEL_POLICIES[policy]
    chain = _CHAINS[direction]
    lines = ["*filter", f":{chain.upper()} {target} [0:0]"]
    lines += [f"-F ufw{family}-{part}-{chain}" for part in ("reject", "track", "skip-to-policy")]
    lines.append(f"-A ufw{family}-skip-to-policy-{chain} -j {target}")
    if target == "ACCEPT":
        tracked = "-m conntrack --ctstate NEW -j ACCEPT"
        lines += [f"-A ufw{family}-track-{chain} -p {protocol} {tracked}" for protocol in ("tcp", "udp")]
    return "\n".join([*lines, "COMMIT", ""])


# NAME=value in one of ufw's files; $1 is the name, $2 the value, $3 the file.
_ASSIGN = """set -eu
sed -i "s/^$1=.*/$1=$2/" "$3"
grep -qx "$1=$2" "$3" || printf '%s=%s\\n' "$1" "$2" >>"$3"
"""
# As ufw-init-functions does at start: the chains that the file declares are made anew, in one step.
_LOAD = """set -eu
"$1" -n <"$2"
"""


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
        for family in families(ipv6=ipv6):
            text = live_policy(direction, policy, family="6" if family == "ipv6" else "")
            commands.append(program(_RESTORE[family], "-n", stdin=text.encode()))
        # After the kernel: the next run reads the file, which must not claim what the kernel does not do yet.
        name, value = f"DEFAULT_{_CHAINS[direction].upper()}_POLICY", f'"{KERNEL_POLICIES[policy]}"'
        commands.append(script(_ASSIGN, name, value, DEFAULTS_FILE))
    return commands


def _commands(
    firewall: Mapping[str, Any], *, ipv6: bool, at_boot: bool, prune_foreign: bool, break_glass: Sequence[str]
) -> list[PyinfraCommand]:
    """Everything to do, in order: nothing is closed before what must stay open is open."""
    commands: list[PyinfraCommand] = []
    ours = rules_for(break_glass, ipv6=ipv6)
    wanted = changes(firewall["rules"], prune_foreign=prune_foreign, ours=ours)
    if ipv6 and not firewall["ipv6"]:
        commands.append(script(_ASSIGN, "IPV6", "yes", DEFAULTS_FILE))
        # The rules there are hold for IPv4 alone, and look the same in `ufw show added`.
        present = tuple(rule for rule in ours if rule not in wanted.add + wanted.prepend)
        wanted = Changes(wanted.delete, wanted.add + present, wanted.prepend)
    if stays_off(firewall):
        # First: without it ufw writes its files, and leaves the kernel as it is.
        commands.append(script(_ASSIGN, "ENABLED", "yes", CONFIG_FILE))
    commands += _rule_commands(wanted)
    commands += default_commands(firewall, ipv6=ipv6)
    for family in lost_of(firewall, ipv6=ipv6):
        commands.append(script(_LOAD, _RESTORE[family], RULES_FILES[family]))
    if not at_boot:
        commands.append(program("systemctl", "enable", SERVICE))
    if not firewall["active"]:
        commands.append(program("ufw", "--force", "enable"))
    return commands


def _name_past_ufw() -> None:
    for family, listing in sorted(host.get_fact(PacketFilter).items()):
        for rule in past_ufw(listing):
            notes.remark(f"firewall: left alone, not ours and not ufw's (IPv{family}): {rule}")


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
