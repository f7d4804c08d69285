"""The host a check looks at, and the words that next steps share. Tests give a check another root."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietport import commands
from quietport.commands import Done
from quietport.doctor.model import Finding
from quietport.guard.machine import Machine, Runner

# A program that takes longer hangs, also on a host that has just booted and is slow: its check has no answer.
QUICK_S = 30.0
# What the timer keeps; and what it found last, as `quietport doctor --json` shows it.
FOLDER = Path("/var/lib/quietport/doctor")
LATEST_NAME = "latest.json"
LATEST = f"{FOLDER}/{LATEST_NAME}"
# What looks again at what is slow, and writes it down.
LOOK_AGAIN = "`systemctl start quietport-doctor.service`"


def quick(argv: Sequence[str], *, stdin: str = "", timeout: float = QUICK_S) -> Done:
    """Run `argv` for at most QUICK_S seconds. Raises HostProgramError when it is missing or takes longer."""
    return commands.run(argv, stdin=stdin, timeout=min(timeout, QUICK_S))


@dataclass(frozen=True)
class Place(Machine):
    """One host, of which nothing is changed. `wall` is the wall clock, in seconds since the epoch."""

    run: Runner = quick
    wall: Callable[[], float] = time.time


HERE = Place()
# For what is slow: each command says itself how long it may take.
PATIENT = Place(run=commands.run)


NOT_CONVERGED = Finding("SKIP", "There is no /etc/quietport/host.json: no converge has been here.")


def name_of(declared: Mapping[str, Any]) -> str:
    """The host's name in hosts.toml; "this host" where no converge has been."""
    return str(declared.get("name") or "this host")


def by_converge(declared: Mapping[str, Any]) -> str:
    """The next step where the declared state must come back."""
    name = declared.get("name")
    return f"On your machine: `quietport apply {name}`." if name else "On your machine: `quietport apply`."


def names_of(declared: Mapping[str, Any], key: str) -> list[str]:
    """A list of names in host.json; [] where it is not there or is none."""
    value = declared.get(key)
    return [str(one) for one in value] if isinstance(value, list) else []
