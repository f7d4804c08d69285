"""Listeners: nothing is public that may not be, by the one policy (quietport/ports.py)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietport import opened
from quietport.doctor.model import Check, Finding
from quietport.doctor.place import by_converge
from quietport.ports import PUBLISHED_HINT, SSHD_HINT, Judged
from quietport.survey import survey

TRANSIENT = Path("/run/systemd/transient")


def look(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `listeners`."""
    return judge(survey(), declared, by_hand=opened.read() is not None)


def judge(
    judged: list[Judged], declared: Mapping[str, Any], *, by_hand: bool = False, transient: Path = TRANSIENT
) -> list[Finding]:
    """A FAIL for each violation. `by_hand`: the host was opened, and `quietport close` is what ends it."""
    found = [
        Finding("FAIL", _reason(entry), _next_step(entry, declared, by_hand=by_hand, transient=transient))
        for entry in judged
        if entry.verdict == "violation"
    ]
    public = sum(entry.exposure == "public" for entry in judged)
    return found or [Finding("PASS", f"{len(judged)} listen; of {public} in public each one may.")]


def _reason(entry: Judged) -> str:
    who = ", ".join(part for part in (entry.process, entry.unit) if part)
    place = entry.listener
    return (
        f"{place.protocol} {place.where} port {place.port} is public and may not be ({who or 'no process'})."
    )


def _next_step(entry: Judged, declared: Mapping[str, Any], *, by_hand: bool, transient: Path) -> str:
    """The policy's hint, as commands where it has none."""
    units = [unit.strip() for unit in entry.unit.split(",") if unit.strip()]
    of_ssh = any(unit.startswith(("ssh.", "sshd.", "ssh@", "sshd@")) for unit in units)
    if by_hand and of_ssh:
        return "`quietport close`"
    if entry.hint == SSHD_HINT or of_ssh:
        return by_converge(declared)
    if entry.hint == PUBLISHED_HINT and entry.container:
        return f"`docker stop {shlex.quote(entry.container)}`, and create it anew with the port on 127.0.0.1."
    if "`systemctl disable" in entry.hint and all((transient / unit).exists() for unit in units):
        # There is no file of it that could be disabled.
        return f"`systemctl stop {shlex.join(units)}`"
    if "`" in entry.hint or not entry.listener.processes:
        return entry.hint
    pids = " ".join(str(process.pid) for process in entry.listener.processes)
    return f"{entry.hint} To stop it: `kill {pids}`"


CHECKS = (Check("listeners", look),)
