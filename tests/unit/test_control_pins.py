"""Host keys against a real sshd: the first one is pinned, any other is refused, on either way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from control import pins, state
from control.errors import ReachError
from control.reach import open_session, remember_tailnet
from control.settings import settings_for
from tests.unit.control_sshd import KEY_TYPES, NEEDS_ROOT, Operator, Server, fingerprint

pytestmark = NEEDS_ROOT


def connect() -> None:
    open_session("vps1", way="public").close()


def pinned() -> str:
    (pin,) = state.load("vps1").host_keys
    return pins.fingerprint(pin)


def test_the_first_key_is_pinned_and_seen_again(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    assert state.load("vps1").host_keys == ()
    connect()
    assert pinned() == fingerprint(server.host_key("ed25519.pub"))
    connect()


def test_a_changed_key_is_refused_with_both_fingerprints_and_the_next_step(
    operator: Operator, server: Server
) -> None:
    operator.host(port=server.port)
    connect()
    was = pinned()
    server.new_host_keys()
    server.restart()
    with pytest.raises(ReachError) as caught:
        connect()
    now = fingerprint(server.host_key("ed25519.pub"))
    assert was in caught.value.what
    assert now in caught.value.what
    assert "the host key has changed" in caught.value.what
    assert "`quietport forget vps1`" in caught.value.hint
    assert pinned() == was, "a refused key must not become the pin"
    assert "Accepted" not in server.log.split("Server listening")[-1], "nobody may log in at a changed key"
    assert state.forget("vps1")
    connect()
    assert pinned() == now


def test_nothing_is_pinned_before_a_login_was_accepted(operator: Operator, server: Server) -> None:
    (server.directory / "authorized_keys").write_text("")
    operator.host(port=server.port)
    with pytest.raises(ReachError, match="refused the login of root"):
        connect()
    assert state.load("vps1").host_keys == ()


@pytest.mark.parametrize("kind", KEY_TYPES)
def test_a_given_fingerprint_of_any_key_type_is_found(operator: Operator, server: Server, kind: str) -> None:
    operator.host(port=server.port, host_key=fingerprint(server.host_key(f"{kind}.pub")))
    connect()
    assert pinned() == fingerprint(server.host_key(f"{kind}.pub"))
    connect()


def test_a_given_fingerprint_of_none_of_its_keys_is_refused(operator: Operator, server: Server) -> None:
    operator.host(port=server.port, host_key="SHA256:" + "A" * 43)
    with pytest.raises(ReachError) as caught:
        connect()
    for kind in KEY_TYPES:
        assert fingerprint(server.host_key(f"{kind}.pub")) in caught.value.what
    assert "hosts.toml says SHA256:AAAA" in caught.value.what
    assert "Accepted" not in server.log


def test_a_given_fingerprint_outranks_an_earlier_pin(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    connect()
    server.new_host_keys()
    server.restart()
    now = fingerprint(server.host_key("rsa.pub"))
    operator.host(port=server.port, host_key=now)
    connect()
    assert pinned() == now
    operator.host(port=server.port, host_key=fingerprint(server.host_key("ed25519.pub")))
    connect()


def test_a_host_that_lost_the_pinned_type_is_refused(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    connect()
    server.keys = ("rsa",)
    server.restart()
    with pytest.raises(ReachError, match="has changed") as caught:
        connect()
    assert fingerprint(server.host_key("rsa.pub")) in caught.value.what


def test_a_host_that_gained_a_better_type_is_the_same_host(operator: Operator, server: Server) -> None:
    server.keys = ("rsa",)
    server.restart()
    operator.host(port=server.port)
    connect()
    server.keys = KEY_TYPES
    server.restart()
    connect()


def test_the_tailnet_must_show_the_key_of_the_first_connection(operator: Operator, server: Server) -> None:
    operator.host(port=server.port)
    connect()
    remember_tailnet("vps1", ["127.0.0.2"])
    open_session("vps1", way="tailnet").close()
    server.new_host_keys()
    server.restart()
    with pytest.raises(ReachError, match=r"has changed.*127\.0\.0\.2"):
        open_session("vps1", way="tailnet")


def test_known_hosts_names_every_address_with_its_ports(operator: Operator, server: Server) -> None:
    operator.host(port=server.port, address="::1")
    connect()
    remember_tailnet("vps1", ["100.64.0.3", "fd7a::3"])
    path = pins.known_hosts_path("vps1")
    assert path.stat().st_mode & 0o777 == 0o600
    for word in (f"[::1]:{server.port}", "vps1", "100.64.0.3", f"[100.64.0.3]:{server.port}", "fd7a::3"):
        found = subprocess.run(
            ["ssh-keygen", "-F", word, "-f", str(path)], capture_output=True, check=False, timeout=10
        )
        assert found.returncode == 0, word
    other = subprocess.run(
        ["ssh-keygen", "-F", "100.64.0.4", "-f", str(path)], capture_output=True, check=False, timeout=10
    )
    assert other.returncode != 0


def test_the_fingerprint_is_the_one_of_ssh_keygen(server: Server) -> None:
    for kind in KEY_TYPES:
        public = Path(server.host_key(f"{kind}.pub"))
        assert pins.fingerprint(" ".join(public.read_text().split()[:2])) == fingerprint(public)


def test_sha1_signatures_are_never_asked_for() -> None:
    assert "ssh-rsa" not in pins.algorithms(pins.ALGORITHMS)
    assert "rsa-sha2-512" in pins.algorithms(["ssh-rsa"])


def test_without_a_pin_every_key_is_acceptable_and_with_one_no_other(operator: Operator) -> None:
    operator.host()
    settings = settings_for("vps1")
    assert pins.is_accepted("ssh-ed25519 AAAA", settings=settings, pinned=())
    assert not pins.is_accepted("ssh-ed25519 AAAA", settings=settings, pinned=("ssh-ed25519 BBBB",))
