"""Scripts that read a key from a link that is cut while they do: to them it looks like the end of input."""

from __future__ import annotations

from pathlib import Path

import pytest

from operations import tailnet, users
from tests.unit.stand_ins import install, run

KEY = b"ssh-ed25519 AAAA b\xc3\xa9b\xc3\xa9"
AUTH_KEY = b"hskey-auth-0123456789"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of programs that stand in for the host's, and the home of its only user."""
    programs = {
        "getent": f"echo bob:x:1000:1000::{tmp_path}/home:/bin/sh",
        "runuser": 'shift 3; exec "$@"',
        "mktemp": f"mkdir -p {tmp_path}/work; echo {tmp_path}/work",
        "tailscale": f"echo \"$1\" >>{tmp_path}/asked; echo '{{\"BackendState\": \"NeedsLogin\"}}'",
    }
    install(tmp_path, programs)
    (tmp_path / "home").mkdir()
    return tmp_path


def test_a_key_for_a_user_is_added_whole(host: Path) -> None:
    done = run(host, users._ADD_KEYS, "bob", str(len(KEY)), sent=KEY)
    assert done.returncode == 0, done.stderr
    assert (host / "home/.ssh/authorized_keys").read_bytes() == KEY + b"\n"


@pytest.mark.parametrize("sent", [b"", KEY[:-1], KEY[:12]])
def test_half_a_key_for_a_user_is_not_added(host: Path, sent: bytes) -> None:
    done = run(host, users._ADD_KEYS, "bob", str(len(KEY)), sent=sent)
    assert done.returncode == 1
    assert b"cut off; nothing was changed" in done.stderr
    assert not list((host / "home").iterdir())


def test_a_whole_auth_key_is_used_and_gone_afterwards(host: Path) -> None:
    run(host, tailnet._JOIN, "1", str(len(AUTH_KEY)), "--hostname=vps1", sent=AUTH_KEY)
    assert "up" in (host / "asked").read_text().split()
    assert not (host / "work").exists()


@pytest.mark.parametrize("sent", [b"", AUTH_KEY[:-1]])
def test_half_an_auth_key_is_not_tried(host: Path, sent: bytes) -> None:
    done = run(host, tailnet._JOIN, "1", str(len(AUTH_KEY)), "--hostname=vps1", sent=sent)
    assert done.returncode == 1
    assert b"cut off" in done.stderr
    assert not (host / "asked").exists()
    assert not (host / "work").exists()
