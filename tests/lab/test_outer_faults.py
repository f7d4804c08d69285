"""Faults around the host: its link, its disk, a reboot, apt's repositories, the tailnet's control server.

Each host ends private, or as it was; one sentence says which and why; a rerun when the fault is gone makes it
private. At which operation a fault comes is thrown with dice (tests/lab/interrupt.py: QUIETPORT_SEED). Three
stories at the same time, because most of it is waiting: what supplies the host, its link, and the machine.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest

from lab import faults, targets
from lab.aptrepo import AptRepo
from lab.tailnet import Tailnet
from tests.lab.interrupt import Converge, seeded
from tests.lab.own import Waits, own_lab
from tests.lab.record import record, sentence_of
from tests.lab.story import CONVERGE_TIMEOUT_S, DEPLOY, Chapters, Done, Hosts, Lab, reachable
from tests.lab.untouched import changes, ssh_and_firewall

pytestmark = pytest.mark.container

# Debian 12 beside the others': faults of the repositories go by the codename in their paths.
SUPPLY, SLOW, JOINING = "c12-supply", "c13-slow", "c13-joining"
CUT, OTHER = "c13-cut", "c13-other"
DISK, BOOT = "c13-disk", "c13-boot"
HOSTS = {SUPPLY: "bookworm", **dict.fromkeys((SLOW, JOINING, CUT, OTHER, DISK, BOOT), "trixie")}

# Operations of a converge without Docker and secrets, about: a number above is one that never begins.
OPERATIONS = 29
QUICK: Mapping[str, Any] = {"docker_source": "none", "secrets": {}}
# What a run with a fault takes at most, on a machine that does much else: other hosts go on to their end.
BOUND_S = 900
# A silently cut link is known after 60 s (control/session.py); this machine may be busy.
NOTICED_S = 400
AS_IT_WAS, PRIVATE = "as it was", "private"
# What the page says of a fault at a random operation: which of them it is depends on the operation.
EITHER = "as it was, or private"
AGAIN = "; the next run makes it private"

APT_FAULTS: Mapping[str, tuple[str, list[dict[str, str]], str]] = {
    "404": (
        "apt's repository answers 404",
        [{"path": "/tailscale/*/dists/bookworm/*", "kind": "404"}],
        "404 Not Found",
    ),
    "500": (
        "apt's repository answers 500",
        [{"path": "/tailscale/*/dists/bookworm/*", "kind": "500"}],
        "500 Internal Server Error",
    ),
    # Before any list was fetched whole: with lists and the package reachable, nobody would ask.
    "hang": (
        "apt's repository hangs",
        [{"path": "/tailscale/*/dists/bookworm/*", "kind": "hang"}],
        "gives no answer",
    ),
    "expired": ("apt's repository has an expired Release file", [], "its Release file expired"),
    "hash": (
        "apt's repository serves a package with a wrong hash",
        [{"path": "/tailscale/*/pool/bookworm/*.deb", "kind": "corrupt"}],
        "has another hash than its signed index says",
    ),
}


@dataclass
class Faults:
    """The lab with its hosts, and the stories that are told about them."""

    lab: Lab
    hosts: Hosts = field(init=False)
    supply: Chapters = field(init=False)
    link: Chapters = field(init=False)
    machine: Chapters = field(init=False)

    def begin(self) -> None:
        """Make the hosts, then tell all stories at once."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: self.lab.up(kind="container", distro=HOSTS[name], name=name), HOSTS))
        self.hosts = Hosts.of(self.lab, "outer", every=QUICK)
        self.link = Chapters(
            [("cut for good", self.cut_for_good), ("cut for 20 s", self.cut_for_a_while)]
        ).start()
        self.machine = Chapters(
            [
                ("disk full", self.disk_full),
                ("disk full at ssh", self.disk_full_at_the_last_step),
                ("rebooted", self.rebooted),
            ]
        ).start()
        apt = [(what, lambda key=key: self.apt_fault(key)) for key, (what, _, _) in APT_FAULTS.items()]
        self.supply = Chapters(
            [
                *apt,
                ("others are done", self.others_are_done),
                ("control server down", self.control_server_down),
                ("control server restarts", self.control_server_restarts),
                ("control server slow", self.control_server_slow),
                ("again", lambda: self.hosts.apply()),
            ]
        ).start()

    def converge(self, *names: str) -> Converge:
        """Start a converge of these hosts, which is expected to say something."""
        return Converge.start(self.hosts, *(word for name in names for word in ("--limit", name)))

    def settled(self, name: str, before: frozenset[str]) -> str:
        """AS_IT_WAS or PRIVATE: what the host is now. Anything in between fails."""
        target = self.lab.target(name)
        places = [(target.public_ip, 22), (target.public_ip6, 22)]
        now = ssh_and_firewall(self.lab, name)
        open_places = reachable(target, places)
        if now == before:
            assert open_places == set(places), f"{name}: as it was, but the public side does not reach it"
            return AS_IT_WAS
        # The firewall is up, or sshd moved, or both: in each case the tailnet is the only way.
        assert not open_places, f"{name}: {changes(before, now)}, and the public side reaches {open_places}"
        self.hosts.ssh(name, "true").ok()
        return PRIVATE

    def must_become_private(self, name: str, *, lost_key: bool = False) -> None:
        """What a rerun does when the fault is gone.

        `lost_key`: the host, or the control server, may have gone down between the registration and
        tailscaled's note of it. A key that is good for one host is used up then, and another is what the
        sentence asks for.
        """
        done = self.hosts.pyinfra(DEPLOY, "-y", "--limit", name)
        if lost_key and "the auth key was used up before" in done.text:
            key = Tailnet.attach(self.lab.run.directory).auth_key()
            again = Hosts.of(self.lab, "another-key", every=QUICK, **{name: {"auth_key": f"file:{key}"}})
            done = again.pyinfra(DEPLOY, "-y", "--limit", name)
        for _ in range(3):
            if done.code == 0 or "does not answer as SSH" not in done.text:
                break
            # The relay went down with the control server: paths through the tailnet take a while to be back.
            time.sleep(10)
            done = self.hosts.pyinfra(DEPLOY, "-y", "--limit", name)
        done.ok()
        target = self.lab.target(name)
        assert not reachable(target, [(target.public_ip, 22), (target.public_ip6, 22)])
        self.hosts.ssh(name, "true").ok()

    # What supplies the host

    def apt_fault(self, key: str) -> None:
        what, paths, part = APT_FAULTS[key]
        repository = AptRepo.attach(self.lab.run.directory)
        before = ssh_and_firewall(self.lab, SUPPLY)
        repository.set_faults(paths)
        if key == "expired":
            yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
            repository.sign_again(valid_until=yesterday, codenames=["bookworm"])
        try:
            with self.converge(SUPPLY) as running:
                done = running.finish(BOUND_S)
        finally:
            repository.set_faults([])
            if key == "expired":
                repository.sign_again(valid_until=None, codenames=["bookworm"])
        sentence = failed_with(done, SUPPLY)
        assert part in sentence
        assert repository.tailscale_uri in sentence
        assert self.settled(SUPPLY, before) == AS_IT_WAS
        installed = self.in_target(SUPPLY, "dpkg-query -W tailscale 2>/dev/null || echo none")
        assert installed.strip() == "none"
        record("fault", what, sees=sentence, after=AS_IT_WAS + AGAIN)

    def others_are_done(self) -> None:
        """The control server is everybody's: its faults come when the other stories have ended."""
        futures = [future for story in (self.link, self.machine) for future in story.results.values()]
        wait(futures, timeout=2 * CONVERGE_TIMEOUT_S)

    def control_server_down(self) -> None:
        tailnet = Tailnet.attach(self.lab.run.directory)
        before = ssh_and_firewall(self.lab, SUPPLY)
        with faults.control_server_down(tailnet), self.converge(SUPPLY) as running:
            done = running.finish(BOUND_S)
        sentence = failed_with(done, SUPPLY)
        assert f"{tailnet.login_server} gave no answer" in sentence
        assert self.settled(SUPPLY, before) == AS_IT_WAS
        self.must_become_private(SUPPLY)
        record("fault", "the tailnet's control server is down", sees=sentence, after=AS_IT_WAS + AGAIN)

    def control_server_restarts(self) -> None:
        tailnet = Tailnet.attach(self.lab.run.directory)
        before = ssh_and_firewall(self.lab, JOINING)
        after = seeded("control server").uniform(0, 2)
        with self.converge(JOINING) as running:
            assert running.wait_for_name("tailscale: on the tailnet")
            time.sleep(after)
            with faults.control_server_down(tailnet):
                time.sleep(3)
            done = running.finish(BOUND_S)
        if done.code != 0:
            # It joined; but the operator's way to it was not back when the gate asked for it.
            assert failures(done, JOINING)
            self.settled(JOINING, before)
        assert "Traceback" not in done.text
        self.must_become_private(JOINING, lost_key=True)
        what = "the tailnet's control server restarts during the join"
        sees = (
            "nothing: the run waits and goes through; or it is refused, because the tailnet is not back yet"
        )
        record("fault", what, sees=sees, after=EITHER + AGAIN)

    def control_server_slow(self) -> None:
        tailnet = Tailnet.attach(self.lab.run.directory)
        with self.converge(SLOW) as running:
            assert running.wait_for_name("tailscale: on the tailnet")
            with faults.control_server_silent(tailnet):
                time.sleep(20)
                assert running.names[-1].endswith("tailscale: on the tailnet"), "the control: it had to wait"
            done = running.finish(BOUND_S)
        done.ok()
        self.must_become_private(SLOW)
        self.goes_through("the tailnet's control server answers after 20 s only", done)

    # The link

    def cut_for_good(self) -> None:
        """One of two hosts is cut off: the other one goes on to its end."""
        before = ssh_and_firewall(self.lab, CUT)
        dice = seeded("link cut for good")
        number, after = dice.randint(3, OPERATIONS), dice.uniform(0, 1)
        with contextlib.ExitStack() as cut, self.converge(CUT, OTHER) as running:
            at = self.at(running, number, after, cut, faults.link_cut(self.lab.run, self.lab.target(CUT)))
            running.wait_for_text(f"{CUT}: failed: ", f"{CUT}: refused: ", timeout=NOTICED_S)
            done = running.finish(BOUND_S)
            public = reachable(self.lab.target(OTHER), [(self.lab.target(OTHER).public_ip, 22)])
        assert not public, "the other host went on, and is private"
        self.hosts.ssh(OTHER, "true").ok()
        sentence = failed_with(done, CUT)
        assert not failures(done, OTHER)
        end = self.settled(CUT, before)
        print(f"cut for good at {at}: {end}")
        record("fault", "the link to the host is cut for good", sees=sentence, after=EITHER + AGAIN)

    def cut_for_a_while(self) -> None:
        before = ssh_and_firewall(self.lab, CUT)
        dice = seeded("link cut for 20 s")
        number, after = dice.randint(3, OPERATIONS), dice.uniform(0, 1)
        with self.converge(CUT) as running:
            with contextlib.ExitStack() as cut:
                at = self.at(running, number, after, cut, faults.link_cut(self.lab.run, self.lab.target(CUT)))
                time.sleep(20)
                assert running.running or number > len(running.names), "the control: it had to wait"
            done = running.finish(BOUND_S)
        what = "the link to the host is cut for 20 s"
        if done.code == 0:
            print(f"{what} at {at}: went through")
            self.goes_through(what, done)
        else:
            sentence = failed_with(done, CUT)
            end = self.settled(CUT, before)
            print(f"{what} at {at}: {end}")
            record("fault", what, sees=sentence, after=EITHER + AGAIN)
        self.must_become_private(CUT)

    # The machine

    def disk_full(self) -> None:
        disk = faults.Disk(self.lab.run, self.lab.target(DISK))
        # Not while files are written: what comes between the copying and the mounting would be gone.
        disk.prepare()
        before = ssh_and_firewall(self.lab, DISK)
        number = seeded("disk full").randint(3, OPERATIONS)
        with contextlib.ExitStack() as full, self.converge(DISK) as running:
            at = self.at(running, number, 0, full, disk.full())
            done = running.finish(BOUND_S)
        if done.code == 0:
            # Nothing was left to write.
            assert number >= OPERATIONS - 2
            return
        sentence = failed_with(done, DISK)
        assert "its disk is full" in sentence
        end = self.settled(DISK, before)
        print(f"disk full at {at}: {end}")
        # Which program found it full depends on the operation.
        sentence = re.sub(r"is full \(.*?: No space left on device\)", "is full (...)", sentence)
        record("fault", "the host's disk is full", sees=sentence, after=EITHER + AGAIN)

    def disk_full_at_the_last_step(self) -> None:
        """The step that moves sshd: nothing of it may be half there, and the step before it is undone."""
        disk = faults.Disk(self.lab.run, self.lab.target(DISK))
        disk.prepare()
        before = ssh_and_firewall(self.lab, DISK)
        with contextlib.ExitStack() as full, self.converge(DISK) as running:
            assert running.wait_for_name("ssh: answers the tailnet alone")
            disk.fill()
            full.callback(disk.free)
            done = running.finish(BOUND_S)
            # While it is full still: what is put back needs no room.
            assert self.settled(DISK, before) == AS_IT_WAS
        sentence = failed_with(done, DISK)
        assert "its disk is full" in sentence
        assert f"{DISK}: undone: " in done.text
        self.must_become_private(DISK)
        what = "the host's disk is full when sshd is to move"
        record("fault", what, sees=sentence, after=AS_IT_WAS + AGAIN)

    def rebooted(self) -> None:
        before = ssh_and_firewall(self.lab, BOOT)
        dice = seeded("rebooted half-way")
        number, after = dice.randint(3, OPERATIONS), dice.uniform(0, 1)
        with self.converge(BOOT) as running:
            at = running.wait_for_heading(number)
            assert at is not None, f"the run ended before its operation {number}:\n{running.text[-2000:]}"
            time.sleep(after)
            self.lab("restart", BOOT).ok()
            done = running.finish(BOUND_S)
        end = self.settled_after_boot(BOOT, before)
        print(f"rebooted at {at}: {end}")
        if done.code == 0:
            assert end == PRIVATE
        else:
            sentence = failed_with(done, BOOT)
            record("fault", "someone else reboots the host half-way", sees=sentence, after=EITHER + AGAIN)
        self.must_become_private(BOOT, lost_key="on the tailnet" in at)

    def settled_after_boot(self, name: str, before: frozenset[str]) -> str:
        """What it is when sshd and tailscaled are up again."""
        end = time.monotonic() + 120
        while True:
            try:
                return self.settled(name, before)
            except AssertionError:
                if time.monotonic() > end:
                    raise
                time.sleep(2)

    # What they share

    def at(
        self,
        running: Converge,
        number: int,
        after: float,
        stack: contextlib.ExitStack,
        fault: AbstractContextManager[None],
    ) -> str:
        """Bring about `fault`, `after` seconds after that operation begins; tell which it was."""
        name = running.wait_for_heading(number)
        assert name is not None, f"the run ended before its operation {number}:\n{running.text[-2000:]}"
        time.sleep(after)
        stack.enter_context(fault)
        return name

    def goes_through(self, what: str, done: Done) -> None:
        """A fault that only took time."""
        assert "Traceback" not in done.text
        record("fault", what, sees="nothing: the run waits and goes through", after=PRIVATE)

    def in_target(self, name: str, command: str) -> str:
        """What a command in the target prints, past its sshd."""
        return targets.execute(self.lab.run, self.lab.target(name), ["sh", "-c", command]).stdout


def failures(done: Done, name: str) -> list[str]:
    """The lines in which a run says why a host failed."""
    marks = (f"{name}: failed: ", f"{name}: refused: ")
    return [line for line in done.text.splitlines() if any(mark in line for mark in marks)]


def failed_with(done: Done, name: str) -> str:
    """The sentence of a run that failed: it names the host and a next step, and is no traceback."""
    assert done.code != 0, f"exit code 0:\n{done.text[-3000:]}"
    assert "Traceback" not in done.text, done.text[-6000:]
    lines = failures(done, name)
    assert lines, f"no sentence about {name}:\n{done.text[-3000:]}"
    sentence = sentence_of("\n".join(lines))
    assert "again" in sentence, f"no next step: {sentence}"
    return sentence


@pytest.fixture(scope="module")
def outer(request: pytest.FixtureRequest, waits: Waits) -> Iterator[Faults]:
    """The lab of this module; its stories begin with it. They leave room for what mostly waits."""
    with own_lab("outer", request.session, asked_by="outer") as lab:
        told = Faults(lab)
        told.begin()
        yield told


LINK: Sequence[str] = ("cut for good", "cut for 20 s")
MACHINE: Sequence[str] = ("disk full", "disk full at ssh", "rebooted")
CONTROL: Sequence[str] = ("control server down", "control server restarts", "control server slow")


@pytest.mark.parametrize("fault", LINK)
def test_a_cut_link_ends_in_a_known_state_and_holds_nobody_up(outer: Faults, fault: str) -> None:
    assert outer.link[fault] is None


@pytest.mark.parametrize("fault", MACHINE)
def test_a_full_disk_and_a_reboot_leave_nothing_half_done(outer: Faults, fault: str) -> None:
    assert outer.machine[fault] is None


@pytest.mark.parametrize("fault", [what for what, _, _ in APT_FAULTS.values()])
def test_a_bad_repository_is_named_in_bounded_time(outer: Faults, fault: str) -> None:
    assert outer.supply[fault] is None


@pytest.mark.parametrize("fault", CONTROL)
def test_the_control_server_is_named_or_waited_for(outer: Faults, fault: str) -> None:
    assert outer.supply[fault] is None


def test_when_the_faults_are_gone_nothing_is_left_to_change(outer: Faults) -> None:
    applied = outer.supply["again"].ok()
    assert applied.changed == frozenset()
