"""The firewall: ufw active and as declared, in its files and in the kernel.

ufw itself is not asked, which takes it a third of a second: its files and the kernel's rules tell the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietport import admission, opened
from quietport.commands import is_installed, output_of
from quietport.doctor.model import Check, Finding
from quietport.doctor.place import NOT_CONVERGED, QUICK_S, by_converge
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_NETWORKS, read_bytes
from quietport.ufw_rules import (
    CONFIG_FILE,
    DEFAULTS_FILE,
    RULES_FILES,
    SERVICE,
    foreign,
    from_config,
    kept_added,
    kernel_policies,
    lost_lines,
    past_ufw,
    reasons,
    rules_for,
    stays_off,
)

_FAMILY = {4: "ipv4", 6: "ipv6"}
# ufw's first chain of its own in INPUT, which leads to all its rules.
_JUMP = {4: "-A INPUT -j ufw-before-input", 6: "-A INPUT -j ufw6-before-input"}
_SIGN = {4: "-N ufw-user-input", 6: "-N ufw6-user-input"}
_HARMLESS = re.compile(r" -i (lo|tailscale0) ")


@dataclass(frozen=True)
class Seen:
    """What the host shows: `config` and `defaults` are ufw's files, `rules` and `kernel` are by family."""

    installed: bool = True
    at_boot: bool = True
    config: str = ""
    defaults: str = ""
    rules: Mapping[int, str] = field(default_factory=dict)
    kernel: Mapping[int, str] = field(default_factory=dict)


def look(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `firewall`."""
    if not declared:
        return [NOT_CONVERGED]
    by_hand = opened.read() is not None
    return judge(seen(), declared, by_hand=by_hand)


def seen(root: Path = Path("/")) -> Seen:
    """Raises HostProgramError when it cannot be read."""
    if not is_installed("ufw"):
        return Seen(installed=False)
    families = admission.families()
    state = output_of(["systemctl", "show", "--value", "-p", "UnitFileState", SERVICE], timeout=QUICK_S)
    return Seen(
        at_boot=state.strip() == "enabled",
        config=_text(root, CONFIG_FILE),
        defaults=_text(root, DEFAULTS_FILE),
        rules={family: _text(root, RULES_FILES[_FAMILY[family]]) for family in families},
        kernel={family: admission.read(family) for family in families},
    )


def _text(root: Path, path: str) -> str:
    return read_bytes(root / path.lstrip("/")).decode(errors="replace")


def judge(now: Seen, declared: Mapping[str, Any], *, by_hand: bool = False) -> list[Finding]:
    """What is wrong, each with its next step. `by_hand`: the host was opened, and is to be closed first.

    Raises HostProgramError for rules that are not understood.
    """
    mend = "`quietport close`" if by_hand else by_converge(declared)
    if not now.installed:
        return [Finding("FAIL", "ufw is not installed.", by_converge(declared))]
    rules, kernel = now.rules, now.kernel
    firewall = _firewall(now)
    networks = [str(network) for network in declared.get(PUBLIC_NETWORKS) or []]
    # What is not active has nothing in the kernel to compare. That it stays off has a step of its own.
    told = {"active": True, "enabled": True, "policies": firewall["policies"] if firewall["active"] else {}}
    wrong = reasons(
        {**firewall, **told},
        ipv6=6 in kernel,
        at_boot=True,
        prune_foreign=declared.get("prune_foreign") is True,
        break_glass=networks,
    )
    found = [Finding("FAIL", f"{reason[0].upper()}{reason[1:]}.", mend) for reason in wrong]
    if not firewall["active"]:
        step = mend if wrong else "`ufw --force enable`"
        found.append(Finding("FAIL", "The firewall is not active: everybody reaches everything.", step))
    if not now.at_boot:
        found.append(Finding("FAIL", f"{SERVICE} is not started at boot.", f"`systemctl enable {SERVICE}`"))
    if stays_off(firewall):
        step = f"`sed -i 's/^ENABLED=.*/ENABLED=yes/' {CONFIG_FILE}`"
        found.append(Finding("FAIL", f"{CONFIG_FILE} says that it does not come back after a boot.", step))
    if firewall["active"]:
        for family, listing in kernel.items():
            found += _in_kernel(family, listing, rules.get(family, ""))
    if found:
        return found
    others = len(foreign(firewall["rules"], rules_for(networks, ipv6=6 in kernel)))
    more = f", and {others} of others" if others else ""
    return [Finding("PASS", f"ufw is active with the declared rules{more}; what else comes in is denied.")]


def _firewall(now: Seen) -> dict[str, Any]:
    """The host's firewall as the fact Ufw tells it. Raises HostProgramError."""
    kept = from_config(now.defaults, now.config)
    rules, kernel = now.rules, now.kernel
    read = [text for family, text in sorted(rules.items()) if family == 4 or kept["ipv6"]]
    try:
        added = kept_added(read)
    except ValueError as error:
        raise HostProgramError(
            f"{RULES_FILES['ipv4']} has a rule that is not understood: {error}."
        ) from error
    return {
        "installed": True,
        "active": _SIGN[4] in kernel.get(4, "").splitlines(),
        **kept,
        "rules": added,
        "policies": {_FAMILY[family]: kernel_policies(text) for family, text in kernel.items()},
    }


def _in_kernel(family: int, listing: str, kept: str) -> list[Finding]:
    """What an active ufw has in its files and the kernel has not, or the other way round."""
    lines = listing.splitlines()
    program = admission.PROGRAMS[family]
    if _JUMP[family] not in lines:
        why = f"IPv{family}: the kernel's INPUT chain does not lead to ufw's rules."
        return [Finding("FAIL", why, "`ufw reload`, which opens the firewall for a moment.")]
    found = [
        Finding(
            "FAIL", f"IPv{family}: ufw has a rule that the kernel has lost: {rule}.", f"`{program} {line}`"
        )
        for rule, line in lost_lines(kept, listing)
    ]
    for rule in past_ufw(listing):
        if rule.endswith(" -j ACCEPT") and not _HARMLESS.search(rule):
            why = f"IPv{family}: somebody lets others in past ufw: {rule}."
            found.append(Finding("WARN", why, f"`{program} -D {rule.removeprefix('-A ')}`"))
    return found


CHECKS = (Check("firewall", look),)
