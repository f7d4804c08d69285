"""The machine: room on its disks, its clock, and a reboot that is due."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quietport.docker_user import DAEMON_JSON, data_root_of
from quietport.doctor.model import Check, Finding, keeping
from quietport.doctor.place import HERE, LATEST, LOOK_AGAIN, Place
from quietport.errors import HostProgramError, printable
from quietport.hostfile import HostFileError, HostFileMissingError, read_bytes, read_json

# Percent of what programs can have: df's Use%.
NEARLY_FULL, FULL = 85, 95
PLACES = ("/", "/boot", "/home", "/tmp", "/var", "/var/cache", "/var/lib", "/var/log")  # noqa: S108, looked at
JOURNAL, ARCHIVES = "/var/log/journal", "/var/cache/apt/archives"
JOURNAL_KEPT = 100 << 20
# Entries of a directory that are counted: it is a look, not a du.
MAX_ENTRIES = 5000

AHEAD_S = 300
# The kernel counts its error up to this, in microseconds, while nobody corrects the clock (adjtimex(2)).
# What timedatectl(1) calls synchronised is judged by it too.
MAX_ERROR_US = 16_000_000

REBOOT_DUE = "/run/reboot-required"
DAY_S = 86400
# By then what was mended in the kernel has been known to everybody for two weeks, and is not in use here.
REBOOT_OVERDUE_S = 14 * DAY_S


# --- disk ---


@dataclass(frozen=True)
class Room:
    """A file system: what programs can have of it and what is used of that, in bytes and in inodes."""

    total: int
    used: int
    inodes: int
    inodes_used: int

    @classmethod
    def of(cls, status: os.statvfs_result) -> Room:
        """As df counts: what is kept back for root is neither used nor to be had."""
        used, inodes_used = status.f_blocks - status.f_bfree, status.f_files - status.f_ffree
        return cls(
            total=(used + status.f_bavail) * status.f_frsize,
            used=used * status.f_frsize,
            inodes=inodes_used + status.f_favail,
            inodes_used=inodes_used,
        )


def percent(used: int, total: int) -> int:
    """Rounded up, as df does; 0 of nothing (a file system without a limit)."""
    return -(-100 * used // total) if total > 0 else 0


def disk(
    declared: Mapping[str, Any],
    *,
    place: Place = HERE,
    look: Callable[[Path], os.statvfs_result] = os.statvfs,
) -> list[Finding]:
    """No file system that this host needs is full, or nearly so."""
    found: list[Finding] = []
    seen: dict[int, str] = {}
    most = 0
    for path in dict.fromkeys((*PLACES, str(_data_root(place)))):
        here = place.path(path)
        try:
            device, status = here.stat().st_dev, look(here)
        except OSError:
            continue
        if device in seen:
            continue
        seen[device] = path
        room = Room.of(status)
        most = max(most, percent(room.used, room.total), percent(room.inodes_used, room.inodes))
        found += _full(path, device, room, place)
    return found or [Finding("PASS", f"At most {most} % is used of {', '.join(seen.values())}.")]


def _full(path: str, device: int, room: Room, place: Place) -> Iterable[Finding]:
    used = percent(room.used, room.total)
    if used >= NEARLY_FULL:
        too_much = room.used - room.total * (NEARLY_FULL - 1) // 100
        status = "FAIL" if used >= FULL else "WARN"
        step = _to_free(path, device, too_much, place)
        yield Finding(status, f"{path} is {used} % full.", step)  # type: ignore[arg-type]
    inodes = percent(room.inodes_used, room.inodes)
    if inodes >= NEARLY_FULL:
        status = "FAIL" if inodes >= FULL else "WARN"
        step = f"`du --inodes -xS {path} | sort -n | tail` shows where. Remove what is not needed."
        yield Finding(status, f"{path} has {inodes} % of its inodes in use.", step)  # type: ignore[arg-type]


def _to_free(path: str, device: int, too_much: int, place: Place) -> str:
    """What frees enough, if one of the usual things does."""
    known = (
        (ARCHIVES, 0, "`apt-get clean`."),
        (JOURNAL, JOURNAL_KEPT, f"`journalctl --vacuum-size={JOURNAL_KEPT >> 20}M`."),
    )
    for folder, stays, step in known:
        if size_of(place.path(folder), device) - stays >= too_much:
            return step
    return f"`du -xh --max-depth=3 {path} | sort -h | tail` shows where. Remove what is not needed."


def size_of(folder: Path, device: int) -> int:
    """Bytes that the files of a directory, and of those in it, take on `device`; 0 when it is not there."""
    total = 0
    for count, entry in enumerate(_entries(folder, depth=2)):
        if count >= MAX_ENTRIES:
            break
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if status.st_dev == device:
            total += status.st_blocks * 512
    return total


def _entries(folder: Path, *, depth: int) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry
                if depth > 1 and entry.is_dir(follow_symlinks=False):
                    yield from _entries(Path(entry.path), depth=depth - 1)
    except OSError:
        return


def _data_root(place: Place) -> Path:
    """Where Docker keeps its data, whether or not it is here."""
    try:
        return data_root_of(read_bytes(place.path(str(DAEMON_JSON)), trusted=False).decode(errors="replace"))
    except (HostFileError, ValueError, AttributeError, TypeError):
        return data_root_of("")


# --- clock ---


def max_error() -> int | None:
    """By how many microseconds the kernel thinks its clock may be wrong; None where it may not be asked.

    adjtimex(2) with modes 0 changes nothing. struct timex begins modes, offset, freq, maxerror: one machine
    word each, the first one padded.
    """
    timex = (ctypes.c_long * 64)()
    libc = ctypes.CDLL(None, use_errno=True)
    return int(timex[3]) if libc.adjtimex(ctypes.byref(timex)) >= 0 else None


def clock(
    declared: Mapping[str, Any],
    *,
    place: Place = HERE,
    error: Callable[[], int | None] = max_error,
) -> list[Finding]:
    """The clock is set by somebody, and it is not before what was written down by it."""
    ahead = _ahead(place)
    contained = is_container(place)
    with keeping([_jumped(ahead, place, right=contained)] if ahead > AHEAD_S else []):
        synchronised = None if contained else _synchronised(place, error)
    found = []
    if ahead > AHEAD_S:
        found.append(_jumped(ahead, place, right=contained or synchronised is True))
    elif synchronised is False:
        reason = "Nobody sets the clock (it is not synchronised)."
        found.append(Finding("WARN", reason, f"{_to_set(place)}; it takes a minute."))
    if found:
        return found
    if contained:
        return [Finding("SKIP", "A container has the clock of the machine it runs on.")]
    return [Finding("PASS", "The clock is synchronised.")]


def _jumped(ahead: float, place: Place, *, right: bool) -> Finding:
    when = f"of a time {_long(ahead)} from now"
    first = "" if right else f"{_to_set(place)}. Wait until the clock is right. Then "
    reason = f"The last result of the doctor is {when}: the clock is wrong, or was."
    return Finding("FAIL", reason, f"{first}{LOOK_AGAIN}.")


def is_container(place: Place) -> bool:
    """Whether systemd was started in a container (systemd.io/CONTAINER_INTERFACE)."""
    return place.path("/run/systemd/container").exists()


def _ahead(place: Place) -> float:
    """Seconds by which the last result is later than now; 0 where there is none that says when."""
    try:
        at = datetime.fromisoformat(str(read_json(place.path(LATEST)).get("at")))
    except (HostFileError, ValueError):
        return 0.0
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - place.wall()


def _synchronised(place: Place, error: Callable[[], int | None]) -> bool:
    found = error()
    if found is not None:
        return found < MAX_ERROR_US
    # A hardened unit may not even read it (systemd.exec(5): adjtimex is in @clock). systemd-timedated may.
    done = place.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if done.code != 0 or done.out.strip() not in ("yes", "no"):
        raise HostProgramError(f"timedatectl: {done.complaint}")
    return done.out.strip() == "yes"


def _to_set(place: Place) -> str:
    for program, unit in (
        ("/usr/sbin/chronyd", "chrony.service"),
        ("/usr/sbin/ntpd", "ntpsec.service"),
        ("/usr/lib/systemd/systemd-timesyncd", "systemd-timesyncd.service"),
    ):
        if place.path(program).exists():
            return f"`systemctl enable {unit}` and `systemctl restart {unit}`"
    return "`apt-get install -y systemd-timesyncd`"


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} min"


# --- reboot ---


def reboot(declared: Mapping[str, Any], *, place: Place = HERE) -> list[Finding]:
    """No package waits for a reboot (/run/reboot-required, as unattended-upgrades and others leave it), and
    the kernel that runs is as old as the boot. FAIL when it has waited for two weeks."""
    since, what = _due_since(place)
    if since is None:
        return [Finding("PASS", "No reboot is due.")]
    waited = place.wall() - since
    overdue = waited >= REBOOT_OVERDUE_S
    days = f" since {int(waited // DAY_S)} days" if waited >= 2 * DAY_S else ""
    return [Finding("FAIL" if overdue else "WARN", f"A reboot is due{days}{what}.", "`systemctl reboot`.")]


def _due_since(place: Place) -> tuple[float | None, str]:
    """Since when (seconds since the epoch), and for what."""
    try:
        since = place.path(REBOOT_DUE).lstat().st_mtime
    except OSError:
        return _kernel_since(place)
    try:
        text = read_bytes(place.path(f"{REBOOT_DUE}.pkgs")).decode(errors="replace")
    except HostFileMissingError:
        text = ""
    names = [printable(name, limit=60) for name in dict.fromkeys(text.split())]
    more = " and others" if len(names) > 5 else ""
    return since, f", for {', '.join(names[:5])}{more}" if names else ""


def _kernel_since(place: Place) -> tuple[float | None, str]:
    """A kernel that was installed since the boot: Debian leaves no mark of it by itself."""
    if is_container(place):
        return None, ""
    booted = re.search(r"^btime (\d+)$", _text(place.path("/proc/stat")), re.MULTILINE)
    if booted is None:
        raise HostProgramError("/proc/stat does not tell when this host booted.")
    newer: list[tuple[float, str]] = []
    for file in place.path("/boot").glob("vmlinuz-*"):
        # Of a file of a package only the inode's time tells when it came here.
        changed = file.lstat().st_ctime
        if changed > int(booted[1]):
            newer.append((changed, file.name))
    if not newer:
        return None, ""
    since, name = min(newer)
    return since, f", for {printable(name, limit=80)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise HostProgramError(f"{path} cannot be read: {error.strerror}.") from error


CHECKS = (Check("disk", disk), Check("clock", clock), Check("reboot", reboot))
