"""ufw as it runs: whether it is active, the policies of the built-in chains, and its own chains.

Chains of Docker and tailscaled are never read into a snapshot: they change meanwhile. An active ufw is never
reloaded, disabled and enabled, or restarted, which would open everything for a moment (ufw 0.36.2,
ufw-init-functions): its chains and policies are replaced in one transaction a family, by
`iptables-restore -n`, which flushes the chains it names and touches no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quietport import admission
from quietport.commands import NOT_INSTALLED
from quietport.guard.machine import GuardError, Machine

UFW_INIT = "/lib/ufw/ufw-init"
_SAVE = {"ipv4": "iptables-save", "ipv6": "ip6tables-save"}
_RESTORE = {"ipv4": "iptables-restore", "ipv6": "ip6tables-restore"}
_BUILT_IN = ("INPUT", "FORWARD", "OUTPUT")
# The chain by which ufw itself tells whether it runs.
_SIGN = "ufw-user-input"
_TIMEOUT_S = 30.0
_UFW_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Family:
    """The filter table of one family: policies, ufw's chains, and the jumps from built-in chains to them."""

    policies: Mapping[str, str] = field(default_factory=dict)
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    jumps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Firewall:
    """Both families; one that the host does not have is missing."""

    active: bool = False
    families: Mapping[str, Family] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(document: Mapping[str, Any]) -> Firewall:
    """What `to_json` made. Raises KeyError or TypeError."""
    families = {
        name: Family(
            policies=dict(family["policies"]),
            chains={chain: tuple(rules) for chain, rules in family["chains"].items()},
            jumps={chain: tuple(rules) for chain, rules in family["jumps"].items()},
        )
        for name, family in document["families"].items()
    }
    return Firewall(active=bool(document["active"]), families=families)


def parse(text: str) -> Family:
    """The filter table of `iptables-save` output, without counters."""
    policies: dict[str, str] = {}
    chains: dict[str, list[str]] = {}
    jumps: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split()
        if line.startswith(":") and len(words) >= 2:
            name = words[0][1:]
            if name in _BUILT_IN:
                policies[name] = words[1]
            elif name.startswith("ufw"):
                chains[name] = []
        elif len(words) >= 2 and words[0] == "-A":
            rule = line.split(None, 2)[2] if len(words) > 2 else ""
            if words[1] in _BUILT_IN and words[-2:-1] == ["-j"] and words[-1].startswith("ufw"):
                jumps.setdefault(words[1], []).append(rule)
            elif words[1] in chains:
                chains[words[1]].append(rule)
    return Family(
        policies=policies,
        chains={name: tuple(rules) for name, rules in chains.items()},
        jumps={name: tuple(rules) for name, rules in jumps.items()},
    )


def look(machine: Machine) -> Firewall:
    """The firewall as the kernel has it. A host without iptables has none.

    Raises GuardError when it cannot be read: an active one would be taken for none, and switched off.
    """
    families = {}
    for family, program in _SAVE.items():
        done = machine.run([program, "-t", "filter"], timeout=_TIMEOUT_S)
        if done.code == 0:
            families[family] = parse(done.out)
        elif NOT_INSTALLED not in done.err and (family == "ipv4" or _has_ipv6(machine)):
            raise GuardError(f"the firewall cannot be read: {program}: {done.complaint}")
    active = _SIGN in families.get("ipv4", Family()).chains
    return Firewall(active=active, families=families)


def _has_ipv6(machine: Machine) -> bool:
    return 6 in admission.families(machine.path("/proc/net/if_inet6"))


def differences(old: Firewall, new: Firewall) -> list[str]:
    """What of `old` is otherwise in `new`, a phrase each."""
    if old.active != new.active:
        words = ("active", "not active")
        return [f"ufw is {words[not new.active]}, it was {words[not old.active]}"]
    found = []
    for name, family in old.families.items():
        now = new.families.get(name, Family())
        # Without ufw, FORWARD is Docker's.
        compared = _BUILT_IN if old.active else ("INPUT", "OUTPUT")
        for chain in compared:
            was, is_now = (one.policies.get(chain, "ACCEPT") for one in (family, now))
            if was != is_now:
                found.append(f"{name}: the policy of {chain} is {is_now}, it was {was}")
        if old.active:
            found += [
                f"{name}: chain {chain} is not as it was"
                for chain, rules in family.chains.items()
                if now.chains.get(chain) != rules
            ]
            found += [
                f"{name}: {chain} does not lead to ufw's chains as it did"
                for chain, rules in family.jumps.items()
                if now.jumps.get(chain) != rules
            ]
    return found


def restore_text(old: Family, now: Family) -> str:
    """Input of `iptables-restore -n` that makes policies and ufw's chains as in `old`, in one step."""
    lines = ["*filter", *_policies(old)]
    lines += [f":{chain} - [0:0]" for chain in old.chains]
    lines += [f"-A {chain} {rule}" for chain, rules in old.chains.items() for rule in rules]
    for chain, rules in old.jumps.items():
        there = now.jumps.get(chain, ())
        if there != rules:
            # All of them anew: their order among each other counts.
            lines += [f"-D {chain} {rule}" for rule in there] + [f"-A {chain} {rule}" for rule in rules]
    return "\n".join([*lines, "COMMIT", ""])


def _policies(family: Family) -> list[str]:
    return [f":{chain} {policy} [0:0]" for chain, policy in family.policies.items() if policy != "-"]


@dataclass
class Restorer:
    """Makes the firewall as in `old`."""

    machine: Machine
    old: Firewall
    say: Callable[[str], None]

    def first(self) -> None:
        """Before sshd: what opens the old way in, and what replaces rules. Raises GuardError."""
        now = look(self.machine)
        # Of an attempt that was killed in the middle of it, one family may be left as it was.
        half = not now.active and not self.old.active and bool(differences(self.old, now))
        if half or (now.active and not self.old.active):
            self._switch_off()
            for name, family in self.old.families.items():
                self._load(name, "\n".join(["*filter", *_policies(family), "COMMIT", ""]))
            self.say("ufw switched off: it was not active")
        elif now.active:
            self._replace(now)

    def last(self) -> None:
        """After sshd answers as before: what closes. Raises GuardError."""
        if not self.old.active or look(self.machine).active:
            return
        done = self.machine.run(["ufw", "--force", "enable"], timeout=_UFW_TIMEOUT_S)
        if done.code != 0:
            raise GuardError(f"ufw could not be switched on again: {done.complaint}")
        self.say("ufw switched on: it was active")
        self._replace(look(self.machine))

    def _switch_off(self) -> None:
        done = self.machine.run(["ufw", "--force", "disable"], timeout=_UFW_TIMEOUT_S)
        if done.code != 0:
            # What `ufw disable` runs in the end, also when ufw itself trips over its files.
            done = self.machine.run([UFW_INIT, "force-stop"], timeout=_UFW_TIMEOUT_S)
        if done.code != 0:
            raise GuardError(f"ufw could not be switched off: {done.complaint}")

    def _replace(self, now: Firewall) -> None:
        for name, family in self.old.families.items():
            there = now.families.get(name, Family())
            one = Firewall(active=True, families={name: family})
            if differences(one, Firewall(active=True, families={name: there})):
                self._load(name, restore_text(family, there))
                self.say(f"{name}: policies and ufw's chains put back")

    def _load(self, name: str, text: str) -> None:
        done = self.machine.run([_RESTORE[name], "-w", "5", "-n"], stdin=text, timeout=_TIMEOUT_S)
        if done.code != 0:
            raise GuardError(f"{_RESTORE[name]} refuses the old rules: {done.complaint}")
