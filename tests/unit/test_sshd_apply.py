"""sshd-apply: all of the plan, or the old state; played on a host of files and recorded commands."""

from __future__ import annotations

import errno
import hashlib
import json
import pwd
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quietport import sshd
from quietport.sshd_apply import Apply, Failed, Host, login_users, only_one, parse_plan

OLD_MAIN = "Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n"
NEW = {
    sshd.MAIN: "Include /etc/ssh/sshd_config.d/*.conf\n# quietport: was: Port 22\n",
    sshd.DROP_IN: sshd.render(["100.64.0.1"]),
    sshd.UNIT_DROP_IN: "[Service]\nRestartSec=2\n",
}
WANTED = frozenset({("100.64.0.1", 22)})
PUBLIC = frozenset({("0.0.0.0", 22), ("::", 22)})
KEYS_ONLY = (
    "passwordauthentication no\nkbdinteractiveauthentication no\nauthenticationmethods publickey\n"
    "pubkeyauthentication yes\nlistenaddress 100.64.0.1:22\n"
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def document(**changes: Any) -> dict[str, Any]:
    old = {sshd.MAIN: sha(OLD_MAIN)}
    files = {path: {"old_sha256": old.get(path), "text": text} for path, text in NEW.items()}
    plain = {"schema": 1, "files": files, "mask": ["ssh.socket"], "users": ["bob"]}
    return plain | {"listeners": [["100.64.0.1", 22]]} | changes


class Machine:
    """systemctl and sshd as they would answer, with every command that was run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.masked: set[str] = set()
        self.active = {"ssh.service"}
        self.enabled = {"ssh.service", "ssh.socket"}
        self.listening = PUBLIC
        self.effective = KEYS_ONLY
        self.effective_once_active = KEYS_ONLY
        self.deaf_with: str | None = None
        self.also: frozenset[sshd.Listener] = frozenset()

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.ran.append(line)
        if any(line.startswith(prefix) for prefix in self.fails):
            return subprocess.CompletedProcess(list(argv), 1, "", "it was told to fail")
        return subprocess.CompletedProcess(list(argv), 0, self._answer(list(argv)), "")

    def _answer(self, argv: list[str]) -> str:
        if argv[0] != "systemctl":
            active = "-f" not in argv
            return self.effective_once_active if active else self.effective
        verb, unit = argv[1], argv[2] if len(argv) > 2 else ""
        if verb == "show":
            load = "masked" if unit in self.masked else "loaded"
            state = "enabled" if unit in self.enabled else "disabled"
            active = "active" if unit in self.active else "inactive"
            return f"UnitFileState={state}\nActiveState={active}\nLoadState={load}\nMainPID=77\n"
        if verb == "mask":
            self.masked.update(argv[2:])
        {"unmask": self.masked.discard}.get(verb, lambda unit: None)(unit)
        {"enable": self.enabled.add, "disable": self.enabled.discard}.get(verb, lambda unit: None)(unit)
        {"start": self.active.add, "stop": self.active.discard}.get(verb, lambda unit: None)(unit)
        if verb == "restart":
            self._restart()
        return ""

    def _restart(self) -> None:
        ours = self.root / sshd.DROP_IN.lstrip("/")
        self.listening = (WANTED if ours.exists() else PUBLIC) | self.also
        if self.deaf_with and self.deaf_with in (self.root / sshd.MAIN.lstrip("/")).read_text():
            self.listening = frozenset()


class FakeHost(Host):
    def __init__(self, machine: Machine) -> None:
        super().__init__(root=machine.root, run=machine)
        self.machine = machine

    def ssh_listeners(self) -> frozenset[sshd.Listener]:
        return self.machine.listening


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    (tmp_path / "etc/ssh/sshd_config.d").mkdir(parents=True)
    (tmp_path / sshd.MAIN.lstrip("/")).write_text(OLD_MAIN)
    (tmp_path / "etc/systemd/system/ssh.service.d").mkdir(parents=True)
    monkeypatch.setattr("quietport.sshd_apply.LISTEN_TIMEOUT_S", 0)
    return Machine(tmp_path)


def files_of(machine: Machine) -> dict[str, str]:
    return {
        f"/{path.relative_to(machine.root)}": path.read_text()
        for path in machine.root.glob("etc/**/*")
        if path.is_file()
    }


def play(machine: Machine, **changes: Any) -> tuple[bool, str]:
    said: list[str] = []
    plan = parse_plan(json.dumps(document(**changes)).encode())
    done = Apply(plan, FakeHost(machine), say=said.append)()
    return done, "\n".join(said)


def test_the_plan_as_a_whole(machine: Machine) -> None:
    done, said = play(machine)
    assert done, said
    assert files_of(machine) == NEW
    assert machine.masked == {"ssh.socket"}
    assert "100.64.0.1:22" in said
    assert not list((machine.root / "run").glob("quietport-sshd.*"))


def test_our_files_get_our_mode_and_those_of_others_keep_theirs(machine: Machine) -> None:
    for path, mode in ((sshd.MAIN, 0o600), (sshd.DROP_IN, 0o666), (sshd.UNIT_DROP_IN, 0o777)):
        file = machine.root / path.lstrip("/")
        file.write_text(OLD_MAIN if path == sshd.MAIN else "older\n")
        file.chmod(mode)
    old = {sshd.MAIN: sha(OLD_MAIN)}
    files = {path: {"old_sha256": old.get(path, sha("older\n")), "text": text} for path, text in NEW.items()}
    done, said = play(machine, files=files)
    assert done, said
    modes = [(machine.root / path.lstrip("/")).stat().st_mode & 0o7777 for path in NEW]
    assert modes == [0o600, 0o644, 0o644]


def test_all_sockets_are_masked_by_one_command(machine: Machine) -> None:
    """systemd reads every unit file anew after each; with seven that takes a while, with sshd in between."""
    done, said = play(machine, mask=["ssh.socket", "sshd-vsock.socket"])
    assert done, said
    assert machine.masked == {"ssh.socket", "sshd-vsock.socket"}
    assert [line.split()[2:] for line in machine.ran if " mask " in line] == [
        ["ssh.socket", "sshd-vsock.socket"]
    ]


def test_nothing_touches_sshds_folder_after_the_restart(machine: Machine) -> None:
    """Its time is newer than sshd's start otherwise, and the run ends with an sshd that looks outdated."""
    foreign = f"{sshd.FOLDER}/60-admin.conf"
    folder = machine.root / sshd.FOLDER.lstrip("/")
    (machine.root / foreign.lstrip("/")).write_text("ListenAddress 0.0.0.0\n")
    times: list[int] = []
    machine._restart = lambda: (  # type: ignore[method-assign]
        Machine._restart(machine), times.append(folder.stat().st_mtime_ns), time.sleep(0.02)
    )  # fmt: skip
    change = {"old_sha256": sha("ListenAddress 0.0.0.0\n"), "text": "# no more\n"}
    done, said = play(machine, files=document()["files"] | {foreign: change})
    assert done, said
    assert times == [folder.stat().st_mtime_ns]
    assert sorted(path.name for path in folder.iterdir()) == ["00-quietport.conf", "60-admin.conf"]
    assert not list(folder.parent.glob(".quietport.*"))


def test_the_candidate_is_checked_before_anything_is_active(machine: Machine) -> None:
    play(machine)
    checks = [at for at, line in enumerate(machine.ran) if line.startswith("/usr/sbin/sshd -t -f /")]
    changes = [at for at, line in enumerate(machine.ran) if line.split()[1] in ("disable", "mask", "restart")]
    assert checks
    assert changes
    assert max(checks) < min(changes)


@pytest.fixture
def active_socket(machine: Machine) -> Machine:
    machine.active.add("ssh.socket")
    return machine


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("systemctl mask", "masking the sockets"),
        ("systemctl daemon-reload", "restarting sshd"),
        ("systemctl enable", "restarting sshd"),
    ],
)
def test_a_step_that_fails_puts_everything_back(active_socket: Machine, command: str, step: str) -> None:
    active_socket.fails = {command}
    done, said = play(active_socket)
    assert not done
    assert f"{step} failed" in said
    assert "the old state is back" in said
    assert files_of(active_socket) == {sshd.MAIN: OLD_MAIN}
    assert active_socket.masked == set()
    assert "ssh.socket" in active_socket.active


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many more files fit on it; plenty at first."""
    room = [100]
    really = tempfile.mkstemp

    def mkstemp(**options: Any) -> tuple[int, str]:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= 1
        return really(**options)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    return room


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_full_disk_is_found_before_the_first_change(machine: Machine, disk: list[int], room: int) -> None:
    disk[0] = room
    done, said = play(machine)
    assert not done
    assert "writing the files failed" in said
    assert "No space left on device" in said
    assert "nothing was changed" in said
    assert files_of(machine) == {sshd.MAIN: OLD_MAIN}


def test_the_old_state_comes_back_although_the_disk_is_full_by_then(
    active_socket: Machine, disk: list[int]
) -> None:
    """Three files will be new, and one of them is there before: four files, and not one more."""
    disk[0] = 4
    active_socket.fails = {"systemctl mask"}
    done, said = play(active_socket)
    assert not done
    assert disk[0] == 0, "the control: there was room for exactly these"
    assert "the old state is back" in said
    assert "while undoing" not in said
    assert files_of(active_socket) == {sshd.MAIN: OLD_MAIN}


def test_a_candidate_that_sshd_refuses_touches_nothing(machine: Machine) -> None:
    machine.fails = {"/usr/sbin/sshd -t"}
    done, said = play(machine)
    assert not done
    assert "checking the candidate failed: sshd refuses the candidate: it was told to fail" in said
    assert "nothing was changed" in said
    assert files_of(machine) == {sshd.MAIN: OLD_MAIN}
    assert not [line for line in machine.ran if line.split()[1] in ("stop", "mask", "restart", "enable")]


@pytest.mark.parametrize(
    ("was", "worse", "why"),
    [
        ("passwordauthentication no", "passwordauthentication yes", "passwordauthentication is yes, not no"),
        ("listenaddress 100.64.0.1:22", "listenaddress 0.0.0.0:22", "would listen on 0.0.0.0:22"),
    ],
)
def test_a_candidate_that_means_something_else_touches_nothing(
    machine: Machine, was: str, worse: str, why: str
) -> None:
    machine.effective = KEYS_ONLY.replace(was, worse)
    done, said = play(machine)
    assert not done
    assert why in said
    assert files_of(machine) == {sshd.MAIN: OLD_MAIN}


def test_what_is_active_in_the_end_is_read_back(machine: Machine) -> None:
    yes = "passwordauthentication yes"
    machine.effective_once_active = KEYS_ONLY.replace("passwordauthentication no", yes)
    done, said = play(machine)
    assert not done
    assert "reading the policy back failed" in said
    assert files_of(machine) == {sshd.MAIN: OLD_MAIN}
    assert machine.listening == PUBLIC


@pytest.mark.parametrize(("user", "goes_on"), [("root", True), ("bob", False)])
def test_keys_may_be_kept_out_for_anyone_but_the_operator(
    machine: Machine, user: str, *, goes_on: bool
) -> None:
    """`Match User backup` with PubkeyAuthentication no lets nobody in; the operator it would lock out."""
    answer = machine._answer
    no_keys = KEYS_ONLY.replace("pubkeyauthentication yes", "pubkeyauthentication no")
    machine._answer = lambda argv: (  # type: ignore[method-assign]
        no_keys if argv[0] != "systemctl" and f"user={user}," in argv[-1] else answer(argv)
    )
    done, said = play(machine, users=["bob", "root"])
    assert done is goes_on, said
    assert ("pubkeyauthentication is no" in said) is not goes_on


def test_other_listeners_than_wanted_undo_it(machine: Machine) -> None:
    machine.deaf_with = "was: Port 22"
    done, said = play(machine)
    assert not done
    assert "sshd listens on nothing, not on 100.64.0.1:22" in said
    assert "the old state is back" in said
    assert machine.listening == PUBLIC


def test_an_old_state_that_is_not_back_is_said_aloud(machine: Machine) -> None:
    machine.deaf_with = "Port 22"
    done, said = play(machine)
    assert not done
    assert "NOBODY REACHES IT NOW" in said


def test_old_files_that_do_not_start_sshd_leave_the_new_ones(machine: Machine) -> None:
    """It ran over the tailnet with older files than those on disk; going back to these would lock out."""
    broken = OLD_MAIN + "a line that sshd refuses\n"
    (machine.root / sshd.MAIN.lstrip("/")).write_text(broken)
    machine.listening = WANTED
    machine.also = frozenset({("0.0.0.0", 2222)})
    machine.deaf_with = "a line that sshd refuses"
    files = document()["files"] | {sshd.MAIN: {"old_sha256": sha(broken), "text": NEW[sshd.MAIN]}}
    done, said = play(machine, files=files)
    assert not done
    assert "it runs with the new files" in said
    assert files_of(machine) == NEW
    assert machine.listening == WANTED | machine.also


def test_a_file_that_changed_meanwhile_is_not_overwritten(machine: Machine) -> None:
    (machine.root / sshd.MAIN.lstrip("/")).write_text("Port 2222\n")
    done, said = play(machine)
    assert not done
    assert "is not what it was when this was planned" in said
    assert files_of(machine) == {sshd.MAIN: "Port 2222\n"}


def test_files_that_another_run_wrote_meanwhile_as_wanted_are_no_reason_to_stop(machine: Machine) -> None:
    """The run before was killed, its sshd-apply went on; this one was planned before that was done."""
    for path, text in NEW.items():
        (machine.root / path.lstrip("/")).write_text(text)
    done, said = play(machine)
    assert done, said
    assert files_of(machine) == NEW
    assert "systemctl restart ssh.service" in machine.ran


def test_another_run_is_waited_for(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    began, may_end, order = threading.Event(), threading.Event(), []

    def other() -> None:
        with only_one(lock):
            began.set()
            may_end.wait(10)
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(10)
    with pytest.raises(Failed, match="another sshd-apply still runs after 0 s"), only_one(lock, timeout=0):
        pass
    may_end.set()
    with only_one(lock, timeout=10):
        order.append("this")
    thread.join()
    assert order == ["other", "this"]


def test_a_link_in_place_of_a_file_is_refused(machine: Machine) -> None:
    (machine.root / "elsewhere").write_text("secret\n")
    (machine.root / sshd.DROP_IN.lstrip("/")).symlink_to(machine.root / "elsewhere")
    done, said = play(machine)
    assert not done
    assert "a link is not replaced" in said
    assert (machine.root / "elsewhere").read_text() == "secret\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"listeners": []},
        {"files": {"/etc/passwd": {"old_sha256": None, "text": "root::0:0"}}},
        {"files": {"/etc/ssh/sshd_config.d/../x.conf": {"old_sha256": None, "text": ""}}},
        {"files": {"/etc/ssh/ssh_host_ed25519_key": {"old_sha256": None, "text": ""}}},
        {"files": {sshd.MAIN: {"old_sha256": None, "text": 3}}},
        {"files": []},
    ],
)
def test_plans_that_are_none(changes: dict[str, Any]) -> None:
    parse_plan(json.dumps(document()).encode())  # positive control
    with pytest.raises(Failed):
        parse_plan(json.dumps(document(**changes)).encode())


def test_half_a_plan_is_none() -> None:
    with pytest.raises(Failed, match="cannot be read"):
        parse_plan(json.dumps(document()).encode()[:-20])


def test_options_of_the_service_count(tmp_path: Path) -> None:
    (tmp_path / "etc/default").mkdir(parents=True)
    (tmp_path / "etc/default/ssh").write_text("# SSHD_OPTS=no\nSSHD_OPTS='-o PasswordAuthentication=yes'\n")
    machine = Machine(tmp_path)
    Host(root=tmp_path, run=machine).sshd("-T")
    assert machine.ran == ["/usr/sbin/sshd -T -o PasswordAuthentication=yes"]


def test_who_can_log_in() -> None:
    def entry(name: str, shell: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", 1, 1, "", "/", shell))

    entries = [entry("root", "/bin/bash"), entry("daemon", "/usr/sbin/nologin"), entry("bob", "")]
    assert login_users(entries) == ["root", "bob"]
