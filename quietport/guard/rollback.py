"""The rollback: the host as it was when the guard was armed, or a clear word that it is not.

Live SSH sessions survive: ssh.service is stopped and restarted with KillMode=process, the firewall lets
established connections pass throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from quietport import sshd
from quietport.errors import HostProgramError
from quietport.guard import arming, files, firewall, holders, scope, state, tailnet
from quietport.guard.files import Entry
from quietport.guard.machine import GuardError, Log, Machine
from quietport.guard.scope import Observed, Unit
from quietport.guard.state import Armed
from quietport.unit_names import UNIT_FOLDER

LISTEN_S = 20.0
SETTLE_S = 1.0
_TRIES = 2
_OF_SSHD = ("/etc/ssh/", f"{UNIT_FOLDER}/ssh")


def roll_back(machine: Machine, token: str | None, *, why: str, log: Log) -> bool | None:
    """Undo guard `token` (None: the one that is armed). True: the old state is there. None: nothing is armed.

    False: something is left to do, which `log` names; the guard stays armed.
    """
    with holders.seized(machine, log.say):
        armed = state.read_armed(machine)
        if armed is None or token not in (None, armed.token):
            return None
        log.say(f"rolling back guard {armed.token} ({why}), armed by {armed.by} since {armed.since}")
        state.drop_ballast(machine)
        problems = _undo(machine, armed, log)
        for problem in problems:
            log.say(f"not as before: {problem}")
        log.say("not everything could be undone; it is tried again" if problems else "the old state is back")
        _remember(machine, armed, why=why, how="incomplete" if problems else "rolled back", log=log)
        if problems:
            return False
        try:
            state.remove_armed(machine)
        except OSError as error:
            log.say(f"it stays armed, {state.ARMED} cannot be removed: {error.strerror}")
            return False
        arming.unschedule(machine, armed.token)
        state.clear(machine)
        return True


def _undo(machine: Machine, armed: Armed, log: Log) -> list[str]:
    try:
        old = arming.load(machine, armed.token)
    except GuardError as error:
        return [str(error)]
    return Undo(machine, armed, old, log).run()


def _remember(machine: Machine, armed: Armed, *, why: str, how: str, log: Log) -> None:
    try:
        state.write_history(machine, entry(armed, why=why, how=how, log=log))
    except GuardError as error:
        log.say(str(error))


def entry(armed: Armed, *, why: str, how: str, log: Log) -> dict[str, object]:
    """What the history keeps of a guard (state.write_history)."""
    return {
        "token": armed.token,
        "number": armed.number,
        "by": armed.by,
        "since": armed.since,
        "timeout_s": armed.timeout_s,
        "ended": state.wall_clock(),
        "how": how,
        "why": why,
        "log": list(log.lines),
    }


def restore_files(machine: Machine, token: str, old: Observed, say: Callable[[str], None]) -> files.Restorer:
    """Put the files of the snapshot back. Raises GuardError or OSError when they cannot even be looked at."""
    _, tailnet_now = scope.addresses_now(machine)

    def adapt(path: str, data: bytes) -> bytes:
        # The address may have changed since, and the follower has written the new one.
        if path != sshd.DROP_IN or not old.followed or not tailnet_now:
            return data
        text = data.decode("utf-8", "surrogateescape")
        return scope.with_addresses(text, tailnet_now).encode("utf-8", "surrogateescape")

    copies = machine.path(state.snapshot_folder(token))
    restorer = files.Restorer(machine, copies, old.files, adapt, say)
    restorer(scope.look_at_files(machine))
    return restorer


def _same(old: Mapping[str, Entry], now: Mapping[str, Entry], path: str) -> bool:
    return path in old and old[path].same_as(now.get(path))


class Undo:
    """One rollback of one guard. Every step looks first; one that fails keeps no other from its work."""

    def __init__(self, machine: Machine, armed: Armed, old: Observed, log: Log) -> None:
        self.machine = machine
        self.armed = armed
        self.old = old
        self.say = log.say
        self.problems: list[str] = []
        self.unseen: list[str] = []
        self.restart_due = machine.path(f"/run/quietport/guard-{armed.token}.restart-sshd")

    def run(self) -> list[str]:
        """Do all of it; what is not as before in the end, a phrase each."""
        walls = firewall.Restorer(self.machine, self.old.firewall, self.say)
        self._try("files", self._files)
        self._try("systemd", lambda: self.machine.systemctl("daemon-reload"))
        self._try("firewall", walls.first)
        self._try("sshd", self._sshd)
        self._try("firewall", walls.last)
        self._try("ufw.service", self._ufw_service)
        self._try("tailscale", self._preferences)
        left = self._compare()
        if left or self.unseen:
            return [*self.problems, *self.unseen, *left]
        # What went wrong on the way, and is as it was in the end all the same.
        for problem in self.problems:
            self.say(f"on the way: {problem}")
        self.restart_due.unlink(missing_ok=True)
        return []

    def _try(self, what: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (HostProgramError, OSError) as error:
            # Which files sshd and systemd have read, no comparison tells.
            kept = self.unseen if what in ("sshd", "systemd") else self.problems
            kept.append(f"{what}: {error}")

    def _files(self) -> None:
        now = scope.look_at_files(self.machine)
        different = [path for path in {*now, *self.old.files} if not _same(self.old.files, now, path)]
        if any(path.startswith(_OF_SSHD) for path in different):
            # Not to be forgotten by the attempt after this one, which finds the files in order.
            self.restart_due.parent.mkdir(mode=0o700, exist_ok=True)
            self.restart_due.touch()
        restorer = restore_files(self.machine, self.armed.token, self.old, self.say)
        self.problems += restorer.problems

    def _sshd(self) -> None:
        now, process, _ = scope.look_at_units(self.machine)
        before = self.old.units
        if before.get(sshd.UNIT, Unit()).load == "not-found":
            return
        wanted = {name for name, unit in before.items() if name.endswith(".socket") and unit.active}
        active = {name for name, unit in now.items() if name.endswith(".socket") and unit.active}
        in_place = wanted & set(sshd.SERVICE_SOCKETS)
        service = now.get(sshd.UNIT, Unit())
        touched = self._is_touched(process) or not wanted >= active
        for name in sorted(active - wanted):
            self._systemctl("stop", name)
        if in_place:
            # It comes back with the next connection. One that runs holds the port, or the new files.
            if service.active and (touched or not in_place <= active):
                self._systemctl("stop", sshd.UNIT)
        elif before[sshd.UNIT].active:
            if touched or not service.active or not self._listens():
                self._restart()
        elif service.active:
            self._systemctl("stop", sshd.UNIT)
        for name in sorted(wanted - active):
            self._systemctl("start", name)
        seen = self._wait()
        for _ in range(_TRIES - 1):
            if self._as_before(seen) or in_place or not before[sshd.UNIT].active:
                break
            self.say("sshd does not listen as before; restarting it once more")
            self._restart()
            seen = self._wait()
        self.say(f"sshd listens on {scope.listeners_shown(seen)}")
        if self.old.followed and not scope.addresses_now(self.machine)[1]:
            self.say("no address of the tailnet is there now: sshd takes it up when it comes")

    def _is_touched(self, process: str) -> bool:
        """Whether sshd may run with other files than the old ones."""
        if self.restart_due.exists():
            return True
        # After a boot it is another process in any case, and one that began with the files of now.
        return self.armed.boot == self.machine.boot() and process != self.old.sshd_process

    def _restart(self) -> None:
        done = self.machine.sshd_host().sshd("-t")
        if done.returncode != 0:
            raise GuardError(
                f"sshd refuses the old files, and is left as it runs: {done.stderr.strip()[-300:]}"
            )
        with suppress(GuardError):
            self.machine.systemctl("reset-failed", sshd.UNIT)
        # Not waited for: where the tailnet's address is not there yet, sshd-wait takes a minute.
        self.machine.systemctl("--no-block", "restart", sshd.UNIT)
        self.say("sshd restarted")

    def _systemctl(self, verb: str, unit: str) -> None:
        try:
            self.machine.systemctl(verb, unit)
            self.say(f"systemctl {verb} {unit}")
        except GuardError as error:
            # Whether it runs, the comparison tells.
            self.problems.append(str(error))

    def _listens(self) -> bool:
        return self._as_before(self._seen())

    def _seen(self) -> frozenset[sshd.Listener]:
        _, _, pids = scope.look_at_units(self.machine)
        return self.machine.sshd_host().listeners(pids)

    def _as_before(self, seen: frozenset[sshd.Listener]) -> bool:
        assigned, tailnet_now = scope.addresses_now(self.machine)
        return scope.expected_listeners(self.old, assigned=assigned, tailnet=tailnet_now) <= seen

    def _wait(self) -> frozenset[sshd.Listener]:
        deadline = self.machine.now() + LISTEN_S
        while not self._as_before(seen := self._seen()) and self.machine.now() < deadline:
            self.machine.sleep(0.2)
        return seen

    def _ufw_service(self) -> None:
        now, _, _ = scope.look_at_units(self.machine)
        before = self.old.units.get(scope.UFW_UNIT, Unit())
        # Never stopped: without our drop-in that would open everything. Started it finds its rules and leaves
        # them, or finds that ufw is not enabled.
        if before.active and not now.get(scope.UFW_UNIT, Unit()).active:
            self._systemctl("start", scope.UFW_UNIT)

    def _preferences(self) -> None:
        done = tailnet.restore(self.machine, self.old.preferences)
        if done:
            self.say(done)

    def _compare(self) -> list[str]:
        for attempt in range(3):
            if attempt:
                self.machine.sleep(SETTLE_S)
            try:
                left = scope.compare(self.old, scope.look(self.machine))
            except (HostProgramError, OSError) as error:
                left = [f"the host cannot be looked at: {error}"]
            if not left:
                break
        return left
