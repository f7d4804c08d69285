"""exec, confirm and the lock, with real processes; who may confirm, on a played /proc."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from quietport import guardlock, sshd
from quietport.guard import cli, fence, files, holders, rollback, scope, state, who
from quietport.guard.machine import GuardError, Log, Machine
from quietport.guard.state import Armed
from tests.unit.guard_world import TAILNET, World, hexed, row, stat

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietport.guard.machine.syslog.syslog", lambda *_: None)


# Real processes: a host whose /proc is the machine's own.


@pytest.fixture
def real(tmp_path: Path) -> Machine:
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "run").mkdir()
    folder = tmp_path / state.FOLDER.lstrip("/")
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    return Machine(root=tmp_path)


def armed_for(machine: Machine, seconds: float) -> Armed:
    now = machine.now()
    armed = Armed(
        token="ab12",
        number=1,
        by="a test",
        since=state.wall_clock(),
        since_s=now,
        deadline_s=now + seconds,
        timeout_s=int(seconds),
        boot=machine.boot(),
        confirm_over="tailnet",
    )
    state.write_armed(machine, armed)
    return armed


def exec_in_child(
    machine: Machine, *argv: str, timeout: float | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """`guard exec ab12` in a process of its own."""
    program = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from quietport.guard import fence
        from quietport.guard.machine import GuardError, Machine
        try:
            machine = Machine(root=Path({str(machine.root)!r}))
            sys.exit(fence.execute(machine, "ab12", {list(argv)!r}, timeout={timeout!r}))
        except GuardError as error:
            print(error, file=sys.stderr)
            sys.exit(error.code)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], **options)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for child in found:
        child.kill()
        child.wait()


def until(condition: Callable[[], bool], *, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_input_output_and_exit_code_pass_through(real: Machine) -> None:
    armed_for(real, 60)
    data = bytes(range(256)) * 300
    child = exec_in_child(
        real, "sh", "-c", "cat; echo said >&2; exit 7",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = child.communicate(data)
    assert (out, err, child.returncode) == (data, b"said\n", 7)


@pytest.mark.parametrize(
    ("argv", "code"), [(["sh", "-c", "kill -9 $$"], 137), (["no-such-program"], 127), (["/etc/passwd"], 126)]
)
def test_the_end_of_a_command_that_did_not_return(real: Machine, argv: list[str], code: int) -> None:
    armed_for(real, 60)
    assert fence.execute(real, "ab12", argv) == code


def test_not_armed_any_more(real: Machine, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(GuardError, match="no guard ab12 is armed here") as refusal:
        fence.execute(real, "ab12", ["touch", str(mark)])
    assert refusal.value.code == 75
    armed = armed_for(real, 60)
    with pytest.raises(GuardError, match="no guard other is armed here"):
        fence.execute(real, "other", ["touch", str(mark)])
    state.write_history(real, rollback.entry(armed, why="timeout", how="rolled back", log=Log(aloud=False)))
    state.remove_armed(real)
    with pytest.raises(GuardError, match=r"guard ab12 is not armed any more: rolled back \(timeout\)"):
        fence.execute(real, "ab12", ["touch", str(mark)])
    armed_for(real, 0)
    with pytest.raises(GuardError, match="the time of guard ab12 is up"):
        fence.execute(real, "ab12", ["touch", str(mark)])
    assert not mark.exists()
    armed_for(real, 60)
    assert fence.execute(real, "ab12", ["touch", str(mark)]) == 0
    assert mark.exists(), "the control"


def test_armed_before_a_boot_is_not_armed(real: Machine, tmp_path: Path) -> None:
    armed = armed_for(real, 60)
    state.write_armed(real, Armed(**{**vars(armed), "boot": "another boot"}))
    with pytest.raises(GuardError) as refusal:
        fence.execute(real, "ab12", ["true"])
    assert refusal.value.code == 75


def test_a_command_that_takes_too_long(real: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    armed_for(real, 60)
    began = time.monotonic()
    assert fence.execute(real, "ab12", ["sleep", "50"], timeout=0.3) == 124
    assert time.monotonic() - began < 10
    assert "its own time limit" in capfd.readouterr().err


def test_no_command_outlasts_the_guard(real: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    armed_for(real, 0.4)
    assert fence.execute(real, "ab12", ["sh", "-c", "trap '' TERM; sleep 50 & sleep 50"], timeout=30) == 124
    assert "the end of the guard's time" in capfd.readouterr().err
    assert holders.holders(real) == set(), "its child went with it"


def test_exec_waits_for_the_lock_and_looks_again(
    real: Machine, tmp_path: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    """The guard it was meant for is gone by the time it gets the lock: nothing is run."""
    armed_for(real, 60)
    mark = tmp_path / "mark"
    with guardlock.hold(timeout=0, path=real.path(state.LOCK)):
        child = exec_in_child(real, "touch", str(mark), stderr=subprocess.PIPE)
        children.append(child)
        time.sleep(0.5)
        assert child.poll() is None, "the control: it waits"
        state.remove_armed(real)
    assert child.wait(20) == 75
    assert not mark.exists()


def test_exec_gives_up_when_the_time_is_over(real: Machine, tmp_path: Path) -> None:
    armed_for(real, 0.5)
    with guardlock.hold(timeout=0, path=real.path(state.LOCK)):
        errors: list[GuardError] = []

        def wait() -> None:
            try:
                fence.execute(real, "ab12", ["true"])
            except GuardError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
    assert [error.code for error in errors] == [75]


def test_what_a_killed_exec_leaves_still_holds_the_lock(
    real: Machine, tmp_path: Path, children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to exec, and its command in a session of its own, as sshd-apply's: the rollback ends that."""
    armed_for(real, 60)
    mark = tmp_path / "mark"
    script = f"setsid sh -c 'trap \"\" TERM HUP; touch {mark}; sleep 60; touch {mark}-2' & sleep 60"
    child = exec_in_child(real, "sh", "-c", script)
    children.append(child)
    until(mark.exists)
    child.kill()
    child.wait()
    left = holders.holders(real)
    assert left, "the control: something holds it"
    monkeypatch.setattr(holders, "PATIENCE_S", 0.2)
    said: list[str] = []
    with holders.seized(real, said.append):
        assert len(said) == 1
        assert "killing" in said[0]
        for pid in left:
            until(lambda pid=pid: gone(pid))  # type: ignore[misc]
        with (
            pytest.raises(Exception, match="under way"),
            guardlock.hold(timeout=0, path=real.path(state.LOCK)),
        ):
            raise AssertionError("the rollback has the lock")


def gone(pid: int) -> bool:
    try:
        return "Z" in (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_children_that_have_closed_the_lock_go_too(
    real: Machine, tmp_path: Path, children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python closes descriptors in what it starts: iptables of ufw, systemctl of sshd-apply."""
    armed_for(real, 60)
    pid_file = tmp_path / "pid"
    script = (
        "import pathlib, subprocess; p = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(f'{{p.pid}} '); p.wait()"
    )
    child = exec_in_child(real, sys.executable, "-c", script)
    children.append(child)
    until(lambda: pid_file.exists() and pid_file.read_text().endswith(" "))
    sleeper = int(pid_file.read_text())
    assert sleeper not in holders.holders(real), "the control: it does not hold the lock itself"
    monkeypatch.setattr(holders, "PATIENCE_S", 0.2)
    with holders.seized(real, lambda line: None):
        until(lambda: gone(sleeper))


def test_a_rollback_at_work_is_not_killed_by_another(
    real: Machine, children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from quietport.guard import holders
        from quietport.guard.machine import Machine
        with holders.seized(Machine(root=Path({str(real.root)!r})), print):
            print("has it", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    children.append(other)
    assert other.stdout is not None
    assert other.stdout.readline() == b"has it\n"
    monkeypatch.setattr(holders, "PATIENCE_S", 0.2)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert other.stdin is not None
        other.stdin.close()

    with holders.seized(real, say):
        assert said == ["another rollback is at work; waiting for it"]
        assert other.wait(20) == 0


def test_signals_are_handed_on(
    real: Machine, tmp_path: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    armed_for(real, 60)
    mark = tmp_path / "mark"
    child = exec_in_child(real, "sh", "-c", f"trap 'exit 5' TERM; touch {mark}; while :; do sleep 0.05; done")
    children.append(child)
    until(mark.exists)
    child.send_signal(signal.SIGINT)  # the terminal's business, which it tells the command itself
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 5


# Who may confirm.


class Logins:
    """A World with a login by SSH: shell 900 of sshd 800 (of sshd 700, the monitor), and its connection."""

    def __init__(
        self, world: World, *, accepted_s: float, local: str = TAILNET, remote: str = "100.64.0.2"
    ) -> None:
        self.world = world
        self.ticks = os.sysconf("SC_CLK_TCK")
        self.process(600, 1, "/usr/sbin/sshd", 1.0)
        self.process(700, 600, "/usr/sbin/sshd", accepted_s)
        self.process(800, 700, "/usr/sbin/sshd", accepted_s + 0.5)
        self.process(900, 800, "/usr/bin/bash", accepted_s + 0.6)
        self.process(901, 900, "/usr/bin/sudo", accepted_s + 1)
        self.process(902, 901, "/usr/bin/python3.11", accepted_s + 1)
        self.connect(local, remote, inode=77, pids=(700, 800))

    def process(self, pid: int, parent: int, program: str, began_s: float) -> None:
        self.world.write(f"/proc/{pid}/stat", stat(pid, parent, ticks=int(began_s * self.ticks)))
        self.world.link(f"/proc/{pid}/exe", program)

    def connect(
        self, local: str, remote: str, *, inode: int, pids: tuple[int, ...], port: int = 22, state: str = "01"
    ) -> None:
        table = self.world.path("/proc/net/tcp")
        line = row(local, port, inode=inode, remote=hexed(remote, 50000), state=state)
        table.write_text(f"{table.read_text()}{line}\n")
        for pid in pids:
            self.world.link(f"/proc/{pid}/fd/{inode}", f"socket:[{inode}]")


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.converge()
    return made


def test_a_new_login_over_the_tailnet_confirms(world: World) -> None:
    armed = world.arm()
    world.write("/etc/ssh/sshd_config.d/50-new.conf", "# new\n")
    Logins(world, accepted_s=world.seconds + 5)
    world.seconds += 6
    said = cli.confirm(world.machine, armed.token, pid=902)
    assert "what was changed stays" in said
    assert state.read_armed(world.machine) is None
    assert world.path("/etc/ssh/sshd_config.d/50-new.conf").exists()
    assert not world.path(state.FOLDER).exists()
    assert ["systemctl", "stop", f"quietport-guard-{armed.token}.timer"] in world.ran
    (entry,) = state.history(world.machine)
    assert entry["how"] == "confirmed"
    assert "from 100.64.0.2, at 100.64.0.1" in entry["why"]
    with pytest.raises(GuardError, match="not armed any more: confirmed"):
        cli.confirm(world.machine, armed.token, pid=902)


def test_the_split_sshd_of_openssh_10(world: World) -> None:
    armed = world.arm()
    logins = Logins(world, accepted_s=world.seconds + 5)
    for pid in (700, 800):
        logins.world.link(f"/proc/{pid}/exe", "/usr/lib/openssh/sshd-session (deleted)")
    world.seconds += 6
    cli.confirm(world.machine, armed.token, pid=902)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"accepted_s": 900.0}, "100 s older than the guard"),
        # Accepted before, logged in after.
        ({"accepted_s": 999.8}, "older than the guard"),
        ({"accepted_s": 1005.0, "local": "198.51.100.7"}, r"arrived at 198\.51\.100\.7, which is no"),
        # A provider's network of 100.64.0.0/10.
        ({"accepted_s": 1005.0, "local": "100.64.77.7"}, "is not an address of the tailnet"),
        ({"accepted_s": 1005.0, "remote": TAILNET}, "comes from the host itself"),
        ({"accepted_s": 1005.0, "remote": "127.0.0.1"}, "comes from the host itself"),
    ],
)  # fmt: skip
def test_logins_that_do_not_count(world: World, options: dict[str, Any], why: str) -> None:
    armed = world.arm()
    Logins(world, **options)
    world.seconds += 10
    with pytest.raises(GuardError, match=why) as refusal:
        cli.confirm(world.machine, armed.token, pid=902)
    assert str(refusal.value).startswith("not confirmed: ")
    assert refusal.value.code == 1
    assert state.read_armed(world.machine) == armed
    Logins(world, accepted_s=1005.0)
    cli.confirm(world.machine, armed.token, pid=902)


def test_over_any_address_when_armed_so_but_never_by_an_old_login(world: World) -> None:
    armed = world.arm(confirm_over="any")
    Logins(world, accepted_s=900.0, local="198.51.100.7", remote="203.0.113.5")
    world.seconds += 10
    with pytest.raises(GuardError, match="older than the guard"):
        cli.confirm(world.machine, armed.token, pid=902)
    Logins(world, accepted_s=1005.0, local="198.51.100.7", remote="203.0.113.5")
    cli.confirm(world.machine, armed.token, pid=902)


def test_the_console_is_no_login_by_ssh(world: World) -> None:
    armed = world.arm()
    logins = Logins(world, accepted_s=1005.0)
    logins.process(950, 1, "/usr/bin/login", 1005.0)
    logins.process(951, 950, "/usr/bin/bash", 1005.0)
    world.seconds += 10
    with pytest.raises(GuardError, match="this is no SSH login"):
        cli.confirm(world.machine, armed.token, pid=951)


def test_a_connection_that_a_session_forwards_is_not_its_own(world: World) -> None:
    """`ssh -L` from a public login to something on the tailnet has a local address there."""
    armed = world.arm()
    logins = Logins(world, accepted_s=1005.0, local="198.51.100.7", remote="203.0.113.5")
    world.bound = [*world.bound, ("198.51.100.7", 22)]
    logins.connect(TAILNET, "100.64.0.5", inode=78, pids=(800,), port=41000)
    world.seconds += 10
    with pytest.raises(GuardError, match=r"arrived at 198\.51\.100\.7"):
        cli.confirm(world.machine, armed.token, pid=902)


def test_a_client_that_has_hung_up_proves_nothing(world: World) -> None:
    armed = world.arm()
    logins = Logins(world, accepted_s=1005.0)
    table = world.path("/proc/net/tcp")
    table.write_text("\n".join(line for line in table.read_text().splitlines() if " 77 " not in line) + "\n")
    logins.connect(TAILNET, "100.64.0.2", inode=77, pids=(700, 800), state="08")
    world.seconds += 10
    with pytest.raises(GuardError, match="is not there any more"):
        cli.confirm(world.machine, armed.token, pid=902)


def test_too_late_is_too_late(world: World) -> None:
    """The timer has not come round yet, but its time has: the confirmation does not win any more."""
    armed = world.arm()
    Logins(world, accepted_s=1005.0)
    world.seconds += 120
    with pytest.raises(GuardError, match="is up, and what was changed is being undone"):
        cli.confirm(world.machine, armed.token, pid=902)
    log = Log(aloud=False)
    assert rollback.roll_back(world.machine, armed.token, why="timeout", log=log) is True


def test_a_confirmation_waits_for_a_command_at_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = world.arm()
    Logins(world, accepted_s=1005.0)
    world.seconds += 6
    monkeypatch.setattr(cli, "_CONFIRM_LOCK_S", 0.2)
    with (
        guardlock.hold(timeout=0, path=world.path(state.LOCK)),
        pytest.raises(GuardError, match="not confirmed: Another change"),
    ):
        cli.confirm(world.machine, armed.token, pid=902)
    cli.confirm(world.machine, armed.token, pid=902)


@pytest.mark.parametrize("number", range(12))
def test_confirmation_and_rollback_at_the_same_time_one_wins(world: World, number: int) -> None:
    """Under the lock: never both, never none."""
    armed = world.arm()
    new = world.path("/etc/ssh/sshd_config.d/50-new.conf")
    new.write_text("# new\n")
    Logins(world, accepted_s=1005.0)
    world.seconds += 10
    results: list[str] = []
    barrier = threading.Barrier(2)

    def confirm() -> None:
        barrier.wait()
        time.sleep(0.003 * (number % 2))
        with suppress(GuardError):
            cli.confirm(world.machine, armed.token, pid=902)
            results.append("confirmed")

    def undo() -> None:
        barrier.wait()
        time.sleep(0.003 * ((number + 1) % 2))
        if rollback.roll_back(world.machine, armed.token, why="timeout", log=Log(aloud=False)):
            results.append("rolled back")

    threads = [threading.Thread(target=confirm), threading.Thread(target=undo)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 1, results
    (entry,) = state.history(world.machine)
    assert entry["how"] == results[0]
    assert new.exists() is (results[0] == "confirmed")
    assert state.read_armed(world.machine) is None


def test_a_history_that_cannot_be_written_does_not_keep_it_from_ending(world: World) -> None:
    armed = world.arm()
    world.path("/var/lib/quietport").write_text("a file in the way")
    Logins(world, accepted_s=1005.0)
    world.seconds += 10
    cli.confirm(world.machine, armed.token, pid=902)
    assert state.read_armed(world.machine) is None


def test_the_real_socket_table_is_read(tmp_path: Path) -> None:
    """Our own connection to ourselves, by the kernel's word."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            table = who.parse_established(Path("/proc/net/tcp").read_text())
            found = table[os.fstat(accepted.fileno()).st_ino]
            assert found.local == server.getsockname()
            assert found.remote == client.getsockname()
            assert os.fstat(server.fileno()).st_ino not in table, "the control: a listener is no connection"


# The command line.


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [],
        ["exec", "t"],
        ["run"],
        ["arm", "--timeout", "9"],
        ["arm", "--timeout", "3601"],
        ["status", "--", "x"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2, argv
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "usage: quietport guard" in capsys.readouterr().out


def test_only_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(GuardError, match="only root can do this") as refusal:
        cli.main(["status"])
    assert refusal.value.code == 1


@pytest.fixture
def typed(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """What is typed is played on this host."""
    monkeypatch.setattr(cli, "Machine", lambda: world.machine)
    monkeypatch.setattr(state, "running_program", lambda: world.path("/opt/quietport.pyz"))
    return world


def test_arm_and_status_as_json(typed: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["arm", "--timeout", "30", "--by", "converge of bob", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1
    assert (told["left_s"], told["deadline_s"]) == (30, 1030)
    typed.seconds += 10
    assert cli.main(["status", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    armed = document["armed"]
    assert (armed["token"], armed["left_s"], armed["by"]) == (told["token"], 20, "converge of bob")
    assert (armed["since"], armed["confirm_over"], armed["attempt"]) == (told["since"], "tailnet", None)
    assert document["history"] == []


def test_a_guard_whose_rollback_is_not_done_has_not_ended(
    typed: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who reads the history for what became of it must not find it there yet."""
    typed.arm()
    typed.write("/etc/ssh/sshd_config.d/50-new.conf", "# new\n")
    typed.fails["systemctl daemon-reload"] = "told to fail"
    assert cli.main(["rollback", "--why", "timeout"]) == 1
    capsys.readouterr()
    cli.main(["status", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["history"] == []
    assert document["armed"]["attempt"]["how"] == "incomplete"
    cli.main(["status"])
    assert "incomplete (timeout)" in capsys.readouterr().out
    typed.fails.clear()
    assert cli.main(["rollback", "--why", "timeout"]) == 0
    capsys.readouterr()
    cli.main(["status", "--json"])
    assert [one["how"] for one in json.loads(capsys.readouterr().out)["history"]] == ["rolled back"]


def test_rollback_by_hand_and_by_a_timer_with_nothing_armed(
    typed: World, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rollback"]) == 1
    assert "no guard is armed" in capfd.readouterr().err
    assert cli.main(["rollback", "ab12", "--why", "timeout"]) == 0, "a timer that came late is no failure"


def test_rollback_by_hand_survives_its_terminal(typed: World, capfd: pytest.CaptureFixture[str]) -> None:
    """In a session of its own, and it is waited for."""
    typed.arm()
    typed.write("/etc/ssh/sshd_config.d/50-new.conf", "# new\n")
    sessions: list[int] = []
    typed.hooks["systemctl daemon-reload"] = lambda: typed.write("/session", f"{os.getsid(0)} {os.getpid()}")
    assert cli.main(["rollback"]) == 0
    session, pid = map(int, typed.path("/session").read_text().split())
    assert session == pid != os.getpid(), sessions
    assert not typed.path("/etc/ssh/sshd_config.d/50-new.conf").exists()
    assert "the old state is back" in capfd.readouterr().out


def test_run_undoes_at_once_when_the_command_fails(typed: World, capfd: pytest.CaptureFixture[str]) -> None:
    new = typed.path("/etc/ssh/sshd_config.d/50-new.conf")
    assert cli.main(["run", "--timeout", "60", "--", "sh", "-c", f"echo x >{new}; exit 3"]) == 1
    assert not new.exists()
    assert "The command failed (3); undoing." in capfd.readouterr().err
    assert state.history(typed.machine)[0]["why"] == "the command failed (3)"


def test_run_waits_for_a_second_login(
    typed: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = typed.path("/etc/ssh/sshd_config.d/50-new.conf")

    def sleep(seconds: float) -> None:
        """The operator logs in elsewhere, and confirms."""
        typed.seconds += 3
        armed = state.read_armed(typed.machine)
        if armed is not None:
            Logins(typed, accepted_s=armed.since_s + 1, local="198.51.100.7", remote="203.0.113.5")
            cli.confirm(typed.machine, armed.token, pid=902)

    waiting = Machine(root=typed.root, run=typed, now=lambda: typed.seconds, sleep=sleep)
    monkeypatch.setattr(cli, "Machine", lambda: waiting)
    assert cli.main(["run", "--", "sh", "-c", f"echo x >{new}"]) == 0
    assert new.exists()
    err = capfd.readouterr().err
    assert "quietport guard confirm" in err
    assert "Confirmed (from 203.0.113.5" in err


def test_run_that_nobody_confirms_is_a_failure(typed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    new = typed.path("/etc/ssh/sshd_config.d/50-new.conf")

    def sleep(seconds: float) -> None:
        typed.seconds += 10
        armed = state.read_armed(typed.machine)
        if armed is not None and not armed.seconds_left(typed.machine):
            rollback.roll_back(typed.machine, armed.token, why="timeout", log=Log(aloud=False))

    waiting = Machine(root=typed.root, run=typed, now=lambda: typed.seconds, sleep=sleep)
    monkeypatch.setattr(cli, "Machine", lambda: waiting)
    assert cli.main(["run", "--timeout", "30", "--", "sh", "-c", f"echo x >{new}"]) == 1
    assert not new.exists()


def test_scope_against_a_file(typed: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scope"]) == 0
    kept = tmp_path / "kept.json"
    kept.write_text(capsys.readouterr().out)
    assert cli.main(["scope", "--against", str(kept)]) == 0
    typed.write("/etc/ssh/sshd_config.d/50-new.conf", "# new\n")
    assert cli.main(["scope", "--against", str(kept)]) == 1
    assert capsys.readouterr().out == "/etc/ssh/sshd_config.d/50-new.conf is there, it was not\n"


def test_the_docs_hold_the_table_of_the_code() -> None:
    assert scope.table() in (ROOT / "docs/guard.md").read_text()


def test_the_boot_unit_says_what_the_program_wants() -> None:
    unit = (ROOT / "templates/guard/quietport-guard-boot.service").read_text()
    assert f"ConditionPathExists={state.ARMED}\n" in unit
    assert f"{state.PROGRAM} guard boot" in unit
    assert "RequiredBy" not in unit, "sshd starts whatever becomes of it"
    assert sshd.UNIT in unit
    assert files.MAX_BYTES > 0
