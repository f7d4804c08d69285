"""`quietport sshd-apply`: make sshd's new state active as a whole, or leave the old one.

Reads a plan (JSON, see `Plan`) on standard input. Everything that can be checked is checked on a candidate
before anything is active; what can only be seen afterwards (who listens where) is read from the kernel. When
a step fails, files, masks and enablement are put back, sshd is restarted, and the exit code is 1.

The work is done by a child in a session of its own: it finishes, or undoes, also when the SSH connection that
started it is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pwd
import shlex
import shutil
import stat
import subprocess
import sys
import syslog
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from quietport import lasting, sshd

SSHD = "/usr/sbin/sshd"
LISTEN_TIMEOUT_S = 15
OTHER_RUN_TIMEOUT_S = 60  # an sshd-apply whose controller was killed ends within seconds, by itself
LOCK = "/run/quietport-sshd-apply.lock"
COMMAND_TIMEOUT_S = 90  # `systemctl restart` waits for sshd-wait, which waits 60 s at most
MAX_PLAN_BYTES = 1 << 22
# Seen from the tailnet and from a public address (both from the documentation ranges).
SEEN_FROM = ("100.64.0.1", "fd7a:115c:a1e0::1", "198.51.100.7", "2001:db8::7")
_UNIT_FOLDER = "/etc/systemd/system/ssh.service.d"
_NO_LOGIN = ("nologin", "false", "sync", "halt", "shutdown")


class Failed(Exception):
    """A step failed: what it was, and what to do."""


@dataclass(frozen=True)
class Plan:
    """What is wanted. JSON with the same keys and `"schema": 1`.

    `files`: path = {"old_sha256": hex or null, "text": text or null}; null stands for "no such file".
    `mask`: socket units; `listeners`: [address, port] pairs, all and only these; `users`: checked besides
    everyone who has a login shell. The first of them is the operator, whose key must be taken.
    """

    files: dict[str, tuple[str | None, str | None]]
    mask: tuple[str, ...]
    listeners: frozenset[sshd.Listener]
    users: tuple[str, ...]


def parse_plan(data: bytes) -> Plan:
    """Raises Failed when the plan is not one, or names a file that is none of sshd's."""
    try:
        raw = json.loads(data)
        if raw["schema"] != 1:
            raise Failed("the plan has another schema; use the quietport that fits this host's programs")
        files = {
            path: (_text_or_none(entry["old_sha256"]), _text_or_none(entry["text"]))
            for path, entry in raw["files"].items()
        }
        plan = Plan(
            files=files,
            mask=tuple(str(unit) for unit in raw["mask"]),
            listeners=frozenset((str(address), int(port)) for address, port in raw["listeners"]),
            users=tuple(str(user) for user in raw["users"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failed(f"the plan cannot be read ({error!r}); nothing was touched") from error
    for path in plan.files:
        if not _is_ours_to_write(path):
            raise Failed(f"the plan names {path}, which is no file of sshd; nothing was touched")
    if not plan.listeners:
        raise Failed("the plan names no address to listen on: sshd would take every one; nothing was touched")
    return plan


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError("text or null is wanted")
    return value


def _is_ours_to_write(path: str) -> bool:
    if path == sshd.MAIN:
        return True
    parent, _, name = path.rpartition("/")
    return parent in (sshd.FOLDER, _UNIT_FOLDER) and name.endswith(".conf") and not name.startswith(".")


@dataclass(frozen=True)
class Saved:
    """A file as it was: None for no such file."""

    data: bytes | None
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class UnitState:
    """A unit as it was, in systemctl's words."""

    enabled: str
    active: bool


@dataclass
class Before:
    """All that is put back when a step fails."""

    files: dict[str, Saved] = field(default_factory=dict)
    units: dict[str, UnitState] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    listeners: frozenset[sshd.Listener] = frozenset()


Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, output captured; never raises for its exit code."""
    try:
        return subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(argv), 124, "", f"no end within {COMMAND_TIMEOUT_S} s")
    except OSError as error:
        return subprocess.CompletedProcess(list(argv), 127, "", str(error))


class Host:
    """The host's files, units and sockets. `root` is "/" but in tests."""

    def __init__(self, *, root: Path = Path("/"), run: Run = run) -> None:
        self.root = root
        self.run = run

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> Saved:
        """Raises Failed when there is something that is no regular file."""
        file = self.path(path)
        try:
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return Saved(data=None)
        except OSError as error:
            why = "a link is not replaced" if error.errno == errno.ELOOP else error.strerror
            raise Failed(f"cannot read {path}: {why}") from error
        with os.fdopen(fd, "rb") as stream:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Failed(f"{path} is not a regular file")
            return Saved(stream.read(MAX_PLAN_BYTES), status.st_mode & 0o7777, status.st_uid, status.st_gid)

    def texts(self) -> dict[str, str]:
        """sshd's files that we could have written into, or may: no links, and nothing that is not UTF-8.

        Raises Failed for one that cannot be read.
        """
        folder = sorted(self.path(sshd.FOLDER).glob("*.conf"))
        names = [path.name for path in folder if path.is_file() and not path.is_symlink()]
        found: dict[str, str] = {}
        for path in (sshd.MAIN, *(f"{sshd.FOLDER}/{name}" for name in names)):
            data = self.read(path).data
            with suppress(UnicodeDecodeError):
                if data is not None:
                    found[path] = data.decode()
        return found

    def write(self, path: str, saved: Saved) -> None:
        """Put the file there in one step, or take it away."""
        self.place(path, self.stage(path, saved))

    def place(self, path: str, staged: Path | None) -> None:
        """Rename what `stage` made to `path`; None takes the file away. Needs no room on the disk."""
        if staged is None:
            self.path(path).unlink(missing_ok=True)
        else:
            staged.replace(self.path(path))

    def stage(self, path: str, saved: Saved) -> Path | None:
        """A hidden file near `path` that is as it will be; None stands for no such file."""
        file = self.path(path)
        if saved.data is None:
            return None
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Never in sshd's folder: its time tells an sshd that began before its files were as they are, and
        # what is discarded after the restart would change it once more.
        near = file.parent.parent if path.startswith(f"{sshd.FOLDER}/") else file.parent
        fd, temp = tempfile.mkstemp(prefix=".quietport.", dir=near)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(saved.data)
                made = os.fstat(fd)
                # Not even asked for in vain: the follower's unit may not chown.
                if os.geteuid() == 0 and (made.st_uid, made.st_gid) != (saved.uid, saved.gid):
                    os.fchown(fd, saved.uid, saved.gid)
                os.fchmod(fd, saved.mode)
                stream.flush()
                os.fsync(fd)
            return Path(temp)
        except BaseException:
            Path(temp).unlink(missing_ok=True)
            raise

    def systemctl(self, *args: str) -> None:
        """Raises Failed with what systemctl said."""
        done = self.run(["systemctl", *args])
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            raise Failed(f"systemctl {' '.join(args)}: {said or f'exit code {done.returncode}'}")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        done = self.run(["systemctl", "show", unit, f"--property={','.join(properties)}"])
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def unit(self, unit: str) -> UnitState:
        if "@." in unit:  # `systemctl show` knows instances only
            return UnitState(enabled=self.run(["systemctl", "is-enabled", unit]).stdout.strip(), active=False)
        shown = self.show(unit, "UnitFileState", "ActiveState", "LoadState")
        enabled = "masked" if shown.get("LoadState") == "masked" else shown.get("UnitFileState", "")
        return UnitState(enabled, active=shown.get("ActiveState") in ("active", "activating", "reloading"))

    def sockets(self) -> list[str]:
        """Socket units of sshd that are loaded or installed, instances of templates included."""
        found = set()
        for command in ("list-units", "list-unit-files"):
            done = self.run(["systemctl", command, "--all", "--plain", "--no-legend", "ssh*.socket"])
            found |= {line.split()[0] for line in done.stdout.splitlines() if line.split()}
        return sorted(name for name in found if name.startswith(("ssh.", "sshd.", "ssh@", "sshd@", "sshd-")))

    def listeners(self, pids: Sequence[int]) -> frozenset[sshd.Listener]:
        """What these processes listen on, by TCP, as the kernel says."""
        sockets: dict[int, sshd.Listener] = {}
        for name in ("tcp", "tcp6"):
            with suppress(OSError):
                sockets |= sshd.parse_proc_net(self.path(f"/proc/net/{name}").read_text())
        inodes = {inode for pid in pids for inode in self._inodes(pid)}
        return frozenset(listener for inode, listener in sockets.items() if inode in inodes)

    def _inodes(self, pid: int) -> Iterator[int]:
        with suppress(OSError):
            for entry in self.path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError, ValueError):
                    kind, _, inode = str(entry.readlink()).partition(":[")
                    if kind == "socket":
                        yield int(inode.rstrip("]"))

    def ssh_listeners(self) -> frozenset[sshd.Listener]:
        """Where sshd listens, or systemd in its place while one of its sockets is active."""
        pids = [int(self.show(sshd.UNIT, "MainPID").get("MainPID", "0") or 0)]
        if any(self.unit(unit).active for unit in {*sshd.SOCKETS, *self.sockets()}):
            pids.append(1)
        return self.listeners([pid for pid in pids if pid > 0])

    def sshd(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run sshd for its opinion. It wants /run/sshd, which goes away while ssh.service is stopped."""
        self.path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        return self.run([SSHD, *args, *self.options()])

    def options(self) -> list[str]:
        """SSHD_OPTS of /etc/default/ssh: what is there wins over every file."""
        with suppress(OSError, ValueError):
            for line in self.path("/etc/default/ssh").read_text().splitlines():
                name, _, value = line.strip().partition("=")
                if name == "SSHD_OPTS":
                    return shlex.split(" ".join(shlex.split(value)))
        return []


def login_users(passwd: Sequence[pwd.struct_passwd] | None = None) -> list[str]:
    """Everyone whose shell lets them log in."""
    entries = pwd.getpwall() if passwd is None else passwd
    return [entry.pw_name for entry in entries if Path(entry.pw_shell or "/bin/sh").name not in _NO_LOGIN]


@contextmanager
def candidate(host: Host, changes: Mapping[str, str | None]) -> Iterator[Path]:
    """The configuration as it will be with `changes` (path = text, None: no such file), to ask sshd about.

    Yields its main file, in a private directory, with Include lines that stay inside it.
    """
    host.path("/run").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="quietport-sshd.", dir=host.path("/run")))
    try:
        parts = folder / "sshd_config.d"
        parts.mkdir(mode=0o700)
        texts: dict[str, str] = {}
        with suppress(FileNotFoundError):
            for file in sorted(host.path(sshd.FOLDER).glob("*.conf")):
                texts[f"{sshd.FOLDER}/{file.name}"] = file.read_text(errors="surrogateescape")
        with suppress(FileNotFoundError):
            texts[sshd.MAIN] = host.path(sshd.MAIN).read_text(errors="surrogateescape")
        for path, text in changes.items():
            if text is None:
                texts.pop(path, None)
            elif not path.startswith(_UNIT_FOLDER):
                texts[path] = text
        for path, text in texts.items():
            place = folder / "sshd_config" if path == sshd.MAIN else parts / Path(path).name
            place.write_text(sshd.redirect_includes(text, str(parts)), errors="surrogateescape")
        yield folder / "sshd_config"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Apply:
    """One plan on one host."""

    # A power cut between two files must leave a host that answers on the tailnet after its boot: the unit's
    # drop-in, which refuses to start a public sshd, comes when no public line is left.
    ORDER: ClassVar[Mapping[str, int]] = {sshd.DROP_IN: 1, sshd.UNIT_DROP_IN: 2}
    HOW = ", to keys alone"

    def __init__(self, plan: Plan, host: Host, *, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.host = host
        self.say = say
        self.before = Before()
        self.touched = False
        self.restarted = False
        # Whether sshd listened where it is wanted (and perhaps elsewhere too) with the new files.
        self.answered = False
        # The files as they were, beside their places: on a full disk a rename still puts them back.
        self.spare: dict[str, Path | None] = {}

    def __call__(self) -> bool:
        """True when the wanted state is there. False: the old one is, and `say` told why."""
        doing = ""
        try:
            for name, action in self._steps():
                doing = name
                action()
        except (Failed, OSError) as error:
            self.say(f"sshd: {doing} failed: {error}")
            self._undo()
            return False
        finally:
            _discard(self.spare)
        where = ", ".join(sorted(map(sshd.endpoint, self.plan.listeners)))
        self.say(f"sshd answers on {where}{self.HOW}")
        return True

    def _steps(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return (
            ("reading the old state", self._remember),
            ("comparing with the plan", self._verify_unchanged),
            ("checking the candidate", self._check_candidate),
            ("writing the files", self._swap),
            ("masking the sockets", self._mask),
            ("restarting sshd", self._restart),
            ("waiting for the listeners", self._wait_for_listeners),
            ("reading the policy back", lambda: self._check_policy("sshd")),
        )

    def _remember(self) -> None:
        for path in self.plan.files:
            self.before.files[path] = self.host.read(path)
        for unit in (sshd.UNIT, *self._sockets()):
            self.before.units[unit] = self.host.unit(unit)
        for link in sshd.SOCKET_LINKS:
            with suppress(OSError):
                self.before.links[link] = str(self.host.path(link).readlink())
        self.before.listeners = self.host.ssh_listeners()

    def _sockets(self) -> list[str]:
        return sorted({*self.plan.mask, *self.host.sockets()})

    def _verify_unchanged(self) -> None:
        for path, (old, wanted) in self.plan.files.items():
            data = self.before.files[path].data
            now = None if data is None else hashlib.sha256(data).hexdigest()
            # As wanted already: an sshd-apply that outlived its controller was waited for, and wrote it.
            is_wanted = data == (None if wanted is None else wanted.encode())
            if now != old and not is_wanted:
                raise Failed(f"{path} is not what it was when this was planned (or is not UTF-8). Run again")

    def _check_candidate(self) -> None:
        with candidate(self.host, {path: text for path, (_, text) in self.plan.files.items()}) as main:
            done = self.host.sshd("-t", "-f", str(main))
            if done.returncode != 0:
                # The candidate is a copy: the reader has to look at the file it is a copy of.
                said = _one_line(done.stderr).replace(str(main.parent), "/etc/ssh")
                raise Failed(f"sshd refuses the candidate: {said}")
            done = self.host.sshd("-T", "-f", str(main), *self._seen("root", SEEN_FROM[0]))
            told = sshd.effective_listeners(sshd.parse_effective(done.stdout))
            wanted = set(map(sshd.endpoint, self.plan.listeners))
            if told != wanted:
                raise Failed(
                    f"with the candidate sshd would listen on {', '.join(sorted(told)) or 'nothing'},"
                    f" not on {', '.join(sorted(wanted))}. Look for an Include of a file elsewhere, and at"
                    " SSHD_OPTS in /etc/default/ssh"
                )
            self._check_policy("the candidate", "-f", str(main))

    def _seen(self, user: str, source: str) -> tuple[str, str]:
        same_family = [address for address, _ in self.plan.listeners if (":" in address) == (":" in source)]
        local = min(same_family, default=source)
        return "-C", f"user={user},host=client.invalid,addr={source},laddr={local},lport={sshd.PORT}"

    def _check_policy(self, what: str, *options: str) -> None:
        for user in dict.fromkeys((*self.plan.users, *login_users())):
            for source in SEEN_FROM:
                done = self.host.sshd("-T", *options, *self._seen(user, source))
                if done.returncode != 0:
                    raise Failed(f"{what} says nothing about {user}: {_one_line(done.stderr)}")
                # A Match block may keep the keys of others out: that lets nobody in.
                judge = sshd.not_keys_only if user in self.plan.users[:1] else sshd.in_without_key
                wrong = judge(sshd.parse_effective(done.stdout))
                if wrong:
                    raise Failed(f"{what}, for {user} from {source}: {'; '.join(wrong)}")

    def _swap(self) -> None:
        staged: dict[str, Path | None] = {}
        try:
            # All that needs room on the disk, for the way there and the way back, before the first change.
            for path in sorted(self.plan.files, key=lambda path: self.ORDER.get(path, 0)):
                text = self.plan.files[path][1]
                data = None if text is None else text.encode()
                # Ours have one mode and owner on every host. A file of others keeps its own.
                saved = Saved(data) if path in self.ORDER else replace(self.before.files[path], data=data)
                staged[path] = self.host.stage(path, saved)
                if path not in self.spare:
                    self.spare[path] = self.host.stage(path, self.before.files[path])
            self.touched = True
            for path in list(staged):
                self.host.place(path, staged.pop(path))
        finally:
            _discard(staged)

    def _put_back(self, path: str) -> None:
        if path in self.spare:
            self.host.place(path, self.spare.pop(path))
        else:
            self.host.write(path, self.before.files[path])

    def _mask(self) -> None:
        masked: list[str] = []
        for unit in self._sockets():
            state = self.before.units.get(unit) or self.host.unit(unit)
            if state.enabled == "masked" and not state.active:
                continue
            if state.active:
                self.host.systemctl("stop", unit)
            if state.enabled.startswith("enabled"):
                self.host.systemctl("disable", unit)
            if self.host.path(f"/etc/systemd/system/{unit}").is_file() and state.enabled != "masked":
                # An administrator's own unit file: masking would mean removing it. Disabled, it stays down.
                self.say(f"sshd: {unit} has a file of its own in /etc/systemd/system: disabled, not masked")
                continue
            masked.append(unit)
        if masked:
            # All at once: systemd reads every unit file anew after each `systemctl mask`.
            self.host.systemctl("mask", *masked)
        for link in self.before.links:
            self.host.path(link).unlink(missing_ok=True)

    def _restart(self) -> None:
        self.host.systemctl("daemon-reload")
        if self.before.units[sshd.UNIT].enabled == "masked":
            self.host.systemctl("unmask", sshd.UNIT)
        self.host.systemctl("enable", sshd.UNIT)
        self.restarted = True
        # Restart, not reload: sessions live on (KillMode=process), and no old socket is carried over.
        self.host.systemctl("restart", sshd.UNIT)

    def _wait_for_listeners(self) -> None:
        seen = self._wait(self.plan.listeners)
        self.answered = self.plan.listeners <= seen
        if seen != self.plan.listeners:
            raise Failed(
                f"after {LISTEN_TIMEOUT_S} s sshd listens on {_endpoints(seen)},"
                f" not on {_endpoints(self.plan.listeners)}"
            )

    def _wait(self, wanted: frozenset[sshd.Listener]) -> frozenset[sshd.Listener]:
        deadline = time.monotonic() + LISTEN_TIMEOUT_S
        while (seen := self.host.ssh_listeners()) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return seen

    def _undo(self) -> None:
        if not self.touched:
            self.say("sshd: nothing was changed")
            return
        problems: list[str] = []
        for path in self.before.files:
            self._try(problems, lambda path=path: self._put_back(path))  # type: ignore[misc]
        for unit, state in self.before.units.items():
            if unit != sshd.UNIT:
                self._try(problems, lambda unit=unit, state=state: self._unmask(unit, state))  # type: ignore[misc]
        for link, target in self.before.links.items():
            self._try(problems, lambda link=link, target=target: self._relink(link, target))  # type: ignore[misc]
        self._try(problems, lambda: self.host.systemctl("daemon-reload"))
        self._restore_service(problems)
        seen = self._wait(self.before.listeners)
        outcome = "the old state is back"
        # The sshd that ran may have been older than the files beside it, which need not start one at all.
        for what, prepare in self._last_resorts():
            if self._reachable(seen):
                break
            self.say(f"sshd: it does not answer as before; trying {what}")
            outcome = f"it runs with {what}"
            seen = self._start_anew(prepare, problems)
        for problem in problems:
            self.say(f"sshd: while undoing: {problem}")
        now = f"it listens on {_endpoints(seen)}"
        both = f"{now}, before it was on {_endpoints(self.before.listeners)}"
        if _answers(self.before.listeners, seen):
            self.say(f"sshd: {outcome}; {now}")
        elif self._reachable(seen):
            self.say(f"sshd: {outcome}; {both}. The tailnet reaches it. See `journalctl -u ssh`")
        else:
            self.say(f"sshd: NOBODY REACHES IT NOW: {both}. Keep a session open; see `journalctl -u ssh`")

    def _reachable(self, seen: frozenset[sshd.Listener]) -> bool:
        """Whether the operator gets in: as before, or at least over the tailnet, whence this run comes."""
        return _answers(self.before.listeners, seen) or _answers(self.plan.listeners, seen)

    def _last_resorts(self) -> list[tuple[str, Callable[[], None]]]:
        """States in which sshd may answer when the old one does not start, the likeliest first."""
        # The unit's drop-in refuses to start a public sshd, and the old files may describe just that.
        without = ("the old files without the unit's drop-in", self._old_files_alone)
        new = ("the new files", self._swap)
        return [new, without] if self.answered else [without, new]

    def _old_files_alone(self) -> None:
        self.host.write(sshd.UNIT_DROP_IN, Saved(None))
        for path, saved in self.before.files.items():
            if path != sshd.UNIT_DROP_IN and self.host.read(path) != saved:
                self.host.write(path, saved)

    def _start_anew(self, prepare: Callable[[], None], problems: list[str]) -> frozenset[sshd.Listener]:
        self._try(problems, prepare)
        for command in (("daemon-reload",), ("reset-failed", sshd.UNIT), ("restart", sshd.UNIT)):
            self._try(problems, lambda command=command: self.host.systemctl(*command))  # type: ignore[misc]
        return self._wait(self.before.listeners)

    def _try(self, problems: list[str], action: Callable[[], None]) -> None:
        try:
            action()
        except (Failed, OSError) as error:
            problems.append(str(error))

    def _unmask(self, unit: str, state: UnitState) -> None:
        if state.enabled != "masked" and self.host.unit(unit).enabled == "masked":
            self.host.systemctl("unmask", unit)
        if state.enabled.startswith("enabled"):
            self.host.systemctl("enable", unit)

    def _relink(self, link: str, target: str) -> None:
        file = self.host.path(link)
        if not file.is_symlink():
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            file.symlink_to(target)

    def _restore_service(self, problems: list[str]) -> None:
        """Enablement and activity of ssh.service and its sockets as they were."""
        service = self.before.units[sshd.UNIT]
        sockets = [unit for unit, state in self.before.units.items() if unit != sshd.UNIT and state.active]
        # The generated ones (vsock, unix) stand beside the service; the others hold its port in its place.
        if any(not unit.startswith("sshd-") for unit in sockets):
            # The service comes back with the next connection.
            self._try(problems, lambda: self.host.systemctl("stop", sshd.UNIT))
        for unit in sockets:
            self._try(problems, lambda unit=unit: self.host.systemctl("start", unit))  # type: ignore[misc]
        if self.restarted and all(unit.startswith("sshd-") for unit in sockets):
            # Not restarted: the process of before still runs with its sockets, and could only lose them.
            verb = "restart" if service.active else "stop"
            self._try(problems, lambda: self.host.systemctl(verb, sshd.UNIT))
        if service.enabled == "disabled":
            self._try(problems, lambda: self.host.systemctl("disable", sshd.UNIT))
        elif service.enabled == "masked":
            self._try(problems, lambda: self.host.systemctl("mask", sshd.UNIT))


def _discard(staged: dict[str, Path | None]) -> None:
    """Remove staged files that found no use."""
    for file in staged.values():
        if file is not None:
            file.unlink(missing_ok=True)


def _answers(before: frozenset[sshd.Listener], seen: frozenset[sshd.Listener]) -> bool:
    """Whether everyone who reached sshd before reaches it now: by the same address, or by the wildcard."""
    return all(
        listener in seen or ("::" if ":" in listener[0] else "0.0.0.0", listener[1]) in seen  # noqa: S104
        for listener in before
    )


def _endpoints(listeners: frozenset[sshd.Listener]) -> str:
    return ", ".join(sorted(map(sshd.endpoint, listeners))) or "nothing"


def _one_line(text: str) -> str:
    clean = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(clean.split())[:500] or "it said nothing"


@contextmanager
def only_one(path: str = LOCK, *, timeout: float = OTHER_RUN_TIMEOUT_S) -> Iterator[None]:
    """Wait until no other run is at it. Raises Failed when one still is after `timeout` seconds."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    said = f"another sshd-apply still runs after {timeout:g} s; wait for it, and run again"
                    raise Failed(said) from error
            time.sleep(0.2)
        yield
    finally:
        os.close(fd)


def _work(data: bytes, say: Callable[[str], None]) -> int:
    try:
        plan = parse_plan(data)
        with only_one():
            return 0 if Apply(plan, Host(), say=say)() else 1
    except Failed as error:
        say(f"sshd: {error}")
        return 1


def _say(line: str) -> None:
    """To the journal, and to whoever still listens."""
    syslog.syslog(syslog.LOG_NOTICE, line)
    with suppress(OSError):
        os.write(1, f"{line}\n".encode(errors="replace"))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 refused or undone (the output says which step and why), 2 usage."""
    if argv:
        asked = list(argv) in (["--help"], ["-h"])
        text = f"usage: quietport sshd-apply <PLAN.json\n\n{__doc__}"
        print(text, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if os.geteuid() != 0:
        print("quietport sshd-apply: only root can do this.", file=sys.stderr)
        return 2
    data = sys.stdin.buffer.read(MAX_PLAN_BYTES + 1)
    if len(data) > MAX_PLAN_BYTES:
        print(f"sshd: the plan is larger than {MAX_PLAN_BYTES} bytes; nothing was touched")
        return 1
    return to_the_end(lambda say: _work(data, say))


def to_the_end(work: Callable[[Callable[[str], None]], int]) -> int:
    """Run `work` in a session of its own, so that it ends whatever becomes of ours; returns its exit code.

    It is given what says a line, to the journal and to whoever still listens.
    """

    def told() -> int:
        syslog.openlog("quietport")
        return work(_say)

    return lasting.to_the_end(told, crashed=lambda said: _say(f"sshd: {said}"))
