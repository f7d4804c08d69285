"""The main story: a blank host, one command, a host that only its tailnet can see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lab import targets
from lab.aptrepo import AptRepo
from lab.up import Wanted
from tests.lab.hoststate import REPORT
from tests.lab.published import Published, publish
from tests.lab.story import (
    SECRET_PATH,
    SECRET_VARIABLE,
    Chapters,
    Done,
    Hosts,
    Lab,
    Place,
    reachable,
)

RETURN_TIMEOUT_S = 900
# All hosts of a story share two processors, or are emulated: what takes a minute may take five.
GUARD_TIMEOUT_S = 900


@dataclass
class Tale:
    """One story: its lab, its hosts file, and what its chapters found."""

    lab: Lab
    wanted: Sequence[Wanted]
    names: list[str] = field(default_factory=list)
    hosts: Hosts = field(init=False)
    published: dict[str, Published] = field(default_factory=dict)
    chapters: Chapters = field(init=False)

    def ssh_places(self) -> list[Place]:
        """Port 22 of every target's public addresses."""
        targets = [self.lab.target(name) for name in self.names]
        return [(address, 22) for t in targets for address in (t.public_ip, t.public_ip6)]

    def up(self) -> None:
        """Blank targets, made at the same time, and the operator's hosts file for them."""
        with ThreadPoolExecutor() as pool:
            self.names = sorted(pool.map(lambda w: self.lab.up(kind=w.kind, distro=w.distro), self.wanted))
        if "c12" in self.names:
            AptRepo.attach(self.lab.run.directory).publish_docker()
        self.hosts = self.vary("story", {SECRET_PATH: f"env:{SECRET_VARIABLE}"})

    def vary(self, word: str, secrets: dict[str, str], **more: Any) -> Hosts:
        """The story's hosts file with these secrets, and `more` keys for every host.

        Both sources of Docker in one run: Debian 12 takes Docker's own repository, for compose 2.
        """
        every = {"secrets": secrets, "guard_timeout": GUARD_TIMEOUT_S, **more}
        return Hosts.of(self.lab, word, every=every, c12={"docker_source": "docker"})

    def public_side(self) -> dict[str, set[Place]]:
        """Which public addresses answer on port 22, per host."""
        targets = [self.lab.target(name) for name in self.names]
        return {t.name: reachable(t, [(t.public_ip, 22), (t.public_ip6, 22)]) for t in targets}

    def publish(self) -> None:
        """What the specs then find on every host: containers that publish on all addresses, and a report."""
        for name in self.names:
            # The report and the doctor now, not tomorrow: the specs then read what they found.
            self.hosts.ssh(name, "systemctl start quietport-report.service quietport-doctor.service").ok()
        self.published = {name: publish(self.hosts, self.lab.target(name)) for name in self.names}

    def spec_again(self) -> Done:
        """The specs, with what was published. The report may have failed for that at midnight."""
        for name in self.names:
            self.hosts.ssh(name, f"systemctl reset-failed {REPORT}")
        return self.hosts.spec()

    def restart(self) -> None:
        """Reboot every host, and wait until sshd answers on the tailnet again."""
        before = {name: self._boot(name) for name in self.names}
        self.lab("restart", *self.names, timeout=RETURN_TIMEOUT_S + 30 * len(self.names)).ok()
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(lambda name: self._wait_for_return(name, before[name]), self.names))

    def _boot(self, name: str) -> str:
        # A container shares the machine's boot id; when its PID 1 began tells restarts apart.
        done = targets.execute(self.lab.run, self.lab.target(name), ["stat", "-c", "%Z", "/proc/1"])
        return done.stdout.strip()

    def _wait_for_return(self, name: str, before: str) -> None:
        end = time.monotonic() + RETURN_TIMEOUT_S
        last: Done | None = None
        while time.monotonic() < end:
            last = self.hosts.ssh(name, "stat -c %Z /proc/1", timeout=30)
            if last.code == 0 and last.out.strip() not in ("", before):
                self.hosts.ssh(name, "systemctl is-system-running --wait", timeout=180)
                return
            time.sleep(2)
        raise AssertionError(f"{name} did not come back on the tailnet: {last.text[-2000:] if last else ''}")


def tell(word: str, wanted: Sequence[Wanted], *, then: Callable[[Tale], None] | None = None) -> Tale:
    """Begin a story in the background; `then` is its last chapter, and leaves the hosts as it found them."""
    tale = Tale(Lab.new(word.replace("_", "-")), wanted)
    tale.chapters = Chapters(
        [
            ("up", tale.up),
            ("blank", tale.public_side),
            ("dry", lambda: tale.hosts.dry("--diff")),
            ("apply", lambda: tale.hosts.apply()),
            # What comes later makes no sense on a host that is half converged.
            ("applied", lambda: tale.chapters.results["apply"].result().ok()),
            ("closed", tale.public_side),
            ("spec", lambda: tale.hosts.spec()),
            ("again", lambda: tale.hosts.apply()),
            ("publish", tale.publish),
            ("restart", tale.restart),
            ("closed again", tale.public_side),
            ("spec again", tale.spec_again),
            *([("then", lambda: then(tale))] if then else []),
        ],
        name=word,
    ).start()
    return tale
