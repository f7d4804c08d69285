"""What apt is waited for, and which keys a keyring holds."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facts.apt import primary_fingerprints, sources_in
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


def test_a_lock_that_is_held_for_ever_ends_the_wait_with_its_holder(
    lock: Path,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(aptwait, "busy", partial(aptwait.busy, (str(lock),)))
    monkeypatch.setattr(aptwait, "wait", lambda seconds: aptwait.busy())
    assert aptwait.main(["900"]) == 1
    said = capsys.readouterr().err
    assert f"not free after 900 s: {lock} is held by {aptwait.name_of(holder.pid)}. Wait or end it" in said


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


# Stands for apt-get, dpkg and the rest: says and ends with what its next turn is, and writes down how it was
# called.
FAKE = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >>"$FAKES/called"
turns=$FAKES/$name.turns
[ -s "$turns" ] || exit 0
line=$(head -n 1 "$turns")
sed -i 1d "$turns"
echo "${line#* }"
exit "${line%% *}"
"""
LOCKED = "100 E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"


class Host:
    """A directory of stand-ins, in which scripts of the operations are run as they are sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        for name in ("apt-get", "apt-cache", "dpkg", "dpkg-query", "python3", "sleep"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)

    def turns(self, name: str, *lines: str) -> None:
        """What calls of this program end with, one after the other: EXIT-CODE OUTPUT; then 0 and nothing."""
        (self.folder / f"{name}.turns").write_text("".join(f"{line}\n" for line in lines))

    def run(self, text: str, *args: str) -> subprocess.CompletedProcess[str]:
        text = text.replace("/run/quietport-apt-updated", str(self.folder / "stamp"))
        env = {"PATH": self.path, "FAKES": str(self.folder)}
        argv = ["sh", "-c", text, "sh", "900", *args]
        return subprocess.run(argv, input="waiter", env=env, capture_output=True, text=True, check=False)

    def called(self, name: str) -> list[str]:
        """The arguments of each call of this program, without options that are always there."""
        lines = (self.folder / "called").read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def fakes(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_nothing_is_repaired_where_nothing_is_broken(fakes: Host) -> None:
    done = fakes.run(apt._INSTALL, "jq")
    assert done.returncode == 0, done.stderr
    assert len(fakes.called("dpkg")) == 1
    assert [words.split()[0] for words in fakes.called("apt-get")] == ["-q", "install"]
    assert fakes.called("apt-get")[1].endswith(" -- jq")


def test_what_was_unpacked_without_its_dependencies_is_finished_by_apt(fakes: Host) -> None:
    """`dpkg --configure -a` alone cannot: it says so, and apt fetches what is missing."""
    fakes.turns("dpkg", "1 dependency problems - leaving unconfigured")
    done = fakes.run(apt._PREPARE)
    assert done.returncode == 0, done.stderr
    (fix,) = fakes.called("apt-get")
    assert "--fix-broken" in fix
    # It may bring packages, and never take one away.
    assert "--no-remove" in fix


def test_what_is_half_installed_is_finished_though_dpkg_does_not_mind(fakes: Host) -> None:
    fakes.turns("dpkg-query", "0 half-installed jq", "0 installed jq")
    done = fakes.run(apt._PREPARE)
    assert done.returncode == 0, done.stderr
    assert "--fix-broken" in fakes.called("apt-get")[0]


def test_what_nothing_repairs_is_named(fakes: Host) -> None:
    fakes.turns("dpkg", "1 dependency problems")
    fakes.turns("apt-get", *["100 E: Unable to correct problems"] * 2)
    fakes.turns("dpkg-query", "0 unpacked jq")
    done = fakes.run(apt._INSTALL, "curl")
    assert done.returncode == 1
    assert "Repair by hand: jq" in done.stderr
    assert not [words for words in fakes.called("apt-get") if words.endswith("curl")]


def test_another_apt_that_comes_in_between_is_waited_for_again(fakes: Host) -> None:
    fakes.turns("apt-get", LOCKED, "0 lists read", LOCKED.replace("lists", "archives"), "0 installed")
    done = fakes.run(apt._INSTALL, "jq")
    assert done.returncode == 0, done.stderr
    assert [words.split()[0] for words in fakes.called("apt-get")] == ["-q", "-q", "install", "install"]
    # One wait at the start, then one before each command.
    assert len(fakes.called("python3")) == 1 + 1 + 4


def test_a_host_without_python_gets_it(fakes: Host) -> None:
    """The waiter is written in it, so that it cannot be asked for the one package that brings it."""
    (fakes.folder / "python3").unlink()
    for name in ("sh", "cat", "find", "sed", "xargs", "echo", "basename", "head", "touch"):
        program = shutil.which(name)
        assert program
        (fakes.folder / name).symlink_to(program)
    fakes.path = str(fakes.folder)
    done = fakes.run(apt._INSTALL, "python3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert fakes.called("apt-get")[-1].endswith(" -- python3")


def test_a_download_that_fails_is_not_tried_for_ever(fakes: Host) -> None:
    fakes.turns("apt-get", "0 lists read", *["100 E: Failed to fetch"] * 9)
    done = fakes.run(apt._INSTALL, "jq")
    assert done.returncode == 1
    assert "Failed to fetch" in done.stderr
    assert len(fakes.called("apt-get")) == 2


def test_apt_that_never_gets_free_ends_it_at_once(fakes: Host) -> None:
    fakes.turns("python3", "1 apt is not free after 900 s: held by x (pid 7).")
    done = fakes.run(apt._INSTALL, "jq")
    assert done.returncode == 1
    assert "held by x (pid 7)" in done.stdout + done.stderr
    assert len((fakes.folder / "called").read_text().splitlines()) == 1


ONE_LINE = """# by hand
deb [signed-by=/usr/share/keyrings/t.gpg arch=amd64] https://pkgs.example/d trixie main
#deb https://pkgs.example/d trixie main
deb-src https://pkgs.example/d/ trixie main
deb http://deb.example/debian trixie main
"""
DEB822 = """Types: deb
URIs: http://deb.example/debian
Suites: trixie
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .

# by hand
Types: deb
URIs:
 https://pkgs.example/d/
Suites: sid
 trixie
Components: main

Enabled: no
Types: deb
URIs: https://pkgs.example/d
Suites: trixie
"""


def places(path: str, text: str) -> list[tuple[int, int]]:
    return [(source["first"], source["last"]) for source in apt.rivals(sources_in(path, text), REPOSITORY)]


REPOSITORY = apt.Repository(
    name="t", uri="https://pkgs.example/d", suite="trixie", components=("main",), key_url="", fingerprint="",
    packages=("t",),
)  # fmt: skip


def test_others_that_name_the_same_repository_are_found_in_both_forms() -> None:
    assert places("/etc/apt/sources.list.d/x.list", ONE_LINE) == [(2, 2), (4, 4)]
    assert places("/etc/apt/sources.list.d/x.sources", DEB822) == [(8, 14)]
    assert places(REPOSITORY.sources_path, DEB822) == []


def test_a_source_that_is_commented_out_is_none_any_more(tmp_path: Path) -> None:
    """The command itself, in both forms; every other line stays as it was."""
    for name, text in (("x.list", ONE_LINE), ("x.sources", DEB822)):
        file = tmp_path / name
        file.write_text(text)
        file.chmod(0o600)
        for first, last in places(str(file), text):
            argv = ["sh", "-c", apt._COMMENT_OUT, "sh", str(file), str(first), str(last), apt.MARK]
            subprocess.run(argv, check=True)
        assert places(str(file), file.read_text()) == []
        assert file.read_text().replace(apt.MARK, "") == text
        assert len(sources_in(str(file), file.read_text())) == 1
        assert file.stat().st_mode & 0o777 == 0o600


@given(st.text(alphabet=st.sampled_from("deb URIs:Suites \n\t#[]=/."), max_size=200))
def test_sources_that_are_none_are_no_crash(text: str) -> None:
    for name in ("x.list", "x.sources"):
        for source in sources_in(name, text):
            assert 1 <= source["first"] <= source["last"] <= len(text.splitlines())
