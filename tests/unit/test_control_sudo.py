"""Root by way of sudo: the password goes to sudo's standard input and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from control.errors import ReachError
from control.reach import open_session
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Person, Server, forget_caches, sudo_rule

pytestmark = NEEDS_ROOT


@pytest.fixture
def described(operator: Operator, server: Server, person: Person) -> None:
    operator.host(port=server.port, user=person.name, sudo_password="env:QPT_PASSWORD")


def test_commands_run_as_root_and_read_their_own_input_only(described: None, person: Person) -> None:
    with open_session("vps1") as session:
        assert session.run("id -u").stdout == b"0\n"
        assert session.run("cat").stdout == b"", "the password must not reach the command"
        data = os.urandom(1 << 20)
        assert session.run("cat", stdin=data, timeout=60).stdout == data
        assert session.run("cat", stdin=b"quietport-begins\nfirst\n").stdout == b"quietport-begins\nfirst\n"
        assert session.run("id -un", escalate=False).stdout.decode().strip() == person.name
        assert session.run("exit 9").exit_code == 9
        assert session.run("echo $HOME").stdout == b"/root\n"


def test_a_time_limit_ends_a_command_of_root_too(described: None, tmp_path: Path) -> None:
    with open_session("vps1") as session:
        with pytest.raises(TimeoutError):
            session.run("exec sleep 4242", timeout=1)
        time.sleep(3)
        assert (
            subprocess.run(["pgrep", "-f", "^sleep 4242"], check=False, capture_output=True).returncode == 1
        )


def test_without_a_password_where_sudo_asks_for_none(
    operator: Operator, server: Server, person: Person
) -> None:
    sudo_rule(person, f"{person.name} ALL=(ALL:ALL) NOPASSWD: ALL\n")
    operator.host(port=server.port, user=person.name)
    with open_session("vps1") as session:
        assert session.run("id -u; cat", stdin=b"mine").stdout == b"0\nmine"


def test_a_password_that_is_suddenly_not_asked_for_stays_out_of_the_input(
    described: None, person: Person
) -> None:
    """cloud-init may give the user NOPASSWD while we are at work."""
    with open_session("vps1") as session:
        assert session.run("cat", stdin=b"before").stdout == b"before"
        sudo_rule(person, f"{person.name} ALL=(ALL:ALL) NOPASSWD: ALL\n")
        assert session.run("cat", stdin=b"after").stdout == b"after"


def test_a_wrong_password_is_a_sentence(described: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPT_PASSWORD", "not-it")
    forget_caches()
    with (
        open_session("vps1") as session,
        pytest.raises(ReachError, match="sudo refused the password of") as caught,
    ):
        session.run("true")
    assert "sudo_password" in caught.value.hint
    assert "not-it" not in str(caught.value)


def test_no_password_given_is_a_sentence(operator: Operator, server: Server, person: Person) -> None:
    operator.host(port=server.port, user=person.name)
    with open_session("vps1") as session, pytest.raises(ReachError, match="for a password") as caught:
        session.run("true")
    assert "sudo_password" in caught.value.hint


def test_no_right_to_use_sudo_is_a_sentence(described: None, person: Person) -> None:
    sudo_rule(person, "# nothing\n")
    with open_session("vps1") as session, pytest.raises(ReachError, match="has no right to use sudo"):
        session.run("true")


def test_a_host_without_sudo_is_a_sentence(operator: Operator, server: Server, person: Person) -> None:
    # A PATH of the server's without sudo, as on a host where it was never installed.
    server.options = ("SetEnv PATH=/nowhere",)
    tools = server.directory / "tools"
    tools.mkdir()
    for name in ("sh", "env"):
        (tools / name).symlink_to(f"/bin/{name}")
    server.options = (f"SetEnv PATH={tools}",)
    server.restart()
    operator.host(port=server.port, user=person.name)
    with open_session("vps1") as session, pytest.raises(ReachError, match="has no sudo"):
        session.run("true")


def test_the_source_is_read_only_when_sudo_asks(operator: Operator, server: Server, person: Person) -> None:
    sudo_rule(person, f"{person.name} ALL=(ALL:ALL) NOPASSWD: ALL\n")
    operator.host(port=server.port, user=person.name, sudo_password="env:NOT_SET_ANYWHERE")
    with open_session("vps1") as session:
        assert session.run("id -u").stdout == b"0\n"


@contextmanager
def traced(server: Server, log: Path) -> Iterator[None]:
    """Record argv and environment of every program sshd's descendants start, at exec and not by polling."""
    assert server.process is not None
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-v",
            "-s",
            "65536",
            "-e",
            "trace=execve",
            "-o",
            str(log),
            "-p",
            str(server.process.pid),
        ],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    assert b"attached" in tracer.stderr.readline()
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def test_the_password_is_in_no_argv_and_no_environment(
    described: None, server: Server, person: Person, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    log = tmp_path / "exec.log"
    with traced(server, log), open_session("vps1") as session:
        assert session.run("id -u", stdin=b"content").stdout == b"0\n"
        # Positive controls: programs that end at once, with a mark in argv and in the environment.
        session.run("/bin/true control-in-argv; MARK=control-in-environment /bin/true")
    seen = log.read_text(errors="replace")
    assert "control-in-argv" in seen
    assert "MARK=control-in-environment" in seen
    assert '"/usr/bin/sudo"' in seen or '"sudo"' in seen
    assert person.password not in seen
    assert person.password not in caplog.text
    assert person.password not in server.log
    assert person.password not in "".join(path.read_text() for path in tmp_path.glob("state/**/*.json"))
