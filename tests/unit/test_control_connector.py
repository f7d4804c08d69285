"""pyinfra's connector against a real sshd: commands, files, and what the operator gets to see."""

from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyinfra.api import Config, HiddenValue, Inventory, QuoteString, State, StringCommand, output
from pyinfra.api.exceptions import ConnectError, NoConnectorError

from control import connector as connector_module
from control import lock
from control.connector import QuietportConnector, Unanswered, printable
from control.errors import SettingsError
from control.lock import LockError
from control.reach import open_session, remember_tailnet
from control.secret import Secret
from control.session import Session
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Person, Server, forget_caches, free_port

pytestmark = NEEDS_ROOT
ROOT = Path(__file__).parents[2]


def made(name: str = "vps1") -> QuietportConnector:
    """The connector as pyinfra makes it, through the entry point."""
    inventory = Inventory(([f"@quietport/{name}"], {}))
    State(inventory, Config())
    host = inventory.get_host(name)
    assert isinstance(host.connector, QuietportConnector), "is the project installed here?"
    return host.connector


@pytest.fixture
def connector(operator: Operator, server: Server) -> Iterator[QuietportConnector]:
    operator.host(port=server.port)
    connector = made()
    connector.connect()
    yield connector
    connector.disconnect()


def test_a_command_runs_and_its_lines_keep_their_order(connector: QuietportConnector) -> None:
    ok, output = connector.run_shell_command(
        StringCommand("echo a; sleep 0.2; echo b >&2; sleep 0.2; printf c")
    )
    assert ok
    assert [(line.buffer_name, line.line) for line in output] == [
        ("stdout", "a"),
        ("stderr", "b"),
        ("stdout", "c"),
    ]


def test_success_is_what_the_caller_says(connector: QuietportConnector) -> None:
    assert not connector.run_shell_command(StringCommand("exit 3"))[0]
    assert connector.run_shell_command(StringCommand("exit 3"), _success_exit_codes=[0, 3])[0]
    assert not connector.run_shell_command(StringCommand("exit 0"), _success_exit_codes=[3])[0]


def test_shell_arguments(connector: QuietportConnector, tmp_path: Path) -> None:
    ok, output = connector.run_shell_command(
        StringCommand("pwd; echo $A; echo $BASH_VERSION"),
        _chdir=str(tmp_path),
        _env={"A": "x y"},
        _shell_executable="bash",
    )
    assert ok
    assert output.stdout_lines[:2] == [str(tmp_path), "x y"]
    assert output.stdout_lines[2]


def test_quoting_survives(connector: QuietportConnector) -> None:
    nasty = 'a\'b "c" $HOME `id` \\ !x'
    assert connector.run_shell_command(StringCommand("printf %s", QuoteString(nasty)))[1].stdout == nasty


@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        (b"exact\x00", b"exact\x00"),
        (Secret(b"s", source="env:X"), b"s"),
        ("text", b"text\n"),
        (["a", "b\n"], b"a\nb\n"),
        (None, b""),
    ],
)
def test_input_of_every_kind(connector: QuietportConnector, given: object, arrives: bytes) -> None:
    ok, output = connector.run_shell_command(StringCommand("od -An -v -tx1"), _stdin=given)
    assert ok
    assert bytes.fromhex(output.stdout.replace("\n", "")) == arrives


def test_output_that_is_no_utf8_is_kept_and_fails_nothing(connector: QuietportConnector) -> None:
    ok, output = connector.run_shell_command(StringCommand(r"printf 'before\n\377\376\nafter\n'"))
    assert ok
    assert output.stdout_lines == ["before", "\ufffd\ufffd", "after"]


def test_a_character_across_two_pieces_is_whole(connector: QuietportConnector) -> None:
    assert (
        connector.run_shell_command(StringCommand(r"printf '\303'; sleep 0.3; printf '\244\n'"))[1].stdout
        == "\u00e4"
    )


def test_a_command_that_takes_too_long_fails_with_a_sentence(connector: QuietportConnector) -> None:
    ok, output = connector.run_shell_command(StringCommand("echo before; sleep 30"), _timeout=1)
    assert not ok
    assert isinstance(output, Unanswered)
    assert output.output_lines == ["before", f"vps1: failed: {output.sentence}"]
    assert "took longer than 1 s" in output.sentence
    assert connector.run_shell_command(StringCommand("true"))[0]


def test_a_command_without_a_limit_gets_one(
    connector: QuietportConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector_module, "COMMAND_LIMIT_S", 1)
    ok, output = connector.run_shell_command(StringCommand("sleep 30"))
    assert not ok
    assert isinstance(output, Unanswered)


def test_a_lost_link_fails_with_a_sentence(connector: QuietportConnector, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    command = StringCommand(f"echo said; touch {mark}; sleep 3; echo more")
    assert connector.run_shell_command(command)[1].output_lines == ["said", "more"]
    session = connector.session
    assert session is not None
    mark.unlink()

    def cut() -> None:
        while not mark.exists():
            time.sleep(0.05)
        # What it said is on its way; a busy machine may take its time.
        time.sleep(1)
        session.close()

    threading.Thread(target=cut, daemon=True).start()
    ok, output = connector.run_shell_command(command)
    assert not ok
    assert isinstance(output, Unanswered)
    assert output.output_lines == ["said", f"vps1: failed: {output.sentence}"]
    assert output.sentence.startswith("the connection to 127.0.0.1 is lost: ")
    assert output.sentence.endswith("Run the same command again.")
    again = connector.run_shell_command(StringCommand("true"))
    assert not again[0]
    assert isinstance(again[1], Unanswered)


def test_what_a_host_prints_cannot_drive_the_terminal(
    connector: QuietportConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(output, "_echo", lambda message, **_: shown.append(message))
    bad = StringCommand(r"printf '\033]0;owned\007x\n'; printf '\033[2J\n' >&2; exit 1")
    _, said = connector.run_shell_command(bad, print_output=True)
    assert any("owned" in line for line in shown)
    for text in (said.output, *shown):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert printable("a\tb\x1b\u202e") == "a\tb\ufffd\ufffd"


def test_data_of_a_command_that_went_well_is_not_touched(connector: QuietportConnector) -> None:
    assert connector.run_shell_command(StringCommand(r"printf 'a\033b\000c'"))[1].stdout == "a\x1bb\x00c"


def test_pyinfras_sudo_arguments_are_not_needed(connector: QuietportConnector) -> None:
    ok, output = connector.run_shell_command(StringCommand("id -u"), _sudo=True, _sudo_password="never")
    assert (ok, output.stdout) == (True, "0")


def test_another_user_by_name(connector: QuietportConnector, person: Person) -> None:
    for argument in ("_sudo_user", "_su_user"):
        ok, output = connector.run_shell_command(
            StringCommand("id -un; echo $HOME; cat"), _stdin=b"in", **{argument: person.name}
        )
        assert ok, output.output
        assert output.stdout_lines == [person.name, f"/home/{person.name}", "in"]


def test_a_user_who_is_not_there(connector: QuietportConnector) -> None:
    ok, output = connector.run_shell_command(StringCommand("true"), _sudo_user="no-such-user")
    assert not ok
    assert output.stderr_lines[0].startswith("sudo: unknown user")


@pytest.mark.parametrize(
    "how",
    [
        {"command": StringCommand("echo", QuoteString(HiddenValue("canary")))},
        {"command": StringCommand("true"), "_env": {"KEY": HiddenValue("canary")}},
    ],
)
def test_hidden_values_never_reach_an_argv(connector: QuietportConnector, how: dict[str, object]) -> None:
    ok, output = connector.run_shell_command(**how)  # type: ignore[arg-type]
    assert not ok
    assert "process list" in output.stderr
    assert "canary" not in output.output


def test_nothing_secret_is_logged(connector: QuietportConnector, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    connector.run_shell_command(
        StringCommand("cat >/dev/null"), _stdin=Secret(b"canary", source="env:X"), print_input=True
    )
    assert "Running command on vps1" in caplog.text
    assert "canary" not in caplog.text


# --- files ---


def test_a_new_file_is_written(connector: QuietportConnector, tmp_path: Path) -> None:
    target = tmp_path / "a b'c.bin"
    data = os.urandom(3 << 20)
    assert connector.put_file(io.BytesIO(data), str(target))
    assert target.read_bytes() == data
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [
        *(p for p in tmp_path.iterdir() if not p.name.startswith(".quietport"))
    ]


def test_mode_and_owner_of_an_existing_file_stay(connector: QuietportConnector, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.write_text("old")
    target.chmod(0o640)
    os.chown(target, 65534, 65534)
    assert connector.put_file(io.StringIO("new"), str(target))
    status = target.stat()
    assert (target.read_text(), status.st_mode & 0o777, status.st_uid, status.st_gid) == (
        "new",
        0o640,
        65534,
        65534,
    )


def test_a_link_is_followed(connector: QuietportConnector, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    assert connector.put_file(io.BytesIO(b"new"), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_file_of_this_machine_by_its_name(connector: QuietportConnector, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"\xff")
    assert connector.put_file(str(tmp_path / "source"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"\xff"


@pytest.mark.parametrize("where", ["missing/file", "directory"])
def test_what_cannot_be_written_fails_and_leaves_nothing(
    connector: QuietportConnector, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    (tmp_path / "directory").mkdir()
    assert not connector.put_file(io.BytesIO(b"x"), str(tmp_path / where))
    assert "was not uploaded" in caplog.text
    assert not list(tmp_path.glob("**/.quietport.*"))


def test_an_upload_that_was_cut_does_not_become_the_file(
    connector: QuietportConnector, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    session = connector.session
    assert session is not None
    whole = session.run

    def cut(command: str, **how: object) -> object:
        return whole(command, **{**how, "stdin": b"hal"})  # type: ignore[arg-type]

    session.run = cut  # type: ignore[method-assign,assignment]
    assert not connector.put_file(io.BytesIO(b"halves"), str(target))
    assert target.read_text() == "old"
    session.run = whole  # type: ignore[method-assign]
    assert connector.put_file(io.BytesIO(b"halves"), str(target)), "the positive control"


def test_a_file_is_read(connector: QuietportConnector, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "remote").write_bytes(data)
    taken = io.BytesIO()
    assert connector.get_file(str(tmp_path / "remote"), taken)
    assert taken.getvalue() == data
    assert connector.get_file(str(tmp_path / "remote"), str(tmp_path / "local"))
    assert (tmp_path / "local").read_bytes() == data
    assert not connector.get_file(str(tmp_path / "gone"), taken)


# --- connecting ---


def test_the_way_is_said(operator: Operator, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    operator.host(port=server.port)
    connector = made()
    connector.connect()
    assert "[vps1] reached by its public address 127.0.0.1" in caplog.text
    remember_tailnet("vps1", ["127.0.0.2"])
    session = open_session("vps1", way="tailnet")
    before = connector.session
    connector.switch(session)
    assert "[vps1] reached by its tailnet address 127.0.0.2" in caplog.text
    assert before is not None
    assert not before.alive
    assert (
        connector.run_shell_command(StringCommand("echo $SSH_CONNECTION"))[1].stdout.split()[2] == "127.0.0.2"
    )
    connector.disconnect()
    assert not session.alive


@pytest.mark.parametrize("trouble", ["closed port", "no sudo right"])
def test_a_host_that_cannot_be_used_fails_alone_with_our_sentence(
    operator: Operator, server: Server, person: Person, trouble: str
) -> None:
    if trouble == "closed port":
        operator.host(port=free_port())
        expected = "cannot connect to"
    else:
        operator.host(port=server.port, user=person.name)
        expected = "for a password"
    with pytest.raises(ConnectError, match=expected):
        made().connect()


def test_a_host_that_does_not_answer_in_time_fails_alone(
    operator: Operator, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.host(port=server.port)

    def slow(session: Session) -> None:
        raise TimeoutError(f"{session.name}: a command took longer than 30 s")

    monkeypatch.setattr(Session, "become_root", slow)
    with pytest.raises(ConnectError, match=r"^a command took longer than 30 s"):
        made().connect()


# --- the lock ---


def test_with_the_lock_every_command_is_fenced_also_after_a_switch(
    connector: QuietportConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "lock"
    monkeypatch.setattr(lock, "DIRECTORY", str(place))
    owner = place / "lock.owner"
    connector.take_lock()
    connector.take_lock()
    assert owner.exists()
    before = connector.session
    connector.switch(open_session("vps1"))
    assert before is not None
    assert not before.alive
    assert connector.lock is not None
    assert connector.lock.held
    assert connector.run_shell_command(StringCommand("echo ran"))[1].stdout == "ran"
    assert connector.put_file(io.BytesIO(b"new"), str(tmp_path / "file"))
    owner.write_text("another\nroot@box\n4711\n2026-11-21 10:00:00\n")
    ok, said = connector.run_shell_command(StringCommand(f"touch {tmp_path}/never"))
    assert not ok
    assert said.stderr == (
        "refused: root@box (process 4711) took the lock over at 2026-11-21 10:00:00 UTC; nothing was done."
    )
    assert not connector.put_file(io.BytesIO(b"newer"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"new"
    proof = open_session("vps1")
    with pytest.raises(LockError, match="was lost to root@box"):
        connector.switch(proof)
    assert connector.session is not proof
    connector.disconnect()
    assert owner.exists(), "it is the other one's"


def test_without_the_lock_nothing_is_fenced(connector: QuietportConnector) -> None:
    assert connector._fenced("true") == "true"


def test_names(operator: Operator) -> None:
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.1"\n[hosts.vps2]\naddress = "192.0.2.2"\n')
    assert [name for name, _, _ in QuietportConnector.make_names_data("vps1")] == ["vps1"]
    assert [name for name, _, _ in QuietportConnector.make_names_data(None)] == ["vps1", "vps2"]
    with pytest.raises(SettingsError, match="Did you mean vps1"):
        list(QuietportConnector.make_names_data("vsp1"))
    with pytest.raises(NoConnectorError):
        Inventory((["@quietprt/vps1"], {}))


# --- pyinfra itself, as a person types it ---


def pyinfra(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("pyinfra")
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_fact_through_the_inventory_file(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    done = pyinfra("inventory", "fact", "server.User")
    assert done.returncode == 0, done.stderr
    assert '"vps1": "root"' in done.stderr
    assert "reached by its public address 127.0.0.1" in done.stderr


def test_an_operation_and_an_upload_through_pyinfra_and_a_proxy(
    operator: Operator, server: Server, person: Person, tmp_path: Path
) -> None:
    """Under gevent, through a child process, with sudo: all that differs from the other tests."""
    carrier = tmp_path / "carrier.py"
    carrier.write_text(
        "import os, socket, sys, threading\n"
        "link = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def send():\n"
        "    while data := os.read(0, 65536): link.sendall(data)\n"
        "threading.Thread(target=send, daemon=True).start()\n"
        "while data := link.recv(65536): os.write(1, data)\n"
    )
    operator.host(
        port=server.port,
        user=person.name,
        sudo_password="env:QPT_PASSWORD",
        tailnet_proxy=f"{sys.executable} {carrier} %h %p",
    )
    remember_tailnet("vps1", ["127.0.0.2"])
    big = tmp_path / "big"
    big.write_bytes(os.urandom(5 << 20))
    target = tmp_path / "target"
    done = pyinfra("-y", "inventory", "files.put", f"src={big}", f"dest={target}", "mode=600")
    assert done.returncode == 0, done.stderr
    assert "reached by its tailnet address 127.0.0.2" in done.stderr
    assert target.read_bytes() == big.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o600
    again = pyinfra("--dry", "inventory", "files.put", f"src={big}", f"dest={target}", "mode=600")
    (row,) = [line for line in again.stderr.splitlines() if line.strip().startswith("files.put (")]
    assert row.split()[-2:] == ["-", "-"], "the second run must find nothing to change"
    assert person.password not in done.stderr + done.stdout


def test_two_hosts_one_of_which_is_down(operator: Operator, server: Server) -> None:
    operator.hosts(
        f'[defaults]\nuser = "root"\n[hosts.up]\naddress = "127.0.0.1"\nport = {server.port}\n'
        f'[hosts.down]\naddress = "127.0.0.1"\nport = {free_port()}\n'
    )
    done = pyinfra("-y", "inventory", "fact", "server.User")
    assert '"up": "root"' in done.stderr
    assert "cannot connect to" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_no_ssh_is_one_sentence_without_a_traceback(operator: Operator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        operator.host(port=other.getsockname()[1])
        done = pyinfra("-y", "inventory", "fact", "server.User")
    assert done.returncode != 0
    assert "does not answer as SSH" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_limit_takes_the_plain_name(operator: Operator, server: Server) -> None:
    operator.hosts(
        f'[defaults]\nuser = "root"\n[hosts.up]\naddress = "127.0.0.1"\nport = {server.port}\n'
        f'[hosts.down]\naddress = "127.0.0.1"\nport = {free_port()}\n'
    )
    done = pyinfra("inventory", "--limit", "up", "fact", "server.User")
    assert done.returncode == 0, done.stderr
    assert '"up": "root"' in done.stderr
    assert "down" not in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no host in it"),
        ("[hosts.a]\naddres = '192.0.2.1'\n", "Did you mean address?"),
        ("[", "not TOML"),
    ],
)
def test_a_wrong_hosts_file_is_a_sentence_and_an_error(operator: Operator, text: str, sentence: str) -> None:
    operator.hosts(text)
    done = pyinfra("inventory", "fact", "server.User")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cached_secret_is_read_once(
    operator: Operator, server: Server, person: Person, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    reader = tmp_path / "reader"
    reader.write_text(f"#!/bin/sh\necho x >> {count}\necho {person.password}\n")
    reader.chmod(0o755)
    operator.host(port=server.port, user=person.name, sudo_password=f"command:{reader}")
    for _ in range(2):
        connector = made()
        connector.connect()
        connector.disconnect()
    assert count.read_text() == "x\n"
    forget_caches()
