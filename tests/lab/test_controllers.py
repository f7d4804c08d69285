"""Two controllers at one host, a controller that died, and several hosts of which some do not converge.

One lab with two blank hosts, c13 and c12, which these tests converge in this order.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from lab import targets
from lab.process import wait_until
from tests.lab.interrupt import Converge
from tests.lab.own import own_lab
from tests.lab.record import plain, record, sentence_of
from tests.lab.story import BIN, DEPLOY, SECRET_VARIABLE, Done, Hosts, Lab
from tests.lab.untouched import changes, is_public, state

pytestmark = pytest.mark.container
FIRST, SECOND = "c13", "c12"
APT_STEP = "packages | packages: apt is ready"
LOCK_STEP = "preflight | preflight: no other controller is at work on the host"
APPLY_TIMEOUT_S = 900
# Held by apt's own means until a file appears: a converge waits for it, for as long as a test likes.
_HOLD_APT = """
import fcntl, os, time
fcntl.lockf(os.open("/var/lib/dpkg/lock-frontend", os.O_RDWR | os.O_CREAT, 0o640), fcntl.LOCK_EX)
open("/run/e2e-apt-held", "w").close()
while not os.path.exists("/run/e2e-release"):
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class Two:
    """The lab with its two hosts."""

    lab: Lab

    def hosts(self, word: str, **second: Any) -> Hosts:
        """Their file: without Docker, which has stories of its own, and with steps that only FIRST has."""
        secrets = {f"/etc/e2e/{name}": f"env:{SECRET_VARIABLE}" for name in ("one", "two")}
        more = {"secrets": secrets, "agent_users": ["agent", "helper"]}
        return Hosts.of(self.lab, word, every={"docker_source": "none"}, **{FIRST: more, SECOND: second})

    def on(self, name: str, *argv: str) -> str:
        """Run a command in a target, past its sshd."""
        return targets.execute(self.lab.run, self.lab.target(name), argv).stdout

    @contextmanager
    def apt_held(self, name: str) -> Iterator[None]:
        """Have another process hold apt's lock on that host until `release_apt`, or the block ends."""
        self.on(name, "systemd-run", "--quiet", "--collect", "python3", "-I", "-c", _HOLD_APT)
        self.on(name, "sh", "-c", "until [ -e /run/e2e-apt-held ]; do sleep 0.1; done")
        try:
            yield
        finally:
            self.release_apt(name)

    def release_apt(self, name: str) -> None:
        """Let a converge that waits for apt go on."""
        self.on(name, "touch", "/run/e2e-release")

    def wait_for_waiter(self, name: str) -> None:
        """Wait until the program that waits for apt (operations/aptwait.py) runs on that host."""
        waiter = ["pgrep", "-f", "def cloud_init_runs"]
        target = self.lab.target(name)
        wait_until(
            lambda: targets.execute(self.lab.run, target, waiter, check=False).returncode == 0,
            timeout=120,
            what=f"the converge waits for apt on {name}",
        )

    def owner(self, name: str) -> list[str]:
        """Who the host itself says has its lock: token, who, process, since."""
        return self.on(name, "sh", "-c", "cat /run/quietport/lock.owner 2>/dev/null || true").splitlines()


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, needs_containers: None) -> Iterator[Two]:
    with own_lab("controllers", request.session, asked_by="two") as lab:
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda distro: lab.up(kind="container", distro=distro), ("trixie", "bookworm"))
            assert list(made) == [FIRST, SECOND]
        yield Two(lab)


def start(hosts: Hosts, *argv: str) -> Converge:
    """A controller in the background, followed by what it prints."""
    return Converge.by(hosts, (str(BIN / argv[0]), *argv[1:]))


def closing(done: Done) -> dict[str, str]:
    """What `quietport apply` says of every host in the end, by the host's name."""
    lines = [
        line.split(maxsplit=2) for line in plain(done.text).splitlines() if line.startswith("quietport: ")
    ]
    return {words[1]: words[2] for words in lines if words[1] != "converging"}


def anybody(text: str) -> str:
    """The text without the name of who runs the tests."""
    return text.replace(f"{getpass.getuser()}@{socket.gethostname()}", "USER@MACHINE")


def test_a_limit_that_matches_nothing_is_an_error(two: Two) -> None:
    hosts = two.hosts("limit")
    done = hosts.pyinfra(DEPLOY, "-y", "--limit", "c14")
    assert done.code == 1
    assert "Connecting" not in done.text
    said = sentence_of(done.text)
    assert "--limit c14 matches no host. Did you mean c1" in said
    named = hosts.quietport("apply", "c14")
    assert (named.code, named.out) == (1, "")
    assert "no host called 'c14'. Did you mean c1" in named.err
    record(
        "input", "a `--limit` that matches no host", sees=said, after="untouched: nothing was connected to"
    )


def test_a_hosts_file_without_hosts_is_an_error(two: Two) -> None:
    hosts = two.hosts("nobody")
    hosts.file.write_text("[defaults]\nuser = 'root'\n")
    by_pyinfra = hosts.pyinfra(DEPLOY, "-y")
    by_door = hosts.quietport("apply")
    assert (by_pyinfra.code, by_door.code) == (1, 1)
    said = sentence_of(by_door.text)
    assert "no host in it" in said
    assert said in plain(by_pyinfra.text)
    record("input", "a `hosts.toml` without a host", sees=said, after="untouched: nothing was connected to")


def test_the_second_controller_is_refused_and_the_first_one_converges_what_can_be(two: Two) -> None:
    """Three hosts at once: one converges, one is refused, one is not there; and somebody else comes along."""
    hosts = two.hosts("three", auth_key=None)
    nowhere = two.lab.target(FIRST).public_ip.rpartition(".")[0] + ".250"
    hosts.file.write_text(f'{hosts.file.read_text()}\n[hosts.gone]\naddress = "{nowhere}"\n')
    before = state(two.lab, SECOND)
    with two.apt_held(FIRST), start(hosts, "quietport", "apply") as first:
        assert first.wait_for_name(APT_STEP)
        _, who, process, since = two.owner(FIRST)
        untouched = state(two.lab, FIRST)

        planned = hosts.pyinfra(DEPLOY, "--dry", "--limit", FIRST).ok()
        assert f"{FIRST}: another converge is at work here: {who}" in planned.text
        refused = hosts.quietport("apply", FIRST)
        assert refused.code == 1
        said = sentence_of(refused.text)
        assert f"{FIRST}: refused: another converge is at work here: {who} (process {process})" in said
        assert f"since {since} UTC" in said
        assert closing(refused)[FIRST].startswith("did not converge: refused: another converge")
        # Nothing after the first step was begun, and the host is as the first one has it.
        assert plain(refused.text).count("--> Starting operation: ") == 1
        assert changes(untouched, state(two.lab, FIRST)) == []
        assert two.owner(FIRST)[1:] == [who, process, since]

        assert first.running
        two.release_apt(FIRST)
        done = first.finish(APPLY_TIMEOUT_S)
    record(
        "fault",
        "two controllers at one host: what the second is told",
        sees=anybody(said),
        after="as the first one has it, which goes on and converges",
    )

    assert done.code == 1
    told = closing(done)
    assert told[FIRST].startswith("converged, ")
    assert told[SECOND].startswith("did not converge: refused: it is not on the tailnet, and has no auth_key")
    assert told["gone"].startswith(f"did not converge: cannot connect to {nowhere}: ")
    assert not is_public(two.lab, FIRST)
    assert two.owner(FIRST) == []
    assert changes(before, state(two.lab, SECOND)) == []
    assert is_public(two.lab, SECOND)
    record(
        "fault",
        "three hosts in one run: one is not there, one is refused",
        sees=" ".join(f"quietport: {name} {told[name]}" for name in (SECOND, "gone")),
        after="the third one converged; the refused one is untouched; the exit code is 1",
        hosts=("gone",),
    )


def test_the_lock_of_a_controller_that_was_killed_is_recognised(two: Two) -> None:
    """What it began is let come to its end, and the next one goes on from there."""
    hosts = two.hosts("killed")
    with two.apt_held(SECOND):
        with start(hosts, "pyinfra", "inventory", DEPLOY, "-y", "--limit", SECOND) as dead:
            assert dead.wait_for_name(APT_STEP)
            two.wait_for_waiter(SECOND)
            _, who, process, since = two.owner(SECOND)
            dead.kill()
        with start(hosts, "quietport", "apply", SECOND) as second:
            assert second.wait_for_name(LOCK_STEP)
            # Its last command waits for apt still, with nobody to tell.
            waiting = "waiting for what a converge that ended without finishing began: "
            end = time.monotonic() + 60
            while waiting not in second.text:
                assert time.monotonic() < end, second.text
                time.sleep(0.1)
            assert two.owner(SECOND)[2] != process
            two.release_apt(SECOND)
            done = second.finish(APPLY_TIMEOUT_S)
    assert done.code == 0, done.text[-3000:]
    (said,) = [
        line.strip() for line in plain(done.text).splitlines() if "without finishing; this one" in line
    ]
    assert f"the converge of {who} (process {process}) since {since} UTC ended without finishing" in said
    assert closing(done)[SECOND].startswith("converged, ")
    assert not is_public(two.lab, SECOND)
    record(
        "fault",
        "the lock of a controller that was killed",
        sees=anybody(said.removeprefix(f"[{SECOND}]")),
        after="taken over once its last command has ended; private",
    )


def test_all_converged_is_zero(two: Two) -> None:
    with start(two.hosts("killed"), "quietport", "apply") as running:
        done = running.finish(APPLY_TIMEOUT_S)
    assert done.code == 0, done.text[-3000:]
    assert closing(done) == {FIRST: "converged, no changes", SECOND: "converged, no changes"}
    assert two.owner(FIRST) == two.owner(SECOND) == []
