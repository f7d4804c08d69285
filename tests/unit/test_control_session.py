"""Commands over a real sshd: streams, exit codes, time limits, and a link that is cut silently."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from control import session as session_module
from control.errors import ReachError
from control.reach import open_session
from control.secret import Secret
from control.session import LinkLost, Session
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Relay, Server

pytestmark = NEEDS_ROOT


@pytest.fixture
def session(operator: Operator, server: Server) -> Iterator[Session]:
    operator.host(port=server.port)
    with open_session("vps1") as made:
        yield made


def test_a_command_gives_its_streams_and_exit_code(session: Session) -> None:
    result = session.run("echo out; echo err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")


def test_it_says_how_it_came_there(session: Session, server: Server) -> None:
    assert (session.way, session.address, session.port) == ("public", "127.0.0.1", server.port)
    assert (session.user, session.auth) == ("root", "publickey")


def test_input_and_output_flow_at_once_and_unchanged(session: Session) -> None:
    data = os.urandom(6 << 20)
    assert session.run("cat", stdin=data, timeout=60).stdout == data


def test_nothing_is_added_to_the_input(session: Session) -> None:
    assert session.run("od -An -c", stdin=b"a").stdout.split() == [b"a"]
    assert session.run("wc -c").stdout.strip() == b"0"
    assert session.run("cat", stdin=Secret(b"s\x00\xff", source="env:X")).stdout == b"s\x00\xff"


def test_a_command_that_does_not_read_its_input_ends_all_the_same(session: Session) -> None:
    assert session.run("exit 3", stdin=b"x" * (4 << 20), timeout=20).exit_code == 3


def test_output_that_is_no_text_arrives(session: Session) -> None:
    assert session.run(r"printf '\377\376\000x'").stdout == b"\xff\xfe\x00x"


def test_a_signal_is_a_failure_but_no_lost_link(session: Session) -> None:
    assert session.run("kill -9 $$").exit_code != 0
    assert session.alive


def test_many_commands_at_once(session: Session) -> None:
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        answers[number] = session.run(f"sleep 0.1; echo {number}").stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {number: f"{number}\n".encode() for number in range(6)}


def test_pieces_are_told_as_they_come(session: Session) -> None:
    seen: list[tuple[str, float]] = []
    session.run(
        "echo first; sleep 1; echo last", on_output=lambda stream, _: seen.append((stream, time.monotonic()))
    )
    assert [stream for stream, _ in seen] == ["stdout", "stdout"]
    assert seen[1][1] - seen[0][1] > 0.5


def test_a_time_limit_ends_the_wait_and_the_command(session: Session, tmp_path: Path) -> None:
    mark = tmp_path / "still-running"
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        session.run(f"while sleep 0.2; do date > {mark}; done", timeout=1)
    assert time.monotonic() - began < 5
    # The host ends it too, or a command that "failed" goes on changing things.
    time.sleep(3)
    mark.unlink()
    time.sleep(1)
    assert not mark.exists()
    assert session.run("echo alive").stdout == b"alive\n"


def test_within_its_time_limit_a_command_is_left_alone(session: Session) -> None:
    assert session.run("sleep 1; exit 5", timeout=30).exit_code == 5


def test_a_link_that_is_cut_silently_is_noticed(
    operator: Operator, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(session_module, "SILENCE_S", 1.5)
    operator.host(port=relay.port)
    with open_session("vps1") as session:
        assert session.run("sleep 3; echo kept").stdout == b"kept\n", "a link that lives must be left alone"
        threading.Timer(0.5, relay.freeze).start()
        began = time.monotonic()
        with pytest.raises(LinkLost, match=r"vps1: the connection to 127\.0\.0\.1 is lost: it was silent"):
            session.run("sleep 60")
        assert time.monotonic() - began < 10
        with pytest.raises(LinkLost):
            session.run("echo again")


def descendants(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(line) for line in done.stdout.split()]
    return children + [one for child in children for one in descendants(child)]


def test_a_link_that_is_closed_is_noticed_at_once(session: Session, server: Server) -> None:
    assert server.process is not None
    sshd = server.process.pid

    def hang_up() -> None:
        # Stopped first: one that sees another die would say so before it goes.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in descendants(sshd):
                # One that is just starting the command may end of itself.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    threading.Timer(0.5, hang_up).start()
    began = time.monotonic()
    with pytest.raises(LinkLost, match="lost"):
        session.run("sleep 60")
    assert time.monotonic() - began < 10


def test_a_lost_link_is_an_error_of_ours_with_a_next_step() -> None:
    assert issubclass(LinkLost, ReachError)


def test_after_closing_nothing_runs(session: Session) -> None:
    session.close()
    session.close()
    assert not session.alive
    with pytest.raises(LinkLost):
        session.run("true")
