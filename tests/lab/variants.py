"""The story of hosts that are not blank: each variant is a host, and one run converges all of them.

What is true of every host is told in chapters, as in tale.py. What is particular to a variant is a `Check`:
what shows that the host really has it before, and what has become of it after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lab import targets, variants
from lab.process import LabError
from lab.state import Target
from lab.tailnet import Tailnet
from lab.up import Wanted
from lab.variants.ssh import ADMIN
from tests.lab.onhost import NOT_LATE, STARTS, OnHost, late
from tests.lab.power import Ended, Power
from tests.lab.record import known_host, plain
from tests.lab.story import (
    SECRET_PATH,
    SECRET_VARIABLE,
    UP_TIMEOUT_S,
    Applied,
    Chapters,
    Done,
    Hosts,
    Lab,
    Place,
    Plan,
    Watch,
    in_test_all,
    reachable,
    watched,
)
from tests.lab.tale import GUARD_TIMEOUT_S, Tale

# Many at once on one Debian 12: all that can be had together.
MIXED = (
    "cloud-init-passwords",
    "foreign-listen",
    "match-passwords",
    "no-ipv6",
    "sudo-password",
    "dpkg-interrupted",
    "apt-locked",
)
# Its machine also goes down under a guard: a boot without Docker takes half the time.
OF_POWER = "vm_mixed"
# Seconds from its boot to the start of tailscaled: an emulated machine has used half of them to get there.
LATE_S = 120
MIXED_VM = (
    "ssh-socket",
    "cloud-init-passwords",
    "match-passwords",
    "no-ipv6",
    "sudo-password",
    "tailnet-ssh",
)
# Elsewhere Docker would only take time.
WITH_DOCKER = ("docker-published",)
# Watched besides whatever a host listens on: sshd's usual ports, and those that people publish.
PORTS = (22, 80, 443, 2222, 2375, 5432, 8080)
WATCH_EVERY_S = 0.3
SPECS_AT_ONCE = 3


def of(kind: str, distro: str) -> tuple[Wanted, ...]:
    """A host for each variant that can be had there."""
    found = []
    for name in variants.ALL:
        try:
            found.append(Wanted.of(kind, distro, variants=[name]))
        except LabError:
            continue
    return tuple(found)


STORIES: dict[str, tuple[Wanted, ...]] = {
    "variants": (
        *of("container", "trixie"),
        Wanted.of("container", "bookworm", name="c12-mixed", variants=MIXED),
    ),
    OF_POWER: (Wanted.of("vm", "bookworm", variants=MIXED_VM),),
}
if in_test_all():
    STORIES["variants_bookworm"] = of("container", "bookworm")


@dataclass(frozen=True)
class Found:
    """A host before its converge, from outside: which of the watched places are there, and open."""

    places: tuple[Place, ...]
    open: frozenset[Place]

    @property
    def closed(self) -> list[Place]:
        """What must stay as it is."""
        return [place for place in self.places if place not in self.open]


@dataclass(frozen=True)
class Convergence:
    """A converge of all hosts, and what the public side saw of each meanwhile."""

    applied: Applied
    seen: Mapping[str, Watch]


@dataclass(frozen=True)
class Specs:
    """What the specs said of one host."""

    passed: int
    failed: tuple[str, ...]
    done: Done

    def ok(self) -> None:
        """Fails with the specs that do not hold."""
        shown = "\n".join(line for line in self.done.out.splitlines() if line.startswith("E  "))
        assert not self.failed, f"{self.failed}\n{shown[-4000:]}"
        assert self.passed > 30, f"almost nothing was asked of it\n{self.done.text[-4000:]}"


@dataclass
class Variants(Tale):
    """The story, with its hosts."""

    def up(self) -> None:
        """Every host with its variants; those of one kind and Debian are made by one command."""
        kinds = dict.fromkeys((want.kind, want.distro) for want in self.wanted)
        for kind, distro in kinds:
            same = [want for want in self.wanted if (want.kind, want.distro) == (kind, distro)]
            usual = [want for want in same if want == Wanted.of(kind, distro, variants=want.variants)]
            if usual:
                flags = [word for want in usual for word in ("--variant", ",".join(want.variants))]
                self.lab("up", "--target", kind, "--distro", distro, *flags, timeout=UP_TIMEOUT_S).ok()
            for want in same:
                known_host(want.name)
                if want not in usual:
                    self.lab.up(kind=kind, distro=distro, name=want.name, variants=want.variants)
        self.names = sorted(want.name for want in self.wanted)
        self.hosts = self.vary("story", {SECRET_PATH: f"env:{SECRET_VARIABLE}"})

    def vary(self, word: str, secrets: dict[str, str], **more: Any) -> Hosts:
        """The story's hosts file with these secrets, and Docker only where a variant is about it.

        `more` keys are every host's.
        """
        quick = {
            want.name: {"docker_source": "none"}
            for want in self.wanted
            if not set(want.variants) & set(WITH_DOCKER)
        }
        every = {"secrets": secrets, "guard_timeout": GUARD_TIMEOUT_S, **more}
        return Hosts.of(self.lab, word, every=every, **quick)

    def guest(self, name: str) -> Guest:
        """One of the hosts."""
        return Guest(self, name)

    def each(self, act: Callable[[Guest], Any]) -> dict[str, Any]:
        """What `act` gives for every host, asked at the same time."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return dict(
                zip(self.names, pool.map(lambda name: act(self.guest(name)), self.names), strict=True)
            )

    def find(self) -> dict[str, Found]:
        """Every host before anything is done to it."""
        return self.each(lambda guest: guest.find())

    def dry(self) -> Plan:
        """What a converge would change."""
        return self.hosts.dry()

    def apply(self) -> Convergence:
        """Converge all, probing from the public side what was closed before, for all of the time."""
        found: dict[str, Found] = self.chapters["found"]
        with ExitStack() as stack:
            seen = {
                name: stack.enter_context(
                    watched(self.lab.target(name), found[name].closed, every=WATCH_EVERY_S)
                )
                for name in self.names
            }
            applied = self.hosts.apply()
        return Convergence(applied, seen)

    def open_now(self) -> dict[str, set[Place]]:
        """Which of the watched places the public side reaches, per host."""
        found: dict[str, Found] = self.chapters["found"]
        return self.each(lambda guest: reachable(guest.target, found[guest.name].places))

    def power(self) -> Mapping[str, Ended]:
        """What comes of a guard when its machine goes down; a container has none of its own."""
        return Power(OnHost(self.lab, self.names[0], user=ADMIN)).run()

    def restart_late(self) -> None:
        """Reboot the machine. Its tailscaled fails twice and starts late; nothing is public meanwhile."""
        host = OnHost(self.lab, self.names[0], user=ADMIN)
        host.inside(late(LATE_S))
        with watched(host.target, host.places) as seen:
            self.restart()
        assert seen.opened == []
        assert seen.tries > LATE_S, "the control: somebody looked"
        assert host.inside(STARTS).strip() == "3", "the control: it was late"
        host.inside(NOT_LATE)

    def specs(self) -> dict[str, Specs]:
        """The specs of every host: a few processes, each for some of the hosts."""
        groups = [self.names[at::SPECS_AT_ONCE] for at in range(min(SPECS_AT_ONCE, len(self.names)))]
        with ThreadPoolExecutor(max_workers=SPECS_AT_ONCE) as pool:
            runs = pool.map(self._specs_of, groups)
            return {name: specs for run in runs for name, specs in run.items()}

    def _specs_of(self, names: Sequence[str]) -> dict[str, Specs]:
        done = self.hosts.spec("-rA", "-p", "no:randomly", f"--hosts={','.join(names)}", "tests/spec")
        return {name: verdict(done, name) for name in names}


def verdict(done: Done, name: str) -> Specs:
    """What a run of the specs says of one of its hosts."""
    passed, failed = 0, []
    for line in plain(done.out).splitlines():
        word, _, test = line.partition(" ")
        if not re.search(rf"[\[-]{re.escape(name)}[\]-]", test.partition(" - ")[0]):
            continue
        if word == "PASSED":
            passed += 1
        elif word in ("FAILED", "ERROR"):
            failed.append(test)
    return Specs(passed, tuple(failed), done)


@dataclass(frozen=True)
class Guest:
    """One host of the story."""

    tale: Variants
    name: str

    @property
    def target(self) -> Target:
        """The lab's target."""
        return self.tale.lab.target(self.name)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants it has."""
        return next(want.variants for want in self.tale.wanted if want.name == self.name)

    @property
    def found(self) -> Found:
        """The host before its converge."""
        found: dict[str, Found] = self.tale.chapters["found"]
        return found[self.name]

    @property
    def convergence(self) -> Convergence:
        """The converge it was part of."""
        convergence: Convergence = self.tale.chapters["apply"]
        return convergence

    def inside(self, command: str) -> str:
        """What a shell command prints on the host, run there past its sshd. It must succeed."""
        done = targets.execute(self.tale.lab.run, self.target, ["sh", "-euc", command])
        return done.stdout

    def find(self) -> Found:
        """Look at it from the public side."""
        rows = [line.split() for line in self.inside("ss -Hlnt").splitlines()]
        listening = {int(row[3].rpartition(":")[2]) for row in rows}
        target = self.target
        places = tuple(
            (address, port)
            for address in (target.public_ip, target.public_ip6)
            for port in sorted({*PORTS, *listening})
        )
        return Found(places, frozenset(reachable(target, places)))

    def said(self, *words: str) -> str:
        """The line about this host, in plan or converge, that has all these words. None fails the test."""
        outputs = [self.tale.chapters["dry"].done.text, self.convergence.applied.done.text]
        for line in plain("\n".join(outputs)).splitlines():
            if self.name in line and all(word in line for word in words):
                return re.sub(r"^\s*(?:\[[^\]]+\]\s+)?", "", line)
        ours = [line for text in outputs for line in plain(text).splitlines() if self.name in line]
        raise AssertionError(f"nothing about {self.name} says {words}:\n" + "\n".join(ours[-40:]))

    def changed(self, part: str) -> str:
        """The name of an operation that changed this host and begins with `part`. None fails the test."""
        names = sorted(
            operation.rpartition(" | ")[2]
            for host, operation in self.convergence.applied.changed
            if host == self.name
        )
        found = [name for name in names if name.startswith(part)]
        assert found, f"no operation {part!r} changed {self.name}; these did: {names}"
        return found[0]

    def tailnet_addresses(self) -> list[str]:
        """What is on its tailscale0."""
        shown = self.inside("ip -o addr show dev tailscale0 scope global")
        return [line.split()[3].partition("/")[0] for line in shown.splitlines()]

    def over_tailnet(self) -> str:
        """The ProxyCommand that reaches it."""
        return Tailnet.attach(self.tale.lab.run.directory).proxy_command


@dataclass(frozen=True)
class Check:
    """What is particular to a variant."""

    before: Callable[[Guest], None]
    """Fails unless the host, not converged yet, really has it: the positive control of `after`."""
    sees: Callable[[Guest], str]
    """The sentence about it in the output of plan or converge."""
    after: Callable[[Guest], str]
    """Looks at the host after everything else and returns its state in words, just proven."""


def tell(
    word: str, wanted: Sequence[Wanted], *, checks: Mapping[str, Check], turn: Callable[[], None]
) -> Tale:
    """Begin the story in the background, once `turn` returns."""
    tale = Variants(Lab.new(word.replace("_", "-")), wanted)

    def before(guest: Guest) -> str:
        """What is wrong with the checks' positive controls, as text."""
        wrong = []
        for name in guest.variants:
            try:
                if name in checks:
                    checks[name].before(guest)
            except Exception as error:
                wrong.append(f"{name}: {error}")
        return "\n".join(wrong)

    tale.chapters = Chapters(
        [
            ("wait", turn),
            ("up", tale.up),
            ("found", tale.find),
            ("before", lambda: tale.each(before)),
            ("dry", tale.dry),
            ("apply", tale.apply),
            ("closed", tale.open_now),
            ("spec", tale.specs),
            ("again", lambda: tale.hosts.apply()),
            *([("power", tale.power)] if word == OF_POWER else []),
            ("restart", tale.restart_late if word == OF_POWER else tale.restart),
            ("closed again", tale.open_now),
            ("spec again", tale.specs),
        ],
        name=word,
    ).start()
    return tale
