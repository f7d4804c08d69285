"""The proof: only a new key login that sshd itself accepted on the tailnet interface counts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control import proof, state
from control.dial import NoAnswer
from control.errors import ReachError
from control.proof import prove, prove_public
from control.reach import open_session, remember_tailnet
from control.session import Result, Session
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Person, Server, free_port, keygen

pytestmark = NEEDS_ROOT


@pytest.fixture(autouse=True)
def interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback stands in for the tailnet's interface: it has 127.0.0.1, and 127.0.0.2 is on none."""
    monkeypatch.setattr(proof, "INTERFACE", "lo")
    monkeypatch.setattr(proof, "PATIENCE_S", 1.0)
    monkeypatch.setattr(proof, "AGAIN_S", 0.4)


@pytest.fixture
def joined(operator: Operator, server: Server) -> None:
    operator.host(address="::1", port=server.port)
    remember_tailnet("vps1", ["127.0.0.1"])


def test_a_working_tailnet_is_proved(joined: None) -> None:
    done = prove("vps1")
    assert done.ok, done.sentence
    assert done.sentence == "vps1: a new key login over the tailnet (127.0.0.1) was accepted by sshd."
    assert done.session is not None
    assert (done.session.way, done.session.auth, done.session.alive) == ("tailnet", "publickey", True)
    done.session.close()


def test_every_proof_is_a_new_login(joined: None, server: Server) -> None:
    for expected in (1, 2):
        done = prove("vps1")
        assert done.session is not None
        done.session.close()
        assert server.log.count("Accepted publickey") == expected


def test_it_works_for_a_user_with_sudo(operator: Operator, server: Server, person: Person) -> None:
    operator.host(address="::1", port=server.port, user=person.name, sudo_password="env:QPT_PASSWORD")
    done = prove("vps1", ["127.0.0.1"])
    assert done.ok, done.sentence
    assert done.session is not None
    done.session.close()


def test_the_addresses_the_host_has_now_are_tried_and_no_others(joined: None, operator: Operator) -> None:
    remember_tailnet("vps1", ["127.0.0.9"])
    assert not prove("vps1").ok
    done = prove("vps1", ["127.0.0.1"])
    assert done.ok
    assert done.session is not None
    done.session.close()


def failed(*arguments: object) -> str:
    done = prove("vps1", *arguments)  # type: ignore[arg-type]
    assert not done.ok
    assert done.session is None
    return done.sentence


def test_not_joined(operator: Operator) -> None:
    operator.host()
    assert "no tailnet address is known" in failed()
    assert "no address is on lo" in failed([])


def test_refused(operator: Operator) -> None:
    operator.host(address="::1", port=free_port())
    assert "Connection refused" in failed(["127.0.0.1"])


def test_a_path_that_comes_up_late_is_waited_for(
    joined: None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def late(name: str, **how: Any) -> Session:
        tried.append(how)
        if len(tried) < 3:
            raise NoAnswer(f"{name}: not yet")
        return open_session(name, **how)

    monkeypatch.setattr(proof, "open_session", late)
    done = prove("vps1")
    assert done.ok, done.sentence
    assert done.session is not None
    done.session.close()
    assert len(tried) == 3


def test_a_login_that_is_refused_is_not_tried_again(
    joined: None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(name: str, **how: Any) -> Session:
        tried.append(how)
        raise ReachError(f"{name}: no")

    monkeypatch.setattr(proof, "open_session", refuse)
    assert failed() == "vps1: no"
    assert len(tried) == 1


def test_another_key(joined: None, server: Server) -> None:
    open_session("vps1", way="public").close()
    server.new_host_keys()
    server.restart()
    assert "the host key has changed" in failed()


def test_a_login_without_a_key_does_not_count(operator: Operator, server: Server, person: Person) -> None:
    operator.key.rename(operator.home / "not-offered")
    operator.host(address="::1", port=server.port, user=person.name, login_password="env:QPT_PASSWORD")
    open_session("vps1", way="public").close()
    assert "refused the login" in failed(["127.0.0.1"])


def test_a_wrong_key(joined: None, operator: Operator) -> None:
    keygen(operator.key)
    assert "refused the login of root" in failed()


def test_an_address_that_is_not_on_the_interface(joined: None) -> None:
    assert "127.0.0.2, which is not on lo (" in failed(["127.0.0.2"])


def test_an_interface_that_is_not_there(joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "INTERFACE", "none0")
    assert "no address is on none0" in failed()


# From OpenSSH 9.8 on, sshd only listens; this program carries the session.
SESSION_PROGRAM = Path("/usr/lib/openssh/sshd-session")


def copied(program: Path, to: Path) -> Path:
    to.write_bytes(program.read_bytes())
    to.chmod(0o755)
    return to


@contextlib.contextmanager
def done_by(name: str, server: Server, folder: Path) -> Iterator[Path]:
    """sshd's work done by a program of another name: what Tailscale SSH looks like from its sessions."""
    program = copied(Path("/usr/sbin/sshd"), folder / name)
    config = (server.directory / "sshd_config").read_text()
    if SESSION_PROGRAM.exists():
        (folder / "session").mkdir()
        program, listener = copied(SESSION_PROGRAM, folder / "session" / name), program
        config = f"SshdSessionPath {program}\n{config}"
    else:
        listener = program
    (folder / "config").write_text(config)
    server.stop()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(listener), "-D", "-e", "-f", str(folder / "config")], stderr=log)
    time.sleep(1)
    try:
        yield program
    finally:
        process.terminate()
        process.wait(10)


def test_tailscale_ssh_is_not_sshd(operator: Operator, server: Server, tmp_path: Path) -> None:
    operator.host(address="::1", port=server.port)
    with done_by("tailscaled", server, tmp_path):
        sentence = failed(["127.0.0.1"])
    assert "Tailscale SSH answered at 127.0.0.1 instead of sshd" in sentence
    assert "tailscale set --ssh=false" in sentence


def test_any_other_program_is_not_sshd(operator: Operator, server: Server, tmp_path: Path) -> None:
    operator.host(address="::1", port=server.port)
    with done_by("dropbear", server, tmp_path) as program:
        sentence = failed(["127.0.0.1"])
    assert "was not accepted by the host's own sshd" in sentence
    assert str(program) in sentence


@pytest.mark.parametrize(
    ("ancestors", "accepted"),
    [
        ("/usr/bin/dash\n/usr/sbin/sshd\n", True),
        ("/usr/bin/dash\n/usr/lib/openssh/sshd-session\n/usr/sbin/sshd\n", True),
        ("/usr/bin/dash\n/usr/sbin/sshd (deleted)\n", True),
        ("/usr/bin/dash\n/usr/sbin/tailscaled\n/usr/lib/systemd/systemd\n", False),
        ("/usr/bin/dash\n/usr/sbin/tailscaled\n/usr/sbin/sshd\n", False),
        ("/usr/bin/dash\n/tmp/sshd\n", False),
        ("/usr/bin/dash\nunreadable\n", False),
        ("", False),
    ],
)
def test_whose_child_the_session_is(
    joined: None, monkeypatch: pytest.MonkeyPatch, ancestors: str, accepted: bool
) -> None:
    real = Session.run

    def told(self: Session, command: str, **how: object) -> Result:
        if command == proof._ANCESTORS:
            return Result(0, ancestors.encode(), b"")
        return real(self, command, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "run", told)
    done = prove("vps1")
    assert done.ok is accepted, done.sentence
    if done.session:
        done.session.close()


def test_a_program_with_a_nasty_name_does_not_confuse_the_walk(joined: None, tmp_path: Path) -> None:
    """Field 2 of /proc/PID/stat is the program's name, with whatever blanks and brackets it has."""
    nasty = tmp_path / "x) S 1 (y"
    nasty.symlink_to(sys.executable)
    with open_session("vps1", way="tailnet") as session:
        inner = f"import subprocess; subprocess.run(['sh', '-c', {proof._ANCESTORS!r}])"
        answer = session.run(f"'{nasty}' -c \"$(cat)\"; true", stdin=inner.encode())
    assert b"/usr/sbin/sshd" in answer.stdout or b"sshd-session" in answer.stdout


def test_a_failed_proof_leaves_no_connection(joined: None, server: Server) -> None:
    assert server.process is not None
    failed(["127.0.0.2"])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, check=False)
        if left.returncode == 1:
            return
        time.sleep(0.1)
    raise AssertionError("a connection is still open")


def test_a_failed_proof_forgets_nothing(joined: None) -> None:
    before = state.load("vps1")
    assert os.geteuid() == 0
    failed(["127.0.0.9"])
    assert state.load("vps1") == before


# --- the public way (deploys/undo.py) -----------------------------------------------------------------


def test_a_public_login_is_proved_although_the_tailnet_is_known(operator: Operator, server: Server) -> None:
    operator.host(address="127.0.0.2", port=server.port)
    remember_tailnet("vps1", ["127.0.0.1"])
    done = prove_public("vps1")
    assert done.ok, done.sentence
    assert done.sentence == "vps1: a new key login at the public address (127.0.0.2) was accepted by sshd."
    assert done.session is not None
    assert (done.session.way, done.session.auth, done.session.alive) == ("public", "publickey", True)
    done.session.close()


def test_a_public_address_that_is_the_tailnets_proves_nothing(joined: None) -> None:
    done = prove_public("vps1")
    assert (done.ok, done.session) == (False, None)
    assert "the login at ::1 arrived at ::1, which is no public address of the host" in done.sentence


def test_no_public_login_without_a_key_or_a_server(
    operator: Operator, server: Server, person: Person
) -> None:
    operator.host(address="127.0.0.2", port=free_port())
    assert "Connection refused" in prove_public("vps1").sentence
    operator.key.rename(operator.home / "not-offered")
    operator.host(address="127.0.0.2", port=server.port, user=person.name, login_password="env:QPT_PASSWORD")
    assert "refused the login" in prove_public("vps1").sentence
