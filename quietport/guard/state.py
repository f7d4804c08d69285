"""What a guard leaves on the disk: armed.json, the snapshot, the history."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quietport.errors import HostProgramError
from quietport.guard.files import sync_directory
from quietport.guard.machine import GuardError, Machine
from quietport.hostfile import HostFileMissingError, read_json, write_atomic

# On /etc: the file system of what is put back, where a rename needs no room, and there before /var is.
FOLDER = "/etc/quietport/guard"
ARMED = f"{FOLDER}/armed.json"
PROGRAM = f"{FOLDER}/quietport.pyz"
BALLAST = f"{FOLDER}/ballast"
HISTORY = "/var/lib/quietport/guard/history"
LOCK = "/run/quietport/guard.lock"
KEPT = 20
MAX_LOG_LINES = 200


@dataclass(frozen=True)
class Armed:
    """armed.json (schema 1). `since_s` and `deadline_s` are seconds since boot, `since` is wall clock.

    number counts the guards of this host; boot is the boot it was armed in; confirm_over is tailnet or any.
    """

    token: str
    number: int
    by: str
    since: str
    since_s: float
    deadline_s: float
    timeout_s: int
    boot: str
    confirm_over: str

    def seconds_left(self, machine: Machine) -> float:
        """Until the rollback; 0 when it is due, and after a boot."""
        if self.boot != machine.boot():
            return 0.0
        return max(0.0, self.deadline_s - machine.now())

    def sentence(self, machine: Machine) -> str:
        """Who armed it, since when, and what is left."""
        left = self.seconds_left(machine)
        rest = f"{left:.0f} s left" if left else "its time is up, and its rollback is not done"
        return f"a guard is armed by {self.by} since {self.since} ({rest}, token {self.token})"


def wall_clock() -> str:
    """Now, for people: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def snapshot_folder(token: str) -> str:
    """Where the snapshot of a guard is."""
    return f"{FOLDER}/snapshot-{token}"


def unit_name(token: str) -> str:
    """Name of the timer and the service that roll back, without the ending."""
    return f"quietport-guard-{token}"


def read_armed(machine: Machine) -> Armed | None:
    """The guard that is armed; None when none is. Raises GuardError when the file cannot be read."""
    try:
        document = read_json(machine.path(ARMED))
    except HostFileMissingError:
        return None
    except HostProgramError as error:
        raise GuardError(f"{error} Whether a guard is armed cannot be told.", code=3) from error
    try:
        return Armed(**{key: value for key, value in document.items() if key != "schema"})
    except TypeError as error:
        raise GuardError(f"{ARMED} is not as this version writes it ({error}).", code=3) from error


def write_armed(machine: Machine, armed: Armed) -> None:
    """The moment of arming: on the disk, name and all, when this returns."""
    text = json.dumps({"schema": 1, **asdict(armed)}, indent=2) + "\n"
    write_atomic(machine.path(ARMED), text.encode(), mode=0o600)


def remove_armed(machine: Machine) -> None:
    """The moment of a confirmation, and the end of a rollback. Raises OSError."""
    machine.path(ARMED).unlink()
    sync_directory(machine.path(FOLDER))


def drop_ballast(machine: Machine) -> None:
    """Make room for a rollback. Never raises: what keeps it from that does not keep it from the rest."""
    with suppress(OSError):
        machine.path(BALLAST).unlink()


def clear(machine: Machine) -> None:
    """Take away what is of no use while nothing is armed. Never raises: the next arm clears too."""
    folder = machine.path(FOLDER)
    with suppress(OSError):
        for place in folder.iterdir():
            if place.name == Path(ARMED).name:
                continue
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink()
        folder.rmdir()


def write_history(machine: Machine, entry: dict[str, Any]) -> None:
    """Keep what came of a guard (schema 1), by its number; the newest KEPT stay. Raises GuardError.

    token, number, by, since, timeout_s: as it was armed. ended: wall clock. how: confirmed, rolled back, or
    incomplete (a rollback that could not do everything yet). why: timeout, boot, asked, or what failed.
    log: what was said.
    """
    folder = machine.path(HISTORY)
    place = folder / f"{entry['number']:06d}.json"
    before = _read_entry(place)
    if before.get("token") == entry["token"]:
        entry = {**entry, "log": [*before.get("log", []), *entry["log"]][-MAX_LOG_LINES:]}
    try:
        folder.parent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomic(place, (json.dumps({"schema": 1, **entry}, indent=2) + "\n").encode(), mode=0o600)
        for old in sorted(folder.glob("*.json"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, HostProgramError) as error:
        raise GuardError(f"the history cannot be written: {error}") from error


def history(machine: Machine) -> list[dict[str, Any]]:
    """What came of the last guards, the newest first. A file that cannot be read is left out."""
    found = [_read_entry(place) for place in sorted(machine.path(HISTORY).glob("*.json"), reverse=True)]
    return [entry for entry in found if entry][:KEPT]


def next_number(machine: Machine) -> int:
    """One more than the last guard had."""
    return max((int(entry.get("number", 0)) for entry in history(machine)), default=0) + 1


def _read_entry(place: Path) -> dict[str, Any]:
    try:
        return read_json(place)
    except HostProgramError:
        return {}


def running_program() -> Path:
    """The zipapp this runs from. Raises GuardError in a checkout: there is no one file to copy."""
    for place in Path(__file__).parents:
        if place.is_file():
            return place
    raise GuardError(f"{sys.argv[0]} is no installed program: arm with /usr/local/sbin/quietport.")
