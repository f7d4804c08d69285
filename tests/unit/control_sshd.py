"""A real OpenSSH server on loopback, an operator of its own, and a link that can be cut, for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
import pytest

from control import login, reach
from control import settings as settings_module

SSHD = "/usr/sbin/sshd"
KEY_TYPES = ("ed25519", "ecdsa", "rsa")
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="runs sshd as root, and makes users")


def keygen(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Make a key pair; returns the private key's path."""
    path.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)],
        check=True,
        timeout=60,
    )
    return path


def fingerprint(public: Path) -> str:
    """What ssh-keygen -lf says of a public key: the independent word on ours."""
    done = subprocess.run(
        ["ssh-keygen", "-lf", str(public)], check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.split()[1]


def free_port() -> int:
    """A port that no outgoing connection of this machine takes while its sshd is restarted (ip(7))."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """One sshd with keys of its own."""

    directory: Path
    port: int
    keys: tuple[str, ...] = KEY_TYPES
    options: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ("127.0.0.1", "127.0.0.2", "::1")
    process: subprocess.Popen[bytes] | None = None
    _log: list[Path] = field(default_factory=list)

    def host_key(self, kind: str) -> Path:
        return self.directory / f"host_{kind}"

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self._log)

    def new_host_keys(self) -> None:
        """As after a reinstall."""
        for kind in KEY_TYPES:
            keygen(self.host_key(kind), kind)

    def start(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        config = self.directory / "sshd_config"
        lines = [f"Port {self.port}", *(f"ListenAddress {address}" for address in self.addresses)]
        lines += [f"HostKey {self.host_key(kind)}" for kind in self.keys]
        lines += [
            f"AuthorizedKeysFile {self.directory}/authorized_keys .ssh/authorized_keys",
            "StrictModes no",
            "PidFile none",
            "UsePAM yes",
        ]
        lines += ["PermitRootLogin yes", "LogLevel VERBOSE", "UseDNS no", *self.options]
        config.write_text("\n".join(lines) + "\n")
        self._log.append(self.directory / f"log{len(self._log)}")
        with self._log[-1].open("wb") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
        # Its own word, of each address: a connection could be answered by somebody else.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            said = self._log[-1].read_text(errors="replace")
            if said.count("Server listening on ") == len(self.addresses):
                return
            time.sleep(0.05)
        raise AssertionError(f"sshd does not listen: {self.log}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()


@dataclass
class Operator:
    """The operator's side: a home, a state directory and a hosts file, all the test's own."""

    home: Path
    hosts_file: Path
    state: Path

    @property
    def key(self) -> Path:
        return self.home / ".ssh/id_ed25519"

    def hosts(self, text: str) -> None:
        """Write the hosts file, and have this process read it anew."""
        self.hosts_file.write_text(text)
        forget_caches()

    def host(self, name: str = "vps1", **values: object) -> None:
        """A hosts file with one host."""
        values = {"address": "127.0.0.1", "user": "root", **values}
        self.hosts(
            f"[hosts.{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())
        )


def _toml(value: object) -> str:
    return json.dumps(value if isinstance(value, int) else str(value))


def forget_caches() -> None:
    """As a new process of the operator's."""
    settings_module.fleet.cache_clear()
    reach._peers.cache_clear()
    reach._secret.cache_clear()
    login._unlocked.clear()


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    made = Operator(home=home, hosts_file=tmp_path / "hosts.toml", state=tmp_path / "state")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("QUIETPORT_HOSTS", str(made.hosts_file))
    monkeypatch.setenv("QUIETPORT_STATE", str(made.state))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    # No test waits for an sshd that does not come back, but the one about that.
    monkeypatch.setattr("control.reach.RESTART_S", 0.0)
    # No tailscale of the machine the tests run on.
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    keygen(made.key)
    forget_caches()
    yield made
    forget_caches()


@pytest.fixture
def tailscale(tmp_path: Path, operator: Operator) -> Path:
    """A stand-in for the operator's tailscale: what is written to the returned path is its status."""
    status = tmp_path / "status.json"
    program = tmp_path / "bin/tailscale"
    program.write_text(f'#!/bin/sh\n[ "$*" = "status --json" ] && exec cat {status}\nexit 2\n')
    program.chmod(0o755)
    return status


@pytest.fixture(scope="session")
def _host_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("host_keys")
    for kind in KEY_TYPES:
        keygen(directory / f"host_{kind}", kind)
    return directory


@pytest.fixture
def server(tmp_path: Path, operator: Operator, _host_keys: Path) -> Iterator[Server]:
    directory = tmp_path / "sshd"
    shutil.copytree(_host_keys, directory)
    (directory / "authorized_keys").write_text(operator.key.with_suffix(".pub").read_text())
    made = Server(directory=directory, port=free_port())
    made.start()
    yield made
    made.stop()


class Relay:
    """A TCP relay to a port that can be frozen: the link is cut, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._running = threading.Event()
        self._running.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._running.clear()

    def close(self) -> None:
        self._listener.close()
        for stream in self._sockets:
            stream.close()
        self._running.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._running.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    made = Relay(server.port)
    yield made
    made.close()


@dataclass(frozen=True)
class Person:
    """A throwaway user of this machine, with a password."""

    name: str
    password: str


@pytest.fixture(scope="session")
def _person_account() -> Iterator[Person]:
    person = Person(name=f"qpt{os.getpid()}", password=f"canary-{os.urandom(8).hex()}")
    subprocess.run(["useradd", "-m", "-s", "/bin/sh", person.name], check=True, timeout=30)
    try:
        subprocess.run(
            ["chpasswd"], input=f"{person.name}:{person.password}\n", text=True, check=True, timeout=30
        )
        yield person
    finally:
        subprocess.run(["userdel", "-r", "-f", person.name], check=False, capture_output=True, timeout=30)


@pytest.fixture
def person(_person_account: Person, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Person]:
    """A user who may log in with the operator's key, and use sudo with the password, QPT_PASSWORD."""
    # sshd reads it as the user, who cannot look into the test's own directory.
    ssh = Path(f"/home/{_person_account.name}/.ssh")
    ssh.mkdir(exist_ok=True)
    (ssh / "authorized_keys").write_text(operator.key.with_suffix(".pub").read_text())
    rule = Path("/etc/sudoers.d") / _person_account.name
    rule.write_text(f"{_person_account.name} ALL=(ALL:ALL) ALL\n")
    rule.chmod(0o440)
    monkeypatch.setenv("QPT_PASSWORD", _person_account.password + "\n")
    yield _person_account
    rule.unlink(missing_ok=True)


def sudo_rule(person: Person, text: str) -> None:
    """Replace what the person may do with sudo."""
    path = Path("/etc/sudoers.d") / person.name
    path.write_text(text)
    path.chmod(0o440)


def key_count(path: Path) -> int:
    return len(paramiko.HostKeys(str(path)).keys())
