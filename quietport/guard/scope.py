"""What a snapshot holds: looked at, written down, compared. One table, from which the docs are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quietport import opened, sshd, sshd_follow
from quietport.errors import HostProgramError
from quietport.guard import files, firewall, tailnet
from quietport.guard.files import Entry, Keep
from quietport.guard.firewall import Firewall
from quietport.guard.machine import GuardError, Machine
from quietport.net import TAILNET_INTERFACE, in_tailnet_ranges, parse_address, parse_interfaces
from quietport.unit_names import UNIT_FOLDER

SCHEMA = 1
UFW_UNIT = "ufw.service"
# sshd.service is the alias that Debian's ssh.service has.
LINKED = (sshd.UNIT, "sshd.service", *sshd.SOCKETS, UFW_UNIT)


@dataclass(frozen=True)
class Part:
    """One row of the table. `paths` are files, or directories with all that is in them."""

    what: str
    where: str
    put_back: str
    paths: tuple[str, ...] = ()


_AS_THEY_WERE = "content, owner and mode, links as links; what was not there is removed"
SCOPE = (
    Part(
        "sshd's files",
        "`/etc/ssh/sshd_config`, `/etc/ssh/sshd_config.d`",
        f"{_AS_THEY_WERE}; the `ListenAddress` lines of our drop-in follow the tailnet's addresses of now",
        (sshd.MAIN, sshd.FOLDER),
    ),
    Part(
        "what is added to their units",
        "`ssh.service.d`, `ssh.service.requires`, `sshd.service.requires` and `ufw.service.d` "
        f"in `{UNIT_FOLDER}`",
        _AS_THEY_WERE,
        tuple(
            f"{UNIT_FOLDER}/{name}"
            for name in ("ssh.service.d", "ssh.service.requires", "sshd.service.requires", "ufw.service.d")
        ),
    ),
    Part("ufw's files", "`/etc/ufw`, `/etc/default/ufw`", _AS_THEY_WERE, ("/etc/ufw", "/etc/default/ufw")),
    Part(
        "that it was opened by hand",
        f"`{opened.OPENED}`, `{sshd_follow.PAUSED}`",
        _AS_THEY_WERE,
        (str(opened.OPENED), str(sshd_follow.PAUSED)),
    ),
    Part(
        "masks and enablement",
        f"{', '.join(f'`{name}`' for name in LINKED)}: in `{UNIT_FOLDER}` and its `.wants` and `.requires`",
        _AS_THEY_WERE,
    ),
    Part(
        "what runs",
        "`ssh.service`, the sockets that can stand in its place, `ufw.service`; where sshd listens",
        "started and stopped; sshd is restarted when it was touched, and its listeners are read back",
    ),
    Part(
        "the live firewall",
        "whether ufw is active; the policies of INPUT, FORWARD and OUTPUT, and the chains of ufw",
        "replaced in one step a family; `ufw enable` or `ufw disable` only when that is what was changed",
    ),
    Part(
        "preferences of tailscale",
        f"`{'`, `'.join(tailnet.PREFERENCES.values())}`",
        "`tailscale set`, when tailscaled answers",
    ),
)


def table() -> str:
    """The scope as a table of Markdown."""
    rows = [f"| {part.what} | {part.where} | {part.put_back} |" for part in SCOPE]
    return "\n".join(["| what | where | put back |", "|---|---|---|", *rows]) + "\n"


@dataclass(frozen=True)
class Unit:
    """A unit in systemctl's words; `active` also while it starts or reloads."""

    load: str = "not-found"
    enabled: str = ""
    active: bool = False


@dataclass(frozen=True)
class Observed:
    """A host, as far as the guard answers for it. `sshd_process` tells a restart or a reload of sshd."""

    files: Mapping[str, Entry] = field(default_factory=dict)
    units: Mapping[str, Unit] = field(default_factory=dict)
    listeners: frozenset[sshd.Listener] = frozenset()
    sshd_process: str = ""
    assigned: frozenset[str] = frozenset()
    tailnet: tuple[str, ...] = ()
    followed: bool = False
    firewall: Firewall = field(default_factory=Firewall)
    preferences: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Schema 1, for a manifest: the keys are the names of the fields."""
        return {
            "schema": SCHEMA,
            "files": {path: entry.to_json() for path, entry in self.files.items()},
            "units": {name: asdict(unit) for name, unit in self.units.items()},
            "listeners": sorted(list(listener) for listener in self.listeners),
            "sshd_process": self.sshd_process,
            "assigned": sorted(self.assigned),
            "tailnet": list(self.tailnet),
            "followed": self.followed,
            "firewall": self.firewall.to_json(),
            "preferences": self.preferences,
        }


def from_json(document: Mapping[str, Any]) -> Observed:
    """What `to_json` made. Raises GuardError when it is something else."""
    try:
        if document["schema"] != SCHEMA:
            raise GuardError(f"this snapshot has schema {document['schema']}, not {SCHEMA}.")
        preferences = document["preferences"]
        return Observed(
            files={str(path): Entry(**entry) for path, entry in document["files"].items()},
            units={str(name): Unit(**unit) for name, unit in document["units"].items()},
            listeners=frozenset((str(address), int(port)) for address, port in document["listeners"]),
            sshd_process=str(document["sshd_process"]),
            assigned=frozenset(map(str, document["assigned"])),
            tailnet=tuple(map(str, document["tailnet"])),
            followed=bool(document["followed"]),
            firewall=firewall.from_json(document["firewall"]),
            preferences=None if preferences is None else dict(preferences),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GuardError(f"this is no snapshot ({error!r}).") from error


def look(machine: Machine, *, keep: Keep | None = None) -> Observed:
    """The host as it is now. `keep` is given the content of every file. Raises GuardError or OSError."""
    units, process, pids = look_at_units(machine)
    assigned, tailnet_addresses = look_at_addresses(machine)
    return Observed(
        files=files.look(machine, dict.fromkeys(_paths(machine)), sense=sense, keep=keep),
        units=units,
        listeners=machine.sshd_host().listeners(pids),
        sshd_process=process,
        assigned=assigned,
        tailnet=tailnet_addresses,
        followed=is_followed(machine),
        firewall=firewall.look(machine),
        preferences=tailnet.look(machine),
    )


def look_at_files(machine: Machine) -> dict[str, Entry]:
    """The files alone, for a boot on which nothing else is there yet. Raises GuardError or OSError."""
    return files.look(machine, dict.fromkeys(_paths(machine)), sense=sense)


def _paths(machine: Machine) -> Iterator[str]:
    for part in SCOPE:
        yield from part.paths
    folder = machine.path(UNIT_FOLDER)
    yield from (f"{UNIT_FOLDER}/{name}" for name in LINKED)
    if not folder.is_dir():
        return
    for place in sorted(folder.iterdir()):
        if place.name.endswith((".wants", ".requires")) and place.is_dir() and not place.is_symlink():
            yield from (f"{UNIT_FOLDER}/{place.name}/{name}" for name in LINKED)


def sense(path: str, data: bytes) -> bytes:
    """What counts of a file: of our drop-in not which of the tailnet's addresses it names."""
    if path != sshd.DROP_IN:
        return data
    text = data.decode("utf-8", "surrogateescape")
    return with_addresses(text, ()).encode("utf-8", "surrogateescape") if _names_tailnet(text) else data


def with_addresses(text: str, addresses: tuple[str, ...]) -> str:
    """Our drop-in `text` with the ListenAddress lines for `addresses`."""
    return sshd.with_addresses(text, addresses)


def _names_tailnet(text: str) -> bool:
    """Whether this is our drop-in with addresses that follow the tailnet; that of break-glass does not."""
    if not text.startswith(sshd.OURS):
        return False
    try:
        addresses = sshd.listen_addresses(text)
    except ValueError:
        return False
    return bool(addresses) and not any(parse_address(one).is_unspecified for one in addresses)


def is_followed(machine: Machine) -> bool:
    """Whether sshd's addresses are those of our drop-in, which follow the tailnet's."""
    try:
        text = files.read(machine.path(sshd.DROP_IN)).decode("utf-8", "surrogateescape")
    except OSError:
        return False
    return _names_tailnet(text)


_PROPERTIES = ("Id", "LoadState", "UnitFileState", "ActiveState", "MainPID", "StateChangeTimestampMonotonic")


def look_at_units(machine: Machine) -> tuple[dict[str, Unit], str, list[int]]:
    """Units by name; what tells one run of sshd from another; the processes that listen for sshd."""
    sockets = {*sshd.SOCKETS, *machine.sshd_host().sockets()}
    names = [sshd.UNIT, UFW_UNIT, *sorted(name for name in sockets if "@." not in name)]
    shown = {block.get("Id", ""): block for block in machine.show(*names, properties=_PROPERTIES)}
    units = {name: _unit(shown.get(name, {})) for name in names}
    service = shown.get(sshd.UNIT, {})
    pid = int(service.get("MainPID") or 0)
    # A reload keeps the process; systemd notes the time of both.
    process = f"{pid} {service.get('StateChangeTimestampMonotonic', '')}" if pid else ""
    in_place = any(unit.active for name, unit in units.items() if name.endswith(".socket"))
    return units, process, [*([pid] if pid else []), *([1] if in_place else [])]


def _unit(shown: Mapping[str, str]) -> Unit:
    return Unit(
        load=shown.get("LoadState", "not-found"),
        enabled=shown.get("UnitFileState", ""),
        active=shown.get("ActiveState") in ("active", "activating", "reloading", "refreshing"),
    )


def look_at_addresses(machine: Machine) -> tuple[frozenset[str], tuple[str, ...]]:
    """All addresses of the host, and those on the tailnet's interface that do not change by themselves."""
    done = machine.run(["ip", "-j", "-d", "addr"])
    if done.code != 0:
        raise GuardError(f"ip addr: {done.complaint}")
    owners = parse_interfaces(done.out).owners
    ours = [address for address, names in owners.items() if TAILNET_INTERFACE in names]
    stay = tuple(sorted(address for address in ours if not parse_address(address).is_link_local))
    return frozenset(owners), stay


def expected_listeners(
    old: Observed, *, assigned: frozenset[str], tailnet: tuple[str, ...]
) -> set[sshd.Listener]:
    """Where sshd must listen to be as in `old`, on a host that has these addresses now."""
    if old.followed:
        return {(address, sshd.PORT) for address in tailnet}
    return {
        (address, port)
        for address, port in old.listeners
        if address in assigned or parse_address(address).is_unspecified or parse_address(address).is_loopback
    }


def compare(old: Observed, new: Observed) -> list[str]:
    """What of `old` is otherwise in `new`, a phrase each. Times, counters, tailnet addresses do not count."""
    found = list(_files_differ(old, new))
    found += _units_differ(old, new)
    found += _listeners_differ(old, new)
    found += firewall.differences(old.firewall, new.firewall)
    if old.preferences is not None and new.preferences is not None:
        found += [
            f"tailscale's {key} is {new.preferences.get(key)}, it was {value}"
            for key, value in old.preferences.items()
            if new.preferences.get(key) != value
        ]
    return found


def _files_differ(old: Observed, new: Observed) -> Iterator[str]:
    for path in sorted({*old.files, *new.files}):
        was, now = old.files.get(path), new.files.get(path)
        if was is None:
            yield f"{path} is there, it was not"
        elif now is None:
            yield f"{path} is gone"
        elif not was.same_as(now):
            yield f"{path} is not as it was"


def _units_differ(old: Observed, new: Observed) -> list[str]:
    found = []
    in_place = any(old.units.get(name, Unit()).active for name in sshd.SERVICE_SOCKETS)
    for name, was in old.units.items():
        now = new.units.get(name, Unit())
        if (was.load == "masked", was.enabled) != (now.load == "masked", now.enabled):
            found.append(f"{name} is {_state(now)}, it was {_state(was)}")
        # With its socket in place the service starts and stops as connections come; ufw.service says nothing
        # of ufw once it has run.
        if was.active != now.active and not (name == sshd.UNIT and in_place) and name != UFW_UNIT:
            words = ("active", "not active")
            found.append(f"{name} is {words[not now.active]}, it was {words[not was.active]}")
    for name, now in new.units.items():
        if name not in old.units and now.active:
            found.append(f"{name} is active, it was not there")
    return found


def _state(unit: Unit) -> str:
    return "masked" if unit.load == "masked" else unit.enabled or unit.load


def _listeners_differ(old: Observed, new: Observed) -> list[str]:
    expected = expected_listeners(old, assigned=new.assigned, tailnet=new.tailnet)
    extra = {listener for listener in new.listeners - expected - old.listeners if not _follows(old, listener)}
    # What follows the tailnet is the follower's to put in order; that nothing of it is there is not.
    missing = expected - new.listeners
    if old.followed and missing != expected:
        missing = set()
    if not extra and not missing:
        return []
    return [f"sshd listens on {_shown(new.listeners)}, not on {_shown(frozenset(expected))}"]


def _follows(old: Observed, listener: sshd.Listener) -> bool:
    address = parse_address(listener[0])
    return old.followed and (address.is_loopback or in_tailnet_ranges(address))


def _shown(listeners: frozenset[sshd.Listener]) -> str:
    return ", ".join(sorted(map(sshd.endpoint, listeners))) or "nothing"


def listeners_shown(listeners: frozenset[sshd.Listener]) -> str:
    """Listeners as a sentence names them."""
    return _shown(listeners)


def addresses_now(machine: Machine) -> tuple[frozenset[str], tuple[str, ...]]:
    """As `look_at_addresses`; nothing known is no address at all: a rollback goes on without."""
    try:
        return look_at_addresses(machine)
    except HostProgramError:
        return frozenset(), ()
