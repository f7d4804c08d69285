"""What the script that joins a host does to tailscaled when joining fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from operations import tailnet
from tests.unit.stand_ins import install, run

KEY = b"hskey-auth-0123456789"


def join(place: Path, *, status: str, up: int) -> tuple[int, list[str]]:
    """Run it with programs that note what they are asked; its exit code, and what was asked."""
    programs = {
        "tailscale": f'echo "tailscale $1" >>{place}/asked\n'
        f"case $1 in status) echo '{status}' ;; up) exit {up} ;; esac",
        "systemctl": f'echo "systemctl $*" >>{place}/asked',
        "mktemp": f"mkdir -p {place}/work; echo {place}/work",
    }
    install(place, programs)
    done = run(place, tailnet._JOIN, "1", str(len(KEY)), "--hostname=vps1", sent=KEY)
    asked = (place / "asked").read_text().splitlines()
    return done.returncode, [line for line in asked if line != "tailscale status"]


def test_a_key_that_was_not_taken_is_forgotten(tmp_path: Path) -> None:
    """tailscaled would use it up as soon as its control server is back, for a node that nobody waits for."""
    code, asked = join(tmp_path, status='{"BackendState": "NeedsLogin", "HaveNodeKey": false}', up=1)
    assert (code, asked) == (1, ["tailscale up", "tailscale logout", "systemctl restart tailscaled"])


@pytest.mark.parametrize("state", ["NeedsMachineAuth", "NeedsLogin"])
def test_a_node_that_is_known_there_is_left_as_it_is(tmp_path: Path, state: str) -> None:
    code, asked = join(tmp_path, status=f'{{"BackendState": "{state}", "HaveNodeKey": true}}', up=1)
    assert (code, asked) == (1, ["tailscale up"])


def test_one_that_joined_is_left_as_it_is(tmp_path: Path) -> None:
    code, asked = join(tmp_path, status='{"BackendState": "NeedsLogin", "HaveNodeKey": false}', up=0)
    assert (code, asked) == (0, ["tailscale up"])
