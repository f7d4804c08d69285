"""Timers: programs that run on the host by themselves, each in a unit that may do only what it needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from pyinfra.context import host

from facts.units import OwnTimers
from operations import notes
from operations.common import Commands, operation, refuse, script
from operations.units import enable_if_needed, files_if_needed
from operations.users import account_of
from quietport.unit_names import UNIT_FOLDER

_FOLDER = Path(__file__).parents[1] / "templates/timers"
_TEMPLATES = {
    kind: jinja2.Template(
        (_FOLDER / f"{kind}.j2").read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    for kind in ("service", "timer")
}
# The timer's file goes last: by it the next run finds what a killed one has not finished.
_RETIRE = """set -eu
systemctl disable --now --quiet -- "$1.timer"
rm -f -- "$2/$1.service"
rm -f -- "$2/$1.timer"
systemctl daemon-reload
systemctl reset-failed --quiet -- "$1.service" 2>/dev/null || true
"""
_NAME = re.compile(r"^[a-z][a-z0-9_-]{0,60}$")


@dataclass(frozen=True)
class Timer:
    """A program that runs by itself: `program` (argv, absolute path) on `schedule` (OnCalendar) as `user`.

    The rest is what its unit may do beyond nothing: capabilities, address families, paths it writes below,
    `sees_processes`: it looks at the host's own sockets and processes, `sees_homes`: it reads below /home and
    /run/user, and `network`: it talks to other hosts. `jitter_s` spreads a fleet.
    """

    name: str
    schedule: str
    program: tuple[str, ...]
    user: str
    capabilities: tuple[str, ...] = ()
    address_families: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    sees_processes: bool = False
    sees_homes: bool = False
    network: bool = False
    jitter_s: int = 3600
    timeout_s: int = 300

    @property
    def unit(self) -> str:
        """Name of its service and timer, without the ending."""
        return f"quietport-{self.name}"


def command_line(program: tuple[str, ...]) -> str:
    """argv as ExecStart takes it: every word quoted, no specifier and no variable expanded.

    Raises ValueError when the program's path is not absolute (systemd.service(5), COMMAND LINES).
    """
    if not program or not program[0].startswith("/"):
        raise ValueError("a timer's program is named by an absolute path")
    return " ".join(_quoted(word) for word in program)


def _quoted(word: str) -> str:
    if any(not char.isprintable() for char in word):
        raise ValueError("a timer's program has a character that cannot be printed in its arguments")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[A-Za-z0-9@+=:,./_-]+", word) else f'"{escaped}"'


def unit_files(timer: Timer) -> dict[str, str]:
    """Path = text of the timer's two units. Raises ValueError when its name or program cannot be used."""
    if not _NAME.match(timer.name):
        raise ValueError("a timer's name is lower-case letters, digits, dashes and underscores")
    values = {"timer": timer, "unit": timer.unit, "command": command_line(timer.program)}
    return {
        f"{UNIT_FOLDER}/{timer.unit}.{kind}": template.render(values) for kind, template in _TEMPLATES.items()
    }


@operation()
def running(timer: Timer) -> Commands:
    """The timer's units are as declared, and it is enabled and waiting for its time."""
    try:
        files = unit_files(timer)
    except ValueError as error:
        yield refuse(f"timer {timer.name}: {error}.")
        return
    changed = False
    for command in files_if_needed(files):
        changed = True
        yield command
    for command in enable_if_needed(f"{timer.unit}.timer"):
        changed = True
        yield command
    if changed:
        notes.after(account_of(timer.user))
    else:
        host.noop(f"{timer.unit}.timer waits for its time")


@operation()
def no_others(units: Sequence[str]) -> Commands:
    """Of the timers that quietport has made, only `units` (names without ending) are there.

    An older version leaves others: their programs may be gone, and the service would then fail every day.
    """
    retired = [unit for unit in host.get_fact(OwnTimers) if unit not in units]
    if not retired:
        host.noop("no timer of ours but the declared ones")
    notes.because(*(f"{unit}.timer is not declared" for unit in retired))
    for unit in retired:
        yield script(_RETIRE, unit, UNIT_FOLDER, timeout=180)
