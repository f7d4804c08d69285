"""Which way is taken, with which key, through what; and what is said when none works."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
import pytest

from control import dial, state
from control.errors import ReachError, SettingsError
from control.pins import known_hosts_path
from control.reach import open_session, remember_port, remember_tailnet, route, ssh_config
from control.session import Session
from tests.unit.control_sshd import (
    NEEDS_ROOT,
    Operator,
    Person,
    Relay,
    Server,
    fingerprint,
    forget_caches,
    free_port,
    keygen,
)

pytestmark = NEEDS_ROOT
CARRIER = """
import os, socket, sys, threading
link = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def send():
    while data := os.read(0, 65536):
        link.sendall(data)
threading.Thread(target=send, daemon=True).start()
while data := link.recv(65536):
    os.write(1, data)
"""


def opened(**how: object) -> Session:
    session = open_session("vps1", **how)  # type: ignore[arg-type]
    session.close()
    return session


class RefusesKeys(paramiko.ServerInterface):
    """A server that wants a key, and takes none."""

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_FAILED


@contextmanager
def calling_itself(version: str, directory: Path) -> Iterator[int]:
    """The port of an SSH server with that first line, which refuses every key."""
    key = keygen(directory / "other_host_key")
    host_key = paramiko.Ed25519Key.from_private_key_file(str(key))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    transport = paramiko.Transport(listener.accept()[0])
                    transport.local_version = version
                    transport.add_server_key(host_key)
                    with suppress(paramiko.SSHException, EOFError):
                        transport.start_server(server=RefusesKeys())

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("version", "sentence", "step"),
    [
        ("SSH-2.0-Tailscale", "Tailscale SSH answered at ", "tailscale set --ssh=false"),
        ("SSH-2.0-OpenSSH_10.0", "refused the login of root (tried: ", "Correct user or identity_file"),
    ],
)
def test_who_refuses_a_login_is_told_apart(
    operator: Operator, tmp_path: Path, version: str, sentence: str, step: str
) -> None:
    with calling_itself(version, tmp_path) as port:
        operator.host(port=port)
        with pytest.raises(ReachError) as refused:
            opened()
    assert sentence in str(refused.value)
    assert step in str(refused.value)


# --- the way ---


def test_a_blank_host_is_reached_publicly_and_a_joined_one_by_the_tailnet(
    operator: Operator, server: Server
) -> None:
    operator.host(port=server.port)
    assert route("vps1").way == "public"
    assert opened().way == "public"
    remember_tailnet("vps1", ["127.0.0.2"])
    assert (route("vps1").way, route("vps1").address) == ("tailnet", "127.0.0.2")
    session = opened()
    assert (session.way, session.address) == ("tailnet", "127.0.0.2")
    assert opened(way="public").way == "public"


def test_it_is_remembered_by_the_next_process(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    remember_tailnet("vps1", ["127.0.0.2"])
    forget_caches()
    assert opened().address == "127.0.0.2"


def test_a_tailnet_that_does_not_answer_falls_back_and_says_so(
    operator: Operator, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    operator.host(port=server.port)
    remember_tailnet("vps1", ["127.0.0.9"])
    assert opened().way == "public"
    assert "127.0.0.9" in caplog.text
    assert "Going on by the public address 127.0.0.1" in caplog.text


def test_an_sshd_that_restarts_on_the_tailnet_is_waited_for(
    operator: Operator, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converge that was killed restarts it in the moment in which the next one begins."""
    operator.host(port=server.port, address="127.0.0.9")
    remember_tailnet("vps1", ["127.0.0.2"])
    opened()
    server.stop()
    with pytest.raises(ReachError, match="Connection refused"):
        opened()
    monkeypatch.setattr("control.reach.RESTART_S", 30.0)
    monkeypatch.setattr("control.reach.RETRY_S", 0.1)
    later = threading.Timer(1, server.start)
    later.start()
    try:
        assert opened().way == "tailnet"
    finally:
        later.join()


def test_a_way_that_is_asked_for_is_the_only_one(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    with pytest.raises(ReachError, match="no tailnet address is known"):
        open_session("vps1", way="tailnet")
    remember_tailnet("vps1", ["127.0.0.9"])
    with pytest.raises(ReachError, match=r"127\.0\.0\.9"):
        open_session("vps1", way="tailnet")


def test_the_second_tailnet_address_is_tried(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    remember_tailnet("vps1", ["127.0.0.9", "127.0.0.2"])
    assert opened(way="tailnet").address == "127.0.0.2"


def test_on_the_tailnet_port_22_is_tried_before_the_public_port(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    remember_tailnet("vps1", ["127.0.0.2"])
    assert route("vps1").port == 22
    assert opened().port == server.port
    assert route("vps1").port == server.port


def test_when_no_way_works_every_one_is_named(operator: Operator) -> None:
    operator.host(port=free_port())
    remember_tailnet("vps1", ["127.0.0.9"])
    with pytest.raises(ReachError) as caught:
        open_session("vps1")
    assert "127.0.0.9" in caught.value.what
    assert "127.0.0.1" in caught.value.what
    assert caught.value.hint


def test_a_tailnet_address_in_the_file_comes_first(operator: Operator, server: Server) -> None:
    operator.host(port=server.port, tailnet_address="127.0.0.2")
    assert opened().address == "127.0.0.2"


def test_an_unknown_host_is_named_with_the_nearest(operator: Operator) -> None:
    operator.host()
    with pytest.raises(SettingsError, match=r"no host called 'vps11'\. Did you mean vps1\?"):
        open_session("vps11")


# --- addresses ---


@pytest.mark.parametrize("address", ["::1", "localhost", "127.0.0.1"])
def test_addresses_of_every_kind(operator: Operator, server: Server, address: str) -> None:
    operator.host(address=address, port=server.port)
    assert opened().address == address


def test_a_name_that_does_not_resolve(operator: Operator) -> None:
    operator.host(address="no-such-host.invalid")
    with pytest.raises(ReachError, match=r"vps1: cannot resolve no-such-host\.invalid"):
        open_session("vps1")


def test_a_closed_port(operator: Operator) -> None:
    port = free_port()
    operator.host(port=port)
    with pytest.raises(ReachError, match=rf"vps1: cannot connect to 127\.0\.0\.1:{port}: Connection refused"):
        open_session("vps1")


def test_a_port_that_never_says_a_word(operator: Operator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        operator.host(port=silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(ReachError, match="does not answer as SSH"):
            open_session("vps1", timeout=1)
        assert time.monotonic() - began < 6


def test_a_port_that_is_no_ssh(operator: Operator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(
            target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400\r\n\r\n" * 400), daemon=True
        ).start()
        operator.host(port=server.getsockname()[1])
        with pytest.raises(ReachError, match="does not answer as SSH"):
            open_session("vps1", timeout=2)


def test_a_link_that_is_cut_during_the_login_does_not_hang(operator: Operator, relay: Relay) -> None:
    operator.host(port=relay.port)
    relay.freeze()
    began = time.monotonic()
    with pytest.raises(ReachError):
        open_session("vps1", timeout=1)
    assert time.monotonic() - began < 10


# --- the login ---


def test_a_wrong_key_is_refused_in_a_sentence(operator: Operator, server: Server) -> None:
    other = keygen(operator.home / "other")
    operator.host(port=server.port, identity_file=other)
    with pytest.raises(ReachError) as caught:
        open_session("vps1")
    assert "refused the login of root" in caught.value.what
    assert str(other) in caught.value.what
    assert "publickey" in caught.value.what


def test_without_any_key_it_says_so(operator: Operator, server: Server) -> None:
    operator.key.unlink()
    operator.host(port=server.port)
    with pytest.raises(ReachError, match="no key found to try"):
        open_session("vps1")


def test_a_missing_identity_file(operator: Operator, server: Server) -> None:
    operator.host(port=server.port, identity_file="~/.ssh/gone")
    with pytest.raises(ReachError, match=r"identity_file .*gone is not there"):
        open_session("vps1")


def test_an_identity_file_that_is_no_key(operator: Operator, server: Server) -> None:
    (operator.home / "junk").write_bytes(b"\x00junk\xff")
    operator.host(port=server.port, identity_file=operator.home / "junk")
    with pytest.raises(ReachError, match="cannot be used"):
        open_session("vps1")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_default_keys_of_every_type(operator: Operator, server: Server, kind: str) -> None:
    operator.key.unlink()
    key = keygen(operator.home / f".ssh/id_{kind}", kind)
    (server.directory / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    operator.host(port=server.port)
    assert opened().auth == "publickey"


def test_an_encrypted_key_without_a_terminal_is_a_sentence_at_once(
    operator: Operator, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        key = keygen(operator.home / "locked", passphrase="sesame")
        operator.host(port=server.port, identity_file=key)
        with pytest.raises(ReachError, match="is encrypted, and no SSH agent holds it") as caught:
            open_session("vps1")
    assert f"ssh-add {key}" in caught.value.hint


def test_an_encrypted_default_key_is_passed_over_and_named(operator: Operator, server: Server) -> None:
    keygen(operator.key, passphrase="sesame")
    operator.host(port=server.port)
    with pytest.raises(ReachError, match="ssh-add") as caught:
        open_session("vps1")
    assert str(operator.key) in caught.value.hint


@pytest.fixture
def agent(tmp_path: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "agent.sock"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    while not path.exists():
        time.sleep(0.02)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    yield path
    process.terminate()
    process.wait(10)


def add_to_agent(*keys: Path) -> None:
    subprocess.run(["ssh-add", "-q", *map(str, keys)], check=True, timeout=10, stdin=subprocess.DEVNULL)


def test_the_agent_is_used(operator: Operator, server: Server, agent: Path) -> None:
    add_to_agent(operator.key)
    operator.key.unlink()
    operator.host(port=server.port)
    assert opened().auth == "publickey"


def test_the_agent_opens_an_encrypted_identity(
    operator: Operator, server: Server, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_agent(operator.key)
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-N", "sesame", "-f", str(operator.key)], check=True, timeout=30
    )
    operator.host(port=server.port, identity_file=operator.key)
    assert opened().auth == "publickey"


def test_more_keys_than_a_server_takes_at_once(operator: Operator, server: Server, agent: Path) -> None:
    others = [keygen(operator.home / f"key{number}") for number in range(8)]
    add_to_agent(*others, operator.key)
    operator.key.unlink()
    operator.host(port=server.port)
    assert opened().auth == "publickey"


def test_an_agent_that_is_gone_is_no_error(
    operator: Operator, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(operator.home / "nowhere"))
    operator.host(port=server.port)
    assert opened().auth == "publickey"


def test_a_password_only_where_it_is_allowed(
    operator: Operator, server: Server, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.key.rename(operator.home / "not-offered")
    operator.host(port=server.port, user=person.name, login_password="env:QPT_PASSWORD")
    assert opened().auth == "password"
    with pytest.raises(ReachError, match="refused the login"):
        open_session("vps1", keys_only=True)
    monkeypatch.setenv("QPT_PASSWORD", "wrong")
    forget_caches()
    with pytest.raises(ReachError, match=r"tried: .*login_password.*what login_password points at") as caught:
        open_session("vps1")
    assert "wrong" not in str(caught.value)


# --- what carries it ---


def test_the_proxy_carries_the_tailnet_and_dies_with_the_session(operator: Operator, server: Server) -> None:
    carrier = operator.home / "carrier.py"
    carrier.write_text(CARRIER)
    operator.host(port=server.port, tailnet_proxy=f"python3 {carrier} %h %p")
    remember_tailnet("vps1", ["127.0.0.2"])
    state.update("vps1", lambda old: state.HostState(old.tailnet_addresses, server.port, old.host_keys))
    session = open_session("vps1", way="tailnet")
    data = os.urandom(3 << 20)
    assert session.run("cat", stdin=data, timeout=60).stdout == data
    assert children(), "the positive control: the program must be seen while the session lives"
    session.close()
    assert not children()


def children() -> list[str]:
    done = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "python3"], capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def test_a_proxy_that_fails_says_what_it_said(operator: Operator) -> None:
    operator.host(tailnet_proxy="sh -c 'echo no such peer %h >&2'")
    remember_tailnet("vps1", ["100.64.0.3"])
    with pytest.raises(ReachError, match=r"no such peer 100\.64\.0\.3"):
        open_session("vps1", way="tailnet")


def test_a_proxy_that_is_not_there(operator: Operator) -> None:
    operator.host(tailnet_proxy="no-such-program %h %p")
    remember_tailnet("vps1", ["100.64.0.3"])
    with pytest.raises(ReachError, match="cannot run no-such-program") as caught:
        open_session("vps1", way="tailnet")
    assert "tailnet_proxy" in caught.value.hint


def test_a_proxy_that_never_answers_does_not_hang(operator: Operator) -> None:
    operator.host(tailnet_proxy="sleep 1000 %h")
    remember_tailnet("vps1", ["100.64.0.3"])
    began = time.monotonic()
    with pytest.raises(ReachError, match="does not answer"):
        open_session("vps1", way="tailnet", timeout=1)
    assert time.monotonic() - began < 8
    assert (
        subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "sleep"], capture_output=True, check=False
        ).returncode
        == 1
    )


# --- ~/.ssh/config ---


def test_the_operators_ssh_config_counts_for_the_public_address(operator: Operator, server: Server) -> None:
    key = operator.key.rename(operator.home / "elsewhere")
    (operator.home / ".ssh/config").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {server.port}\n  User root\n  IdentityFile {key}\n"
    )
    operator.hosts('[hosts.vps1]\naddress = "box"\n')
    assert (route("vps1").address, route("vps1").port) == ("127.0.0.1", server.port)
    assert opened().port == server.port


def test_the_hosts_file_wins_over_the_ssh_config(operator: Operator, server: Server) -> None:
    (operator.home / ".ssh/config").write_text(
        "Host 127.0.0.1\n  Port 1\n  User nobody\n  IdentityFile /gone\n"
    )
    operator.host(port=server.port, identity_file=operator.key)
    assert (opened().user, opened().port) == ("root", server.port)


def test_the_user_of_the_ssh_config_is_everywhere_the_login_user(operator: Operator) -> None:
    (operator.home / ".ssh/config").write_text("Host 192.0.2.7\n  User admin\n")
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.7"\n[hosts.vps2]\naddress = "192.0.2.8"\n')
    remember_tailnet("vps1", ["100.64.0.3"])
    assert route("vps1").user == "admin"
    assert route("vps2").user == "root"


def test_a_jump_host_is_gone_through(operator: Operator, server: Server) -> None:
    (operator.home / ".ssh/config").write_text(
        f"Host target\n  HostName 127.0.0.1\n  User root\n  Port {server.port}\n"
        f"  ProxyJump root@127.0.0.2:{server.port}\n"
        f"Host 127.0.0.2\n  IdentityFile {operator.key}\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {operator.home}/hops\n"
    )
    operator.hosts(f'[hosts.vps1]\naddress = "target"\nidentity_file = "{operator.key}"\n')
    with open_session("vps1") as session:
        assert session.run("echo there").stdout == b"there\n"
    assert (operator.home / "hops").exists(), "the connection went around the jump host"


def test_a_jump_host_that_refuses_is_a_sentence(operator: Operator, server: Server) -> None:
    (operator.home / ".ssh/config").write_text(
        f"Host target\n  HostName 127.0.0.1\n  ProxyJump 127.0.0.1:{free_port()}\n"
    )
    operator.hosts('[hosts.vps1]\naddress = "target"\n')
    with pytest.raises(ReachError, match="does not answer as SSH"):
        open_session("vps1", timeout=3)


def test_a_broken_ssh_config_is_a_sentence(operator: Operator) -> None:
    (operator.home / ".ssh/config").write_text("Host x\n  Port\n")
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.7"\n')
    with pytest.raises(ReachError, match=r"\.ssh/config: cannot be used"):
        route("vps1")


def test_a_labs_hosts_are_not_the_ssh_configs_business(operator: Operator, server: Server) -> None:
    (operator.home / ".ssh/config").write_text("Host *\n  User admin\n  Port 1\n  ProxyCommand false\n")
    (operator.hosts_file.parent / "lab.json").write_text("{}")
    operator.hosts(f'[hosts.vps1]\naddress = "127.0.0.1"\nport = {server.port}\n')
    assert opened().user == "root"


# --- the operator's own tailscale ---


def status(*nodes: tuple[str, str, list[str], bool], backend: str = "Running") -> str:
    peers = {
        f"key{number}": {
            "HostName": name,
            "DNSName": f"{label}.tail.net.",
            "TailscaleIPs": ips,
            "Online": online,
        }
        for number, (name, label, ips, online) in enumerate(nodes)
    }
    return json.dumps({"BackendState": backend, "Self": {}, "Peer": peers})


def test_the_port_sshd_moved_to_is_the_one_every_later_command_knows(
    operator: Operator, server: Server
) -> None:
    """`quietport ssh-config` and the specs ask for the way without connecting first."""
    operator.host(port=server.port, tailnet_address="127.0.0.1")
    assert (opened().way, route("vps1").port) == ("tailnet", server.port)
    remember_port("vps1", 22)
    assert route("vps1").port == 22
    assert "127.0.0.1" in known_hosts_path("vps1").read_text().split(" ")[0].split(",")


def test_a_pinned_host_is_found_on_the_operators_tailnet(
    operator: Operator, server: Server, tailscale: Path
) -> None:
    operator.host(port=server.port)
    opened()
    tailscale.write_text(status(("vps1", "vps1", ["127.0.0.2"], True)))
    forget_caches()
    session = opened()
    assert (session.way, session.address) == ("tailnet", "127.0.0.2")
    assert state.load("vps1").tailnet_addresses == ("127.0.0.2",)


def test_a_found_node_with_another_key_is_not_taken(
    operator: Operator, server: Server, tailscale: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator.host(port=server.port, host_key=fingerprint(server.host_key("rsa.pub")))
    tailscale.write_text(status(("vps1", "vps1", ["127.0.0.9"], True)))
    assert opened().way == "public"
    assert "127.0.0.9" in caplog.text


def test_a_node_of_the_same_name_is_not_converged_by_mistake(
    operator: Operator, server: Server, tailscale: Path
) -> None:
    """Nothing is pinned and the public address is closed: the name alone is no proof."""
    operator.host(port=free_port(), address="127.0.0.3")
    state.update("vps1", lambda _: state.HostState(tailnet_port=server.port))
    tailscale.write_text(status(("vps1", "vps1", ["127.0.0.2"], True)))
    with pytest.raises(ReachError, match="does not say so"):
        open_session("vps1")
    assert state.load("vps1").host_keys == ()


def test_a_node_that_says_it_is_the_host_is_taken(
    operator: Operator, server: Server, tailscale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "host.json"
    own.write_text('{"schema": 1, "name": "vps1"}')
    monkeypatch.setattr("control.reach.HOST_JSON", str(own))
    operator.host(port=free_port(), address="127.0.0.3")
    state.update("vps1", lambda _: state.HostState(tailnet_port=server.port))
    tailscale.write_text(status(("vps1", "vps1", ["127.0.0.2"], True)))
    assert opened().way == "tailnet"
    assert state.load("vps1").host_keys


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"BackendState": "Running", "Peer": [1]}', '{"Peer": null}']
)
def test_a_tailscale_that_says_nothing_useful_is_as_none(
    operator: Operator, server: Server, tailscale: Path, text: str
) -> None:
    operator.host(port=server.port)
    opened()
    tailscale.write_text(text)
    forget_caches()
    assert opened().way == "public"


def test_a_stopped_tailscale_and_offline_nodes_are_not_tried(
    operator: Operator, server: Server, tailscale: Path
) -> None:
    operator.host(port=server.port)
    opened()
    for text in (
        status(("vps1", "vps1", ["127.0.0.2"], True), backend="Stopped"),
        status(("vps1", "vps1", ["127.0.0.2"], False)),
        status(("vps2", "vps2", ["127.0.0.2"], True)),
    ):
        tailscale.write_text(text)
        forget_caches()
        assert opened().way == "public"


def test_a_stale_node_is_reported_in_one_sentence(
    operator: Operator, server: Server, tailscale: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator.host(port=server.port)
    opened()
    tailscale.write_text(
        status(("vps1", "vps1", ["100.64.0.3"], False), ("vps1", "vps1-1", ["127.0.0.2"], True))
    )
    forget_caches()
    assert opened().address == "127.0.0.2"
    sentences = [
        record.getMessage() for record in caplog.records if "nodes of that name" in record.getMessage()
    ]
    assert len(sentences) == 1
    assert "vps1-1 (online), vps1 (offline)" in sentences[0]


# --- ssh-config ---


def test_openssh_reaches_the_host_by_name_and_by_both_addresses(operator: Operator, server: Server) -> None:
    operator.host(port=server.port, identity_file=operator.key)
    opened()
    remember_tailnet("vps1", ["127.0.0.2"])
    opened()
    path = ssh_config(["vps1"])
    for target, arrived in (("vps1", "127.0.0.2"), ("127.0.0.2", "127.0.0.2"), ("127.0.0.1", "127.0.0.1")):
        done = subprocess.run(
            ["ssh", "-F", str(path), "-o", "BatchMode=yes", target, "echo $SSH_CONNECTION"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[2:] == [arrived, str(server.port)]


def test_openssh_refuses_a_changed_key_with_that_configuration(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    opened()
    path = ssh_config()
    server.new_host_keys()
    server.restart()
    done = subprocess.run(
        ["ssh", "-F", str(path), "-o", "BatchMode=yes", "vps1", "true"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 255
    assert "CHANGED" in done.stderr


def test_the_ssh_config_is_private_and_names_only_who_was_asked_for(operator: Operator) -> None:
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.1"\n[hosts.vps2]\naddress = "192.0.2.2"\n')
    path = ssh_config(["vps2"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert "Host vps2" in path.read_text()
    assert "vps1" not in path.read_text().split("NAME`.\n")[1]
    assert "Host vps1" in ssh_config().read_text()
    with pytest.raises(SettingsError, match="no host called"):
        ssh_config(["vps9"])


def test_a_route_is_written_as_ssh_writes_it(operator: Operator) -> None:
    operator.host(address="2001:db8::1", port=2222)
    assert route("vps1").where == "[2001:db8::1]:2222"
    assert isinstance(route("vps1"), dial.Route)


def test_two_ways_that_failed_name_the_host_once_and_both_next_steps(operator: Operator) -> None:
    operator.host(port=free_port(), tailnet_proxy="no-such-program-here %h", tailnet_address="100.64.0.9")
    with pytest.raises(ReachError) as caught:
        open_session("vps1")
    sentence = str(caught.value)
    assert sentence.count("vps1") == 1
    assert "cannot run no-such-program-here, which should carry the connection: No such file" in sentence
    assert "Errno" not in sentence
    assert "Connection refused." in sentence
    assert "correct tailnet_proxy" in sentence
    assert "the address right?" in sentence
