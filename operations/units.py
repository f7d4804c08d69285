"""systemd units: masked, enabled, and unit files with the reload they need in the same step.

pyinfra's own systemd operation cannot mask, counts static as enabled, and its reload is a flag that a killed
run loses. A due reload is a fact here (NeedDaemonReload).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pyinfra.context import host

from facts.units import Units
from operations import notes
from operations.common import Commands, operation, program
from operations.files import put_if_needed
from quietport.unit_names import UNIT_FOLDER


def is_masked(state: Mapping[str, Any]) -> bool:
    """Whether a unit can be started by nobody, and is not running from before."""
    return state["enabled"].startswith("masked") and state["active"] in ("inactive", "failed", "")


def is_enabled(state: Mapping[str, Any]) -> bool:
    """Whether a unit starts at boot. `static` does not: something else has to ask for it."""
    return bool(state["enabled"] == "enabled")


def mask_if_needed(names: Sequence[str]) -> Commands:
    """What `masked` yields, for operations that own more than the masks."""
    states = host.get_fact(Units, names=list(names))
    for name in names:
        if is_masked(states[name]):
            continue
        notes.because(f"{name} is not masked{_running(states[name])}")
        if states[name]["active"] not in ("inactive", "failed", ""):
            yield program("systemctl", "stop", name)
        # Disabled first: the links of [Install] stay behind when a unit is only masked.
        if states[name]["enabled"].startswith("enabled"):
            yield program("systemctl", "disable", name)
        yield program("systemctl", "mask", name)


def _running(state: Mapping[str, Any]) -> str:
    return "" if state["active"] in ("inactive", "failed", "") else f" and is {state['active']}"


def enable_if_needed(name: str, *, running: bool = True) -> Commands:
    """What `enabled` yields, for operations that own more than the unit's state."""
    state = host.get_fact(Units, names=[name])[name]
    if state["enabled"].startswith("masked"):
        notes.because(f"{name} is masked")
        yield program("systemctl", "unmask", name)
    if not is_enabled(state):
        notes.because(f"{name} is {state['enabled'] or 'absent'}, not enabled")
        yield program("systemctl", "enable", name)
    if running and state["active"] != "active":
        notes.because(f"{name} is {state['active'] or 'inactive'}, not active")
        yield program("systemctl", "start", name)


def unit_of(path: str) -> str:
    """The unit a unit file or a drop-in belongs to."""
    file = PurePosixPath(path)
    return file.parent.name.removesuffix(".d") if file.parent.name.endswith(".d") else file.name


def files_if_needed(files: Mapping[str, str]) -> Commands:
    """What `unit_files` yields, for operations that own more than the files."""
    changed = False
    for path, text in files.items():
        parent = str(PurePosixPath(path).parent)
        for command in put_if_needed(path, text, mode="0644"):
            changed = True
            yield program("install", "-d", "-m", "0755", "--", parent)
            yield command
    units = sorted({unit_of(path) for path in files})
    # Read only when nothing was written: a run that was killed before its reload left it due.
    unread = [] if changed else _unread(units)
    notes.because(*(f"systemd has not read {unit} since it changed" for unit in unread))
    if changed or unread:
        yield program("systemctl", "daemon-reload")


def _unread(units: Sequence[str]) -> list[str]:
    states = host.get_fact(Units, names=list(units))
    for unit, state in states.items():
        name_others(unit, state)
    return [unit for unit, state in states.items() if state["need_reload"]]


def name_others(unit: str, state: Mapping[str, Any]) -> None:
    """Tell a plan of drop-ins that somebody else has made for a unit of ours: they may undo what ours says.

    Of those that come with packages, or are made at boot, the host's owner is not told.
    """
    for path in state.get("drop_ins", ()):
        if path.startswith(f"{UNIT_FOLDER}/") and "quietport" not in PurePosixPath(path).name:
            notes.remark(f"{unit}: {path} is not ours, and may undo what ours says (left alone)")


@operation()
def masked(names: list[str]) -> Commands:
    """The units are stopped, disabled and masked: nobody can start them, a package upgrade included."""
    yield from _or_noop(mask_if_needed(names), f"{', '.join(names)} masked")


@operation()
def enabled(name: str, running: bool = True) -> Commands:
    """The unit starts at boot and, with `running`, runs now."""
    yield from _or_noop(enable_if_needed(name, running=running), f"{name} enabled")


@operation()
def unit_files(files: dict[str, str]) -> Commands:
    """Each unit file or drop-in (path = text) is there and systemd has read it."""
    yield from _or_noop(files_if_needed(files), f"{', '.join(sorted(files))} as wanted")


@operation()
def at_boot(unit: str, text: str) -> Commands:
    """The unit file of ours is there as `text`, systemd has read it, and it starts at boot; not now."""
    yield from _or_noop(_at_boot(unit, text), f"{unit} waits for a boot")


def _at_boot(unit: str, text: str) -> Commands:
    yield from files_if_needed({f"{UNIT_FOLDER}/{unit}": text})
    yield from enable_if_needed(unit, running=False)


def _or_noop(commands: Commands, converged: str) -> Commands:
    changed = False
    for command in commands:
        changed = True
        yield command
    if not changed:
        host.noop(converged)
