"""Units: what of quietport runs by itself, how its last run ended, and what failed on this host."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quietport.commands import Done
from quietport.doctor.model import Check, Finding, keeping
from quietport.doctor.place import HERE, Place, by_converge, names_of
from quietport.errors import HostProgramError, printable
from quietport.hostfile import TIMERS
from quietport.sshd import OURS
from quietport.unit_names import BOOT_UNIT, FOLLOWER, UNIT_FOLDER

_STATE = ("Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "NeedDaemonReload")
_RESULT = ("Result", "ExecMainStatus")
# What a timer is while it will run again (systemd.timer(5); timer-state in systemd's src/core).
_WAITING = ("waiting", "running")

Shown = Mapping[str, str]


def timers(declared: Mapping[str, Any], *, place: Place = HERE) -> list[Finding]:
    """The timers, the follower of addresses and the boot's unit are enabled; the last runs ended well."""
    names = names_of(declared, TIMERS) or marked_timers(place.path(UNIT_FOLDER))
    if not names:
        return [Finding("SKIP", "No timer is declared here.")]
    services = [f"{name.removesuffix('.timer')}.service" for name in names]
    asked = [*names, *services, FOLLOWER, BOOT_UNIT]
    shown = place.show(*asked, properties=(*_STATE, *_RESULT))
    if len(shown) != len(asked):
        raise HostProgramError("systemctl show does not answer for each unit.")
    states = dict(zip(asked, shown, strict=True))
    found: list[Finding] = []
    for name in (*names, FOLLOWER, BOOT_UNIT):
        found += _enabled(name, states[name], declared)
    for name in services:
        found += _last_run(name, states[name])
    found += _unread(states)
    return found or [Finding("PASS", f"Each is enabled, and its last run ended well: {', '.join(names)}.")]


def failed_units(declared: Mapping[str, Any], *, place: Place = HERE) -> list[Finding]:
    """No unit of the host is in the state `failed`."""
    listing = ["systemctl", "list-units", "--state=failed", "--all", "--full", "--plain", "--no-legend"]
    names = parse_failed(place.run([*listing, "--no-pager"]))
    if not names:
        return [Finding("PASS", "No unit has failed.")]
    with keeping([_failed(name, {}) for name in names]):
        shown = place.show(*names, properties=("LoadState", "Transient", "Result"))
        if len(shown) != len(names):
            raise HostProgramError("systemctl show does not answer for each unit that failed.")
    return [_failed(name, state) for name, state in zip(names, shown, strict=True)]


def marked_timers(folder: Path) -> list[str]:
    """The timers that quietport has made, by the mark in their files: of a host whose host.json is older."""
    found = []
    for file in sorted(folder.glob("quietport-*.timer")):
        try:
            first = file.open(errors="replace").readline()
        except OSError:
            continue
        if first.startswith(OURS):
            found.append(file.name)
    return found


def parse_failed(done: Done) -> list[str]:
    """The names in what `systemctl list-units --plain --no-legend` prints. Raises HostProgramError."""
    if done.code != 0:
        raise HostProgramError(f"systemctl list-units: {done.complaint}")
    names = []
    for line in done.out.splitlines():
        words = line.split()
        if not words:
            continue
        # Names have no spaces (systemd escapes them); UNIT LOAD ACTIVE SUB come first.
        if len(words) < 4 or "failed" not in words[2:4] or "." not in words[0]:
            raise HostProgramError("systemctl list-units printed what is not understood.")
        names.append(words[0])
    return names


def _enabled(name: str, state: Shown, declared: Mapping[str, Any]) -> Iterable[Finding]:
    load, enabled, active = (state.get(key, "") for key in ("LoadState", "UnitFileState", "ActiveState"))
    if load == "masked":
        step = f"`systemctl unmask {name}` and `systemctl enable --now {name}`."
        yield Finding("FAIL", f"{name} is masked.", step)
    elif load != "loaded":
        yield Finding("FAIL", f"{name} is {load or 'unknown'}.", by_converge(declared))
    elif name == BOOT_UNIT:
        if enabled != "enabled":
            yield Finding("FAIL", f"{name} is {enabled or 'not enabled'}.", f"`systemctl enable {name}`.")
    elif enabled != "enabled" or active != "active":
        reason = f"{name} is {enabled or 'not enabled'} and {active or 'inactive'}."
        reset = f"`systemctl reset-failed {name}`, then " if active == "failed" else ""
        yield Finding("FAIL", reason, f"{reset}`systemctl enable --now {name}`.")
    elif name.endswith(".timer") and state.get("SubState") not in _WAITING:
        reason = f"{name} is {state.get('SubState')}: it does not run again."
        yield Finding("FAIL", reason, f"`systemctl restart {name}`.")


def _last_run(name: str, state: Shown) -> Iterable[Finding]:
    result = state.get("Result", "")
    # A masked or absent service is the timer's business, which cannot run it.
    if state.get("LoadState") != "loaded":
        reason = f"{name} is {state.get('LoadState') or 'unknown'}: its timer has nothing to run."
        yield Finding("FAIL", reason, f"`systemctl unmask {name}`; where it is absent, converge again.")
    elif result not in ("", "success"):
        reason = f"The last run of {name} failed ({result}, exit status {state.get('ExecMainStatus', '?')})."
        yield Finding("FAIL", reason, _again(name))


def _again(name: str) -> str:
    unit = shlex.quote(name)
    return (
        f"`journalctl -u {unit} -n 20 --no-pager` says why. When that is mended: "
        f"`systemctl reset-failed {unit}` and `systemctl start {unit}`."
    )


def _unread(states: Mapping[str, Shown]) -> Iterable[Finding]:
    unread = [name for name, state in states.items() if state.get("NeedDaemonReload") == "yes"]
    if unread:
        reason = f"systemd has not read what changed in {', '.join(unread)}."
        yield Finding("WARN", reason, "`systemctl daemon-reload`.")


def _failed(name: str, state: Shown) -> Finding:
    unit = shlex.quote(name)
    reason = f"{printable(name)} has failed ({state.get('Result') or 'unknown'})."
    # One that was made for a moment, or is no more, cannot be started again.
    if state.get("Transient") == "yes" or state.get("LoadState") != "loaded" or name.endswith(".scope"):
        says = f"`journalctl -u {unit} -n 20 --no-pager` says why"
        return Finding("FAIL", reason, f"{says}. Then `systemctl reset-failed {unit}`.")
    return Finding("FAIL", reason, _again(name))


CHECKS = (Check("timers", timers), Check("failed-units", failed_units))
