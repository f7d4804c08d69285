"""sshd is held back until its addresses are there, and never starts on all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietport import sshd_wait
from quietport.cli import main
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_SSHD
from quietport.sshd_wait import Wanted, decide, parse_listen_addresses, split_wildcards, wait_for

ROOT = Path(__file__).parents[2]
TAILNET = Wanted("100.64.0.7")
TAILNET6 = Wanted("fd7a:115c:a1e0::7")


def test_the_addresses_sshd_resolved() -> None:
    text = (
        "port 22\nlistenaddress [fd7a:115c:a1e0::7]:22\nlistenaddress 100.64.0.7:22\n"
        "listenaddress 100.64.0.7:2222\nlistenaddress 127.0.0.1:22 rdomain vrf0\n"
        "listenaddress [fe80::1%eth0]:22\nusepam yes\n"
    )
    assert parse_listen_addresses(text) == [TAILNET6, TAILNET, Wanted("127.0.0.1"), Wanted("fe80::1", "eth0")]


@pytest.mark.parametrize(
    "text", ["", "port 22\n", "listenaddress \n", "listenaddress host:22\n", "listenaddress 127.0.0.1\n"]
)
def test_what_sshd_does_not_print_is_an_error(text: str) -> None:
    with pytest.raises(HostProgramError):
        parse_listen_addresses(text)


def test_wildcards_and_loopback_are_not_waited_for() -> None:
    wanted = [Wanted("0.0.0.0"), Wanted("::"), Wanted("127.0.0.1"), Wanted("::1"), TAILNET]
    assert split_wildcards(wanted) == ([Wanted("0.0.0.0"), Wanted("::")], [TAILNET])


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("appear", "missing", "waited"),
    [
        ({TAILNET: 0.0, TAILNET6: 0.0}, [], 0),
        ({TAILNET: 0.0, TAILNET6: 10.0}, [], 10),
        ({TAILNET: 7.0, TAILNET6: 99.0}, [TAILNET6], 60),
        ({TAILNET: 99.0, TAILNET6: 99.0}, [TAILNET, TAILNET6], 60),
    ],
)
def test_waiting(appear: dict[Wanted, float], missing: list[Wanted], waited: float) -> None:
    clock = Clock()
    _, found = wait_for(
        lambda: [TAILNET, TAILNET6],
        timeout=60,
        there=lambda one: clock.now >= appear[one],
        clock=clock,
        sleep=clock.sleep,
    )
    assert (found, clock.now) == (missing, waited)


def test_an_address_that_went_again_is_missing() -> None:
    clock = Clock()
    there = {TAILNET: lambda: clock.now < 1, TAILNET6: lambda: clock.now >= 2}
    _, found = wait_for(
        lambda: [TAILNET, TAILNET6],
        timeout=60,
        there=lambda one: there[one](),
        clock=clock,
        sleep=clock.sleep,
    )
    assert found == [TAILNET]


def test_one_address_is_better_than_none() -> None:
    assert decide([TAILNET, TAILNET6], [], timeout=60) == (0, "")
    code, sentence = decide([TAILNET, TAILNET6], [TAILNET6], timeout=60)
    assert code == 0
    assert TAILNET6.shown in sentence
    assert decide([TAILNET, TAILNET6], [TAILNET, TAILNET6], timeout=60)[0] == 1
    assert decide([], [], timeout=60) == (0, "")


@pytest.mark.parametrize(
    ("host_json", "expected"),
    [
        (None, 1),
        ({"schema": 1}, 1),
        ({"schema": 1, PUBLIC_SSHD: "yes"}, 1),
        ({"schema": 1, PUBLIC_SSHD: True}, 0),
        ({"schema": 2, PUBLIC_SSHD: True}, 1),
    ],
)
def test_never_in_public_unless_the_host_was_told_so(
    host_json: dict[str, object] | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "host.json"
    if host_json is not None:
        file.write_text(json.dumps(host_json))
        file.chmod(0o644)
    monkeypatch.setattr(
        sshd_wait, "output_of", lambda argv: "listenaddress [::]:22\nlistenaddress 0.0.0.0:22\n"
    )
    monkeypatch.setattr(sshd_wait.host_settings, "__defaults__", (file,))
    monkeypatch.setattr(sshd_wait.admission, "firewall_problem", lambda: "")
    monkeypatch.setattr(sshd_wait, "back_to_the_tailnet", lambda host, **options: False)
    assert main(["sshd-wait", "--timeout", "0"]) == expected
    assert ("every address" in capsys.readouterr().out) == (expected == 1)


_MISSING = [name for name in ("ip", "unshare", "/usr/sbin/sshd", "ssh-keygen") if shutil.which(name) is None]
needs_namespaces = pytest.mark.skipif(
    (os.geteuid() != 0 or bool(_MISSING)) and os.environ.get("CI") != "true",
    reason=f"needs root, iproute2, util-linux and openssh-server (missing: {_MISSING or 'root'})",
)
# sshd-wait with the machine's own sshd; $1 is what happens to the addresses beside it.
_RUN = """
set -e
mount -t tmpfs none /run
mkdir /run/sshd
ssh-keygen -q -t ed25519 -N '' -f /run/key
ip link set lo up
ip link add tailscale0 type bridge
printf '%s\\n' "HostKey /run/key" "$2" > /run/config
( eval "$1" ) &
exec "$3" -m quietport sshd-wait --timeout "$4" --config /run/config
"""


def in_namespace(
    meanwhile: str, config: str, *, timeout: float
) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    argv = [
        "unshare",
        "--net",
        "--mount",
        "sh",
        "-c",
        _RUN,
        "sh",
        meanwhile,
        config,
        sys.executable,
        str(timeout),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    return done, time.monotonic() - start


BOTH = "ListenAddress 100.64.0.7\nListenAddress fd7a:115c:a1e0::7"
ADD4 = "ip addr add 100.64.0.7/32 dev tailscale0"
ADD6 = "ip addr add fd7a:115c:a1e0::7/128 dev tailscale0 nodad"


@needs_namespaces
def test_sshd_starts_as_soon_as_the_addresses_come() -> None:
    done, took = in_namespace(f"sleep 1; {ADD4}; sleep 1; {ADD6}", BOTH, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert 2 <= took < 20


@needs_namespaces
def test_after_the_time_one_address_is_enough() -> None:
    done, _ = in_namespace(ADD4, BOTH, timeout=2)
    assert done.returncode == 0
    assert "fd7a:115c:a1e0::7 is on no interface" in done.stdout


@needs_namespaces
def test_after_the_time_none_is_a_failure_that_systemd_retries() -> None:
    done, took = in_namespace("true", BOTH, timeout=1)
    assert done.returncode == 1
    assert "100.64.0.7" in done.stdout
    assert took >= 1


@needs_namespaces
@pytest.mark.parametrize(
    "config", ["", "ListenAddress 0.0.0.0\nListenAddress 100.64.0.7", "ListenAddress ::"]
)
def test_sshd_does_not_start_on_every_address(config: str) -> None:
    done, _ = in_namespace(f"{ADD4}; {ADD6}", config, timeout=5)
    assert done.returncode == 1
    assert "every address" in done.stdout


@needs_namespaces
def test_loopback_alone_is_not_waited_for() -> None:
    done, _ = in_namespace("true", "ListenAddress 127.0.0.1", timeout=30)
    assert (done.returncode, done.stdout) == (0, "")


@needs_namespaces
def test_a_configuration_sshd_refuses_is_not_fine() -> None:
    done, _ = in_namespace("true", "Bogus yes", timeout=5)
    assert done.returncode == 3
    assert "Bogus" in done.stderr or "bad configuration" in done.stderr
