"""The lock on a host, with the real bash and flock, over a real sshd: who gets it, and when it ends."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control import lock
from control.lock import HostLock, LockError, fenced
from control.reach import open_session
from control.session import Session
from facts.controller import Controller
from quietport.converging import converging
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Relay, Server

pytestmark = NEEDS_ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock is, instead of /run/quietport."""
    place = tmp_path / "run/quietport"
    place.parent.mkdir()
    monkeypatch.setattr(lock, "DIRECTORY", str(place))
    monkeypatch.setattr("facts.controller.DIRECTORY", str(place))
    monkeypatch.setattr(lock, "TOKEN", "first")
    return place


@pytest.fixture
def session(operator: Operator, server: Server, place: Path) -> Iterator[Session]:
    operator.host(port=server.port)
    with open_session("vps1") as made:
        yield made


@pytest.fixture
def other(session: Session) -> Iterator[Session]:
    with open_session("vps1") as made:
        yield made


def as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this process is another controller."""
    monkeypatch.setattr(lock, "TOKEN", "second")


def seen() -> dict[str, Any]:
    done = subprocess.run(["sh", "-c", Controller().command()], capture_output=True, text=True, check=True)
    state: dict[str, Any] = Controller().process(done.stdout.split("\n")[:-1])
    return state


def wait_until_free() -> None:
    end = time.monotonic() + 10
    while seen()["held"]:
        assert time.monotonic() < end, "the lock was not freed"
        time.sleep(0.05)


def test_a_free_lock_is_taken_and_given_back(session: Session, place: Path) -> None:
    assert seen() == Controller.default()
    said: list[str] = []
    held = HostLock.take(session, say=said.append)
    assert held.held
    assert said == []
    assert (place.stat().st_mode & 0o7777, place.stat().st_uid) == (0o700, 0)
    state = seen()
    assert (state["held"], state["pid"], state["quiet_s"] < 5) == (True, os.getpid(), True)
    held.release()
    assert seen() == Controller.default()
    HostLock.take(session, say=said.append).release()
    assert said == []


def test_the_host_knows_that_a_controller_is_at_work(session: Session, place: Path) -> None:
    assert not converging(place), "nobody was here since the boot"
    held = HostLock.take(session)
    assert converging(place)
    held.release()
    wait_until_free()
    left = sorted(file.name for file in place.iterdir())
    assert not converging(place)
    # It has neither made anything nor taken the lock away from the next one.
    assert sorted(file.name for file in place.iterdir()) == left
    HostLock.take(session).release()


def test_what_cannot_be_looked_at_counts_as_work(tmp_path: Path) -> None:
    (tmp_path / "lock.mutex").touch()
    assert not converging(tmp_path)
    with (tmp_path / "lock.mutex").open() as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        assert converging(tmp_path)
    assert not converging(tmp_path)
    (tmp_path / "lock").symlink_to(tmp_path / "lock.mutex")
    assert converging(tmp_path)


def test_the_second_controller_is_refused_with_who_and_since_when(
    session: Session, other: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HostLock.take(session)
    since = seen()["since"]
    as_another(monkeypatch)
    with pytest.raises(LockError) as refused:
        HostLock.take(other)
    sentence = str(refused.value)
    assert f"vps1: another converge is at work here: {lock.who()} (process {os.getpid()})" in sentence
    assert f"since {since} UTC, last heard of " in sentence
    assert seen()["since"] == since
    monkeypatch.setattr(lock, "TOKEN", "first")
    held.release()
    as_another(monkeypatch)
    HostLock.take(other).release()


def test_it_moves_to_another_session_without_a_gap(
    session: Session, other: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HostLock.take(session)
    since = seen()["since"]
    held.move(other)
    session.close()
    time.sleep(0.3)
    state = seen()
    assert (state["held"], state["since"]) == (True, since)
    held.release()
    assert not seen()["held"]


CONTROLLER = """
import sys, time
from control import lock
from control.reach import open_session
lock.DIRECTORY, lock.TOKEN = sys.argv[1:3]
session = open_session("vps1")
held = lock.HostLock.take(session)
print("taken", flush=True)
session.run(lock.fenced(sys.argv[3]))
"""


def controller(place: Path, command: str) -> subprocess.Popen[str]:
    """Another controller, in a process of its own, that runs a command while it holds the lock."""
    argv = [sys.executable, "-c", CONTROLLER, str(place), "dead", command]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_the_lock_of_a_killed_controller_is_free_at_once_and_its_owner_named(
    session: Session, place: Path
) -> None:
    process = controller(place, "true; exec sleep 0.01")
    process.send_signal(signal.SIGSTOP)
    assert seen()["held"]
    with pytest.raises(LockError):
        HostLock.take(session)
    process.kill()
    process.wait()
    wait_until_free()
    said: list[str] = []
    held = HostLock.take(session, say=said.append)
    who = f"{lock.who()} (process {process.pid}) since "
    assert [who in sentence and "ended without finishing" in sentence for sentence in said] == [True]
    held.release()
    assert seen() == Controller.default()


def test_what_a_dead_controller_began_is_waited_for(session: Session, place: Path, tmp_path: Path) -> None:
    done = tmp_path / "done"
    process = controller(place, f"sleep 2; touch {done}")
    time.sleep(0.5)
    process.kill()
    process.wait()
    said: list[str] = []
    held = HostLock.take(session, say=said.append)
    assert done.exists()
    assert "began: sleep (pid " in said[0]
    held.release()


def test_what_a_dead_controller_began_and_never_ends_is_named(
    session: Session, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = controller(place, "exec sleep 1000")
    time.sleep(0.5)
    process.kill()
    process.wait()
    wait_until_free()
    monkeypatch.setattr(lock, "PATIENCE_S", 1)
    with pytest.raises(
        LockError, match=r"still runs after 1 s: sleep \(pid \d+\)\. Wait for it or end it"
    ) as e:
        HostLock.take(session)
    pid = int(str(e.value).split("pid ")[1].split(")")[0])
    os.kill(pid, signal.SIGKILL)
    HostLock.take(session).release()


def test_a_controller_whose_link_is_silent_loses_the_lock(
    operator: Operator, relay: Relay, other: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.3)
    monkeypatch.setattr(lock, "LATE_S", 1)
    monkeypatch.setattr(lock, "SILENCE_S", 4)
    operator.host(port=relay.port)
    with open_session("vps1") as session:
        HostLock.take(session)
        # Longer than silence would be: it is heard of.
        time.sleep(5)
        as_another(monkeypatch)
        with pytest.raises(LockError):
            HostLock.take(other)
        relay.freeze()
        time.sleep(2)
        said: list[str] = []
        began = time.monotonic()
        held = HostLock.take(other, say=said.append)
        assert time.monotonic() - began < 6
        assert "not heard of for " in said[0]
        assert "ended without finishing" in said[1]
        held.release()


def test_a_command_is_fenced_by_the_owner(
    session: Session, other: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    touch = f"touch {mark}; echo out; echo err >&2; cat; exit 3"
    held = HostLock.take(session)
    done = session.run(fenced(touch), stdin=b"in")
    assert (done.exit_code, done.stdout, done.stderr) == (3, b"out\nin", b"err\n")
    mark.unlink()
    stale = fenced(touch)
    # The holder dies, another controller comes: as after a stall.
    held._conversation.close()
    wait_until_free()
    assert session.run(stale).exit_code == 3, "nobody else has it: it may go on"
    mark.unlink()
    as_another(monkeypatch)
    second = HostLock.take(other)
    done = session.run(stale)
    assert (done.exit_code, done.stdout) == (1, b"")
    assert done.stderr.startswith(
        f"refused: {lock.who()} (process {os.getpid()}) took the lock over".encode()
    )
    assert not mark.exists()
    monkeypatch.setattr(lock, "TOKEN", "first")
    with pytest.raises(LockError, match="the lock of this run was lost to "):
        held.move(session)
    monkeypatch.setattr(lock, "TOKEN", "second")
    second.release()
    assert b"the lock of this run is gone" in session.run(stale).stderr
    assert not mark.exists()


def test_a_holder_that_died_is_replaced_while_nobody_else_came(session: Session) -> None:
    held = HostLock.take(session)
    held._conversation.close()
    wait_until_free()
    assert not held.held
    held.move(session)
    assert held.held
    assert seen()["held"]
    held.release()


def test_a_daemon_that_a_command_starts_does_not_keep_the_lock(session: Session, place: Path) -> None:
    held = HostLock.take(session)
    pid = session.run(fenced("sleep 1000 >/dev/null 2>&1 & echo $!")).stdout.decode().strip()
    try:
        assert (
            subprocess.run(
                ["flock", "-n", "-x", str(place / "lock.commands"), "true"], check=False
            ).returncode
            == 0
        )
    finally:
        os.kill(int(pid), signal.SIGKILL)
    held.release()


def test_a_command_keeps_the_lock_of_commands_while_it_runs(session: Session, place: Path) -> None:
    """The positive control of the one before."""
    held = HostLock.take(session)
    probe = shlex.join(["flock", "-n", "-x", str(place / "lock.commands"), "true"])
    assert session.run(fenced(f"{probe}; echo $?")).stdout == b"1\n"
    held.release()


def test_a_host_that_failed_is_free_for_others_while_the_run_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    failed: list[str] = []
    held = HostLock.take(session, wanted=lambda: not failed)
    time.sleep(0.6)
    assert seen()["held"]
    failed.append("vps1")
    wait_until_free()
    assert seen() == Controller.default()
    assert b"the lock of this run is gone" in session.run(fenced("true")).stderr
    held.release()


@pytest.mark.parametrize("spoil", ["chmod 755", "chown nobody", "ln"])
def test_a_directory_that_others_could_change_is_refused(
    session: Session, place: Path, tmp_path: Path, spoil: str
) -> None:
    if spoil == "ln":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir(mode=0o700)
        subprocess.run([*spoil.split(), str(place)], check=True)
    with pytest.raises(LockError, match=r"the lock in \S+ cannot be had: \S+ is a "):
        HostLock.take(session)


def test_a_user_with_a_sudo_password_holds_it_too(
    operator: Operator, server: Server, place: Path, person: Any
) -> None:
    operator.host(port=server.port, user=person.name, sudo_password="env:QPT_PASSWORD")
    with open_session("vps1") as session:
        held = HostLock.take(session)
        assert seen()["held"]
        assert session.run(fenced("id -u")).stdout == b"0\n"
        held.release()
        assert not seen()["held"]
        HostLock.take(session)
    wait_until_free()
