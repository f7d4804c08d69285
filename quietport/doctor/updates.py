"""Security updates that wait, and the names that this host must be able to look up. Both are slow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quietport.doctor.model import Check, Finding, keeping
from quietport.doctor.place import LATEST, LOOK_AGAIN, PATIENT, Place, by_converge
from quietport.errors import HostProgramError, printable
from quietport.hostfile import HostFileError, read_json
from quietport.net import parse_address

NAME = "updates"
# Nothing is locked or fetched; apt works with the lists it has (apt-get(8), --simulate).
SIMULATE = ("apt-get", "-s", "-q", "-o", "Debug::NoLocking=true", "dist-upgrade")
SIMULATE_S = 120.0
# What apt-get leaves as it is has no Inst line; this tells of it too from which archive it would come.
UPGRADABLE = ("apt", "-q", "list", "--upgradable")
UPGRADABLE_S = 45.0
DAY_S = 86400
LATE_S = 3 * DAY_S
LISTS = "/var/lib/apt/lists"
# Touched when a list was fetched: by apt.systemd.daily, and by update-notifier where that is installed.
STAMPS = ("/var/lib/apt/periodic/update-stamp", "/var/lib/apt/periodic/update-success-stamp")
PERIODIC = "/etc/apt/apt.conf.d/52quietport"
UNATTENDED = "/usr/bin/unattended-upgrade"
SHOWN = 5

LOOKUP_S = 5.0

_INSTALL = re.compile(r"Inst (?P<name>\S+) (?:\[[^\]]*\] )?\((?P<version>\S+) (?P<origins>[^()]*)\)")
# Debian's label, and the archives of Debian and Ubuntu (bookworm-security, noble-security).
_SECURITY = re.compile(r"(^|, )(Debian-Security:|[^,]*/\S*-security\b)")
_SUMMARY = re.compile(
    r"^\d+ upgraded, \d+ newly installed, \d+ to remove and (?P<left>\d+) not upgraded", re.MULTILINE
)
_ARCHIVE = re.compile(r"-security(,|$)")
_UPGRADABLE = re.compile(r"^(?P<name>[^\s/]+)/(?P<archives>\S+) \S+ \S+ \[upgradable from: ", re.MULTILINE)
_SINCE = re.compile(r"pending since (\S+?)[,:;.]?(?= |$)")


def updates(declared: Mapping[str, Any], *, place: Place = PATIENT) -> list[Finding]:
    """No security update waits, by package lists that are of these days.

    Since when one waits is read from what the timer found last: a check keeps nothing itself.
    """
    found = [*_lists(place)]
    with keeping(found):
        done = place.run(SIMULATE, timeout=SIMULATE_S)
        if done.code != 0:
            raise HostProgramError(f"apt-get cannot tell what it would upgrade: {printable(done.complaint)}")
        waiting = parse_simulation(done.out)
        if waiting:
            found.append(_waiting(waiting, place))
        held = _held_back(place, waiting) if leaves_some(done.out) else []
        if held:
            found.append(_held(held))
    return found or [Finding("PASS", "No security update waits.")]


def parse_simulation(text: str) -> list[str]:
    """The packages for which there is a security update, in what SIMULATE prints.

    Raises HostProgramError for text that is not the answer of apt-get.
    """
    if _SUMMARY.search(text) is None:
        raise HostProgramError("apt-get -s dist-upgrade printed what is not understood.")
    names = []
    for line in text.splitlines():
        if not line.startswith("Inst "):
            continue
        match = _INSTALL.match(line)
        if match is None:
            raise HostProgramError("apt-get -s dist-upgrade printed an Inst line that is not understood.")
        if _SECURITY.search(match["origins"]):
            names.append(printable(match["name"], limit=80))
    return names


def leaves_some(text: str) -> bool:
    """Whether SIMULATE leaves packages as they are for which there is something newer.

    It takes everything it can. What is left is on hold, does not fit, or is an update that is rolled out by
    and by: whether one of them is a security update it does not say.
    """
    match = _SUMMARY.search(text)
    return match is not None and int(match["left"]) > 0


def parse_upgradable(text: str) -> list[str]:
    """The packages for which there is a security update, in what UPGRADABLE prints while there is any update.

    Raises HostProgramError for text that names none at all.
    """
    found = [*_UPGRADABLE.finditer(text)]
    if not found:
        raise HostProgramError("apt list --upgradable printed what is not understood.")
    names = [one["name"] for one in found if _ARCHIVE.search(one["archives"])]
    return [printable(name, limit=80) for name in dict.fromkeys(names)]


def _held_back(place: Place, waiting: Iterable[str]) -> list[str]:
    """The packages whose security update apt-get would not install."""
    done = place.run(UPGRADABLE, timeout=UPGRADABLE_S)
    if done.code != 0:
        raise HostProgramError(f"apt cannot tell what it holds back: {printable(done.complaint)}")
    # apt-get writes `libc6:i386` where apt has a column for the architecture.
    comes = {name.partition(":")[0] for name in waiting}
    return [name for name in parse_upgradable(done.out) if name not in comes]


def _held(names: Sequence[str]) -> Finding:
    step = (
        "`apt-mark showhold` says what is on hold, `apt list --upgradable` what waits: let go of it, or "
        f"upgrade it by its name. Then {LOOK_AGAIN}."
    )
    return Finding("WARN", f"Security updates are held back: {_shown(names)}.", step)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _waiting(names: list[str], place: Place) -> Finding:
    now = place.wall()
    since = _pending_since(place, now)
    late = now - since >= LATE_S
    at = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
    reason = f"Security updates pending since {at}: {_shown(names)}."
    install = "unattended-upgrade" if place.path(UNATTENDED).exists() else "apt-get -y dist-upgrade"
    step = f"`apt-get update`, then `{install}`. Then {LOOK_AGAIN}."
    return Finding("FAIL" if late else "WARN", reason, step)


def _pending_since(place: Place, now: float) -> float:
    """What the last result says; now where it says nothing that can be."""
    try:
        checks = read_json(place.path(LATEST)).get("checks")
    except HostFileError:
        return now
    for entry in checks if isinstance(checks, list) else []:
        if not isinstance(entry, dict) or entry.get("check") != NAME:
            continue
        match = _SINCE.search(str(entry.get("reason")))
        try:
            since = datetime.fromisoformat(match[1]).timestamp() if match else now
        except ValueError:
            continue
        if match and since <= now:
            return since
    return now


def _lists(place: Place) -> Iterable[Finding]:
    now = place.wall()
    periodic = 'Update-Package-Lists "1"' in _text(place.path(PERIODIC))
    fetched = [at for at in _fetched(place, periodic=periodic) if at <= now]
    if fetched and now - max(fetched) < LATE_S:
        return
    age = f"are {int((now - max(fetched)) // DAY_S)} days old" if fetched else "are not there"
    # What apt does daily also writes down that it did; where it is not to do it, there is nothing to start.
    daily = "apt-daily.service"
    update = f"`systemctl start {daily}`; `journalctl -u {daily} -n 20 --no-pager` says how it went"
    step = f"{update if periodic else '`apt-get update`'}. Then {LOOK_AGAIN}."
    yield Finding("FAIL", f"The lists of packages {age}: what is pending is not known.", step)


def _fetched(place: Place, *, periodic: bool) -> Iterable[float]:
    """When something of the lists was fetched (seconds since the epoch)."""
    lists = place.path(LISTS)
    # A list that has not changed on the server keeps its time. `partial` is touched by a try that failed too.
    others = [] if periodic else [lists / "partial"]
    for path in (*map(place.path, STAMPS), lists, *lists.glob("*Release"), *others):
        try:
            yield path.stat().st_mtime
        except OSError:
            continue


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def dns(declared: Mapping[str, Any], *, place: Place = PATIENT) -> list[Finding]:
    """The name of the login server can be looked up: without it a host whose addresses change is lost."""
    server = declared.get("login_server")
    try:
        name = urlsplit(str(server)).hostname if server else None
    except ValueError:
        name = None
    if not name:
        return [Finding("SKIP", "No login server is declared.")]
    try:
        parse_address(name)
    except ValueError:
        return [_looked_up(name, declared, place)]
    return [Finding("PASS", "The login server is named by its address: nothing to look up.")]


def _looked_up(name: str, declared: Mapping[str, Any], place: Place) -> Finding:
    shown = printable(name, limit=253)
    try:
        done = place.run(["getent", "ahosts", "--", name], timeout=LOOKUP_S)
        why = "" if done.code == 0 and done.out.strip() else "is not found"
    except HostProgramError:
        why = f"is not found within {LOOKUP_S:g} s"
    if not why:
        return Finding("PASS", f"{shown} is found.")
    return Finding("FAIL", f"{shown}, the login server, {why}.", _resolver(place, declared))


def _resolver(place: Place, declared: Mapping[str, Any]) -> str:
    """Whoever answers for names here is started anew; where that is nobody, the file is to be corrected."""
    text = _text(place.path("/etc/resolv.conf"))
    if re.search(r"^nameserver 127\.0\.0\.5[34]\b", text, re.MULTILINE):
        first = "`systemctl restart systemd-resolved.service`"
    elif re.search(r"^nameserver (100\.100\.100\.100|fd7a:115c:a1e0::53)\b", text, re.MULTILINE):
        first = "`systemctl restart tailscaled.service`"
    else:
        first = "Name a nameserver that answers in /etc/resolv.conf"
    return (
        f"{first}. When other names are found and this one is not, correct login_server in hosts.toml. "
        f"{by_converge(declared)} Then {LOOK_AGAIN}."
    )


CHECKS = (Check(NAME, updates, slow=True), Check("dns", dns, slow=True))
