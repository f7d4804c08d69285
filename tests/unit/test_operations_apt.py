"""What apt is waited for, and which keys a keyring holds."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facts.apt import primary_fingerprints
from operations import apt, aptwait

GPG_KEY_BODY = (
    "046b013d8016092b06010401da470f010107402b593665e67aa"
    "e419caa5d1158983e242165737ee2c93eb6dd68beb94364644d"
)
GPG_FINGERPRINT = "E2234ACEF01AE3043F28F11F932816EDDF4A6B30"

# Holds a lock as apt does (fcntl, write) until its input ends.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()


def test_nobody_holds_a_free_lock(lock: Path) -> None:
    assert aptwait.holder(str(lock)) is None


def test_a_lock_that_does_not_exist_is_free(tmp_path: Path) -> None:
    assert aptwait.holder(str(tmp_path / "no")) is None


def test_the_holder_is_named(lock: Path, holder: subprocess.Popen[str]) -> None:
    assert aptwait.holder(str(lock)) == holder.pid
    assert aptwait.busy((str(lock),)) == f"{lock} is held by {aptwait.name_of(holder.pid)}"


def test_asking_takes_no_lock_and_ends_none(lock: Path, holder: subprocess.Popen[str]) -> None:
    aptwait.holder(str(lock))
    with lock.open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_link_is_not_followed(lock: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(lock)
    with pytest.raises(OSError, match="symbolic"):
        aptwait.holder(str(tmp_path / "link"))


def test_waiting_ends_when_the_lock_is_free(
    lock: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert holder.stdin is not None
        if not holder.stdin.closed:
            holder.stdin.close()
        # Without a timeout: with one, subprocess polls, and sleeps between by the function we replaced.
        holder.wait()

    monkeypatch.setattr(time, "sleep", nap)
    assert aptwait.wait(30, (str(lock),)) is None
    assert naps, "it waited"


def test_waiting_ends_with_the_holder_when_time_is_up(
    lock: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    why = aptwait.wait(0, (str(lock),))
    assert why is not None
    assert str(holder.pid) in why
    assert capsys.readouterr().err.count("waiting:") == 1


def test_cloud_init_counts_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "cloud-init"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for status, runs in (("running", True), ("done", False), ("disabled", False)):
        program.write_text(f"#!/bin/sh\necho 'status: {status}'\n")
        program.chmod(0o755)
        assert aptwait.cloud_init_runs() is runs


def test_the_waiter_runs_by_itself_as_it_is_sent() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", apt.waiter().decode(), "0"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) in ((0, ""), (1, "")), done.stderr


def packet(tag: int, body: bytes, *, new: bool) -> bytes:
    if new:
        assert len(body) < 192
        return bytes([0xC0 | tag, len(body)]) + body
    return bytes([0x80 | tag << 2 | 1]) + len(body).to_bytes(2, "big") + body


@pytest.mark.parametrize("new", [False, True])
def test_primary_keys_are_counted_and_nothing_else(new: bool) -> None:
    one, two = b"\x04" + b"a" * 50, b"\x04" + b"b" * 50
    keyring = packet(6, one, new=new) + packet(13, b"a <a@b>", new=new) + packet(14, two, new=new)
    assert len(primary_fingerprints(keyring)) == 1
    both = primary_fingerprints(keyring + packet(6, two, new=new))
    assert len(set(both)) == 2
    assert both[0] == primary_fingerprints(keyring)[0]


def test_a_fingerprint_is_the_one_gpg_prints() -> None:
    # An Ed25519 key made for this test with gpg 2.2.40, and the fingerprint gpg printed for it.
    body = bytes.fromhex(GPG_KEY_BODY)
    assert primary_fingerprints(packet(6, body, new=False)) == [GPG_FINGERPRINT]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_keyring_are_an_error_and_never_a_crash(data: bytes) -> None:
    try:
        found = primary_fingerprints(data)
    except ValueError:
        return
    assert all(len(fingerprint) == 40 for fingerprint in found)


def test_a_repository_gives_its_packages_only() -> None:
    repository = apt.Repository(
        name="x", uri="https://h.example:8443/d", suite="trixie", components=("main",), key_url="",
        fingerprint="", packages=("one", "two"),
    )  # fmt: skip
    assert repository.site == "h.example"
    everything, named = repository.preferences().split("\n\n")
    assert "Package: *" in everything
    assert "Pin-Priority: -1" in everything
    assert "Package: one two" in named
