"""Arming a guard, and scheduling what undoes."""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from quietport import guardlock, sshd, sshd_apply
from quietport.errors import HostProgramError, printable
from quietport.guard import files, scope, state
from quietport.guard.machine import GuardError, Machine, to_journal
from quietport.guard.state import Armed
from quietport.unit_names import BOOT_UNIT

MIN_S, DEFAULT_S, MAX_S = 10, 120, 3600
OVER = ("tailnet", "any")
# What a full disk shall still have room for when it comes to a rollback.
BALLAST_BYTES = 1 << 20
# A rollback that fails or is killed is begun again, this often.
ATTEMPTS = 5
_PYTHON = "/usr/bin/python3"
_LOCK_S = 10.0
_MANIFEST = "manifest.json"


def arm(machine: Machine, *, timeout: int, by: str, confirm_over: str, program: Path | None = None) -> Armed:
    """Arm a guard that rolls back in `timeout` seconds. Raises GuardError; then nothing is left behind.

    `program` is the zipapp that the rollback runs a copy of, by default the one that runs.
    """
    _require_systemd(machine)
    # Before the lock too: a command of the other guard may hold that for long.
    _require_none_armed(machine)
    try:
        with guardlock.hold(timeout=_LOCK_S, path=machine.path(state.LOCK)):
            _require_none_armed(machine)
            _require_boot_unit(machine)
            _require_sshd_starts(machine)
            return _arm(machine, timeout=timeout, by=by, confirm_over=confirm_over, program=program)
    except GuardError:
        raise
    except HostProgramError as error:
        raise GuardError(str(error)) from error


def _arm(machine: Machine, *, timeout: int, by: str, confirm_over: str, program: Path | None) -> Armed:
    token = secrets.token_hex(8)
    number = state.next_number(machine)
    scheduled = False
    try:
        _make_folder(machine)
        state.clear(machine)
        _make_folder(machine)
        _write_ballast(machine)
        _copy_program(machine, program or state.running_program())
        take(machine, token)
        since_s = machine.now()
        scheduled = True
        schedule(machine, token, seconds=timeout)
        armed = Armed(
            token=token,
            number=number,
            by=printable(by)[:200],
            since=state.wall_clock(),
            since_s=since_s,
            deadline_s=since_s + timeout,
            timeout_s=timeout,
            boot=machine.boot(),
            confirm_over=confirm_over,
        )
        state.write_armed(machine, armed)
    except BaseException as error:
        # First: written or not, it must not name a snapshot that is gone.
        with suppress(OSError):
            state.remove_armed(machine)
        if scheduled:
            unschedule(machine, token)
        state.clear(machine)
        if isinstance(error, OSError):
            why = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
            raise GuardError(f"not armed, nothing can be written down to go back to: {why}.") from error
        raise
    to_journal(f"armed by {armed.by} for {timeout} s, token {token}")
    return armed


def take(machine: Machine, token: str) -> scope.Observed:
    """Write the snapshot of a guard to the disk. Raises GuardError or OSError."""
    folder = machine.path(state.snapshot_folder(token))
    folder.mkdir(mode=0o700)
    names: list[str] = []

    def keep(path: str, data: bytes, status: os.stat_result) -> str:
        name = f"{len(names):04d}"
        files.write(
            folder / name,
            data,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
        )
        names.append(name)
        return name

    observed = scope.look(machine, keep=keep)
    text = json.dumps({**observed.to_json(), "token": token})
    files.write(folder / _MANIFEST, text.encode(), mode=0o600, uid=os.geteuid(), gid=os.getegid())
    files.sync_directory(folder)
    files.sync_directory(folder.parent)
    return observed


def load(machine: Machine, token: str) -> scope.Observed:
    """The snapshot of a guard. Raises GuardError when it cannot be read."""
    place = machine.path(f"{state.snapshot_folder(token)}/{_MANIFEST}")
    try:
        return scope.from_json(json.loads(files.read(place)))
    except (OSError, ValueError) as error:
        raise GuardError(f"the snapshot {place} cannot be read: {error}.") from error


def schedule(machine: Machine, token: str, *, seconds: int) -> None:
    """Have systemd roll back in `seconds`, outside of every SSH session. Raises GuardError.

    The time is given since systemd's own start: what OnActiveSec counts begins anew with every daemon-reload
    (systemd before 254, systemd#27752), and sshd-apply does reloads.
    """
    try:
        manager = machine.show(properties=["UserspaceTimestampMonotonic"])[0]
        started_s = int(manager["UserspaceTimestampMonotonic"]) / 1e6
    except (GuardError, IndexError, KeyError, ValueError) as error:
        raise GuardError(f"not armed: systemd does not tell when it began ({error}).") from error
    due = time.clock_gettime(time.CLOCK_MONOTONIC) - started_s + seconds
    timer = [f"--on-startup={due:.3f}s", "--timer-property=AccuracySec=1s"]
    _systemd_run(machine, state.unit_name(token), timer, why="timeout", token=token)
    unit = f"{state.unit_name(token)}.timer"
    if not is_scheduled(machine, token):
        raise GuardError(f"not armed: {unit} does not wait for its time, see `systemctl status {unit}`.")


def schedule_after_boot(machine: Machine, token: str) -> None:
    """Have the rollback done as soon as what it is about has been started. Raises GuardError."""
    after = f"{sshd.UNIT} {' '.join(sshd.SERVICE_SOCKETS)} {scope.UFW_UNIT} tailscaled.service"
    options = ["--no-block", f"--property=After={after}"]
    _systemd_run(machine, f"{state.unit_name(token)}-boot", options, why="boot", token=token)


def _systemd_run(machine: Machine, unit: str, options: Sequence[str], *, why: str, token: str) -> None:
    program = [_PYTHON, "-I", state.PROGRAM, "guard", "rollback", token, "--why", why]
    properties = {
        "Type": "oneshot",
        "Restart": "on-failure",
        "RestartSec": "1",
        "StartLimitBurst": str(ATTEMPTS),
        "StartLimitIntervalSec": "3600",
        "TimeoutStartSec": "300",
        # What it says goes to the journal by itself.
        "StandardOutput": "null",
        "SyslogIdentifier": "quietport-guard",
    }
    argv = ["systemd-run", "--quiet", f"--unit={unit}", f"--description=quietport: undoes guard {token}"]
    argv += [*options, *(f"--property={key}={value}" for key, value in properties.items()), "--", *program]
    done = machine.run(argv, timeout=30)
    if done.code != 0:
        raise GuardError(f"the rollback cannot be scheduled: {done.complaint}")


def is_scheduled(machine: Machine, token: str) -> bool:
    """Whether the timer of a guard waits for its time, or its rollback is at work."""
    unit = state.unit_name(token)
    shown = machine.show(f"{unit}.timer", f"{unit}.service", properties=["ActiveState"])
    return any(block.get("ActiveState") in ("active", "activating", "reloading") for block in shown)


def unschedule(machine: Machine, token: str) -> None:
    """Stop the timer; one that fires all the same finds nothing armed."""
    machine.run(["systemctl", "stop", f"{state.unit_name(token)}.timer"], timeout=30)


def _require_systemd(machine: Machine) -> None:
    # sd_booted(3).
    if not machine.path("/run/systemd/system").is_dir():
        raise GuardError("not armed: systemd does not run this host, and it is what would roll back.")


def _require_none_armed(machine: Machine) -> None:
    already = state.read_armed(machine)
    if already is not None:
        raise GuardError(
            f"{already.sentence(machine)}. It must be confirmed or rolled back first "
            "(`quietport guard rollback`)."
        )


def _require_boot_unit(machine: Machine) -> None:
    done = machine.run(["systemctl", "is-enabled", BOOT_UNIT])
    if done.out.strip() != "enabled":
        raise GuardError(
            f"not armed: {BOOT_UNIT} is not enabled here, so a reboot would not undo anything. "
            "`pyinfra inventory deploys/vps.py` installs it."
        )


def _require_sshd_starts(machine: Machine) -> None:
    """A state in which sshd does not start is nothing to go back to."""
    if not machine.path(sshd_apply.SSHD).exists():
        return
    done = machine.sshd_host().sshd("-t")
    if done.returncode != 0:
        said = " ".join(printable(done.stderr).split())[:300]
        raise GuardError(
            f"not armed: sshd refuses its files as they are ({said}); going back to them would end sshd. "
            "Correct that first (`sshd -t`)."
        )


def _make_folder(machine: Machine) -> None:
    folder = machine.path(state.FOLDER)
    folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise GuardError(f"not armed: {folder} is there and is not root's own directory.") from None


def _write_ballast(machine: Machine) -> None:
    # Random, so that no file system makes it smaller.
    place, data = machine.path(state.BALLAST), os.urandom(BALLAST_BYTES)
    files.write(place, data, mode=0o600, uid=os.geteuid(), gid=os.getegid())


def _copy_program(machine: Machine, program: Path) -> None:
    place = machine.path(state.PROGRAM)
    files.write(place, files.read(program), mode=0o600, uid=os.geteuid(), gid=os.getegid())
    done = machine.run([_PYTHON, "-I", str(place), "--version"])
    if done.code != 0:
        raise GuardError(f"not armed: the copy of the program does not run: {done.complaint}")
