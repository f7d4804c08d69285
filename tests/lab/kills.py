"""Kill the converge again and again: `python -m tests.lab.kills --kills 200 --seed 7` (make kills N= SEED=).

A chain begins with a host that is blank, or that has drifted from what is declared; its converge is killed
at an operation (SIGKILL, nothing is told), run again and killed again, and in the end run to its end. Then
the host must be what it is after a run that was never killed, restarts that were due included, and a further
run must have nothing to do. All the time the host is looked at from inside and from its public side.

The seed decides where the kills go. When a chain fails, its number (`--only`) does the same kills again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deploys import packages
from lab import targets
from lab.process import LabError, say
from lab.state import Target
from lab.tailnet import Tailnet
from operations import docker
from quietport import sshd
from tests.lab import fingerprint
from tests.lab.fingerprint import Fingerprint
from tests.lab.interrupt import Converge
from tests.lab.outlook import Outlook, observed
from tests.lab.record import plain
from tests.lab.story import DEPLOY, SECRET_PATH, SECRET_VARIABLE, Hosts, Lab, Place, canary

Begins = Literal["blank", "drifted"]
Stratum = Literal["risky", "operation", "time"]

SCHEMA = 1
# What the kills of a chain are aimed at, in any order; a campaign is quicker with longer chains.
STRATA: tuple[Stratum, ...] = ("risky", "risky", "time", "time", "operation")
RISKY = ("firewall: ", "ssh: answers", "proof: ")
# From then on the host is private for good.
PROVEN = "Guard disarmed."
# An operation without work is over that quickly; a kill is aimed into the next one then.
SHORTEST_S = 0.3
REACHABLE_WITHIN_S = 10.0
# sshd is restarted in a chain; that takes a fraction of this, but where the machine is very busy.
SSHD_GONE_S = 10.0
RUN_TIMEOUT_S = 900
PROBED = (22, 80, 2222, 2375, 8080)
CONTROL_PORT = 2222
# control/lock.py
GOES_ON = "ended without finishing; this one goes on from there"
BEGUN = "waiting for what a converge that ended without finishing began"
DEFAULT_KILLS = 30
DEFAULT_SEED = 22


@dataclass(frozen=True)
class Kind:
    """A host that chains are run on."""

    name: str
    distro: str
    docker: str


KINDS = (Kind("k13", "trixie", "none"), Kind("k12", "bookworm", "none"), Kind("k13d", "trixie", "debian"))


# The plan: pure


@dataclass(frozen=True)
class Shot:
    """A kill as the seed has it; which operation that is depends on what a run of today is made of."""

    stratum: Stratum
    where: float
    """Which of the operations it is about, from 0 to 1."""
    when: float
    """How far into that operation, from 0 to 1."""
    pause: float
    """Seconds until the run is started again."""


@dataclass(frozen=True)
class Chain:
    """Kills one after the other on one host."""

    number: int
    host: str
    begins: Begins
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Operation:
    """An operation of the run that was never killed."""

    name: str
    took: float
    """Seconds."""


@dataclass(frozen=True)
class Aim:
    """A kill on a host: when operation `number` (from 1) has begun, and `delay` seconds after."""

    number: int
    name: str
    delay: float


def plan(*, kills: int, seed: int) -> list[Chain]:
    """The chains of a campaign."""
    dice = random.Random(f"{seed} kills")  # noqa: S311
    chains: list[Chain] = []
    left = kills
    while left > 0:
        at = len(chains)
        # Every host drifts first: it comes from the run that was never killed, and needs no restore.
        begins: Begins = "drifted" if at // len(KINDS) % 3 == 0 else "blank"
        strata = dice.sample(STRATA, len(STRATA))
        shots = [
            Shot(stratum, dice.random(), dice.random(), dice.choice((0.0, 0.0, 3 * dice.random())))
            for stratum in strata[:left]
        ]
        left -= len(shots)
        chains.append(Chain(at + 1, KINDS[at % len(KINDS)].name, begins, tuple(shots)))
    return chains


def aim(shot: Shot, operations: Sequence[Operation]) -> Aim:
    """Where a shot goes in a run of these operations.

    `risky` is one of the firewall's and ssh's steps, `operation` any one with equal chances, `time` any
    moment: an operation's chance is how long it takes.
    """
    everything = list(range(len(operations)))
    if shot.stratum == "risky":
        some = [at for at in everything if operations[at].name.startswith(RISKY)]
        at = some[int(shot.where * len(some))]
    elif shot.stratum == "operation":
        at = int(shot.where * len(operations))
    else:
        moment = shot.where * sum(one.took for one in operations)
        at = 0
        while at < len(operations) - 1 and moment >= operations[at].took:
            moment -= operations[at].took
            at += 1
    chosen = operations[at]
    return Aim(at + 1, chosen.name, round(shot.when * max(chosen.took, SHORTEST_S), 2))


def aims(chain: Chain, operations: Sequence[Operation]) -> list[Aim]:
    """Where the kills of a chain go, the early ones first: a run gets further each time."""
    # What drifted is not installed anew: the first steps have nothing to do.
    first = 0 if chain.begins == "blank" else _index(operations, "users: ")
    rest = operations[first:]
    found = [aim(shot, rest) for shot in chain.shots]
    moved = [Aim(one.number + first, one.name, one.delay) for one in found]
    return sorted(moved, key=lambda one: (one.number, one.delay))


def _index(operations: Sequence[Operation], prefix: str) -> int:
    return next((at for at, one in enumerate(operations) if one.name.startswith(prefix)), 0)


def title(heading: str) -> str:
    """An operation's name: pyinfra puts the deploys it is nested in before it."""
    return heading.rpartition(" | ")[2]


def area(name: str) -> str:
    """The service an operation belongs to: the first word of its name."""
    return name.partition(":")[0]


# The results


@dataclass(frozen=True)
class Kill:
    """A kill that was done."""

    aimed: str
    delay: float
    landed: str
    """The operation that had begun last when the kill came."""
    reached: str
    """The way by which the host answered after it: public, tailnet or nothing."""
    after: float
    """Seconds until it answered."""


@dataclass
class Result:
    """A chain that was run."""

    chain: Chain
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    looks: tuple[int, int] = (0, 0)
    """How often the host was looked at, from inside and from its public side."""
    without_sshd: float = 0.0
    """The longest time without any sshd that listens, in seconds."""
    took: float = 0.0
    waited: list[str] = field(default_factory=list)
    """What killed runs had left at work on the host, as the runs after them say."""
    said: str = ""
    """How the last run says that the one before was killed."""
    proven_at: float | None = None
    """When the first run that proved its change had ended, by time.monotonic."""

    def heard(self, text: str) -> None:
        """Take note of what a run said that has ended."""
        if PROVEN in text and self.proven_at is None:
            self.proven_at = time.monotonic()


@dataclass
class Report:
    """A campaign."""

    kills: int
    seed: int
    results: list[Result] = field(default_factory=list)
    controls: dict[str, list[str]] = field(default_factory=dict)
    """What the same looks say of things that were done on purpose."""

    @property
    def failed(self) -> list[Result]:
        """The chains that did not end as they must."""
        return [result for result in self.results if result.failures]

    def again(self, result: Result) -> str:
        """The command that does the kills of one chain again."""
        options = f"--kills {self.kills} --seed {self.seed} --only {result.chain.number}"
        return f"python -m tests.lab.kills {options}"

    def to_json(self) -> dict[str, Any]:
        """{"schema": 1, "kills", "seed", "controls", "chains": [{"chain": {...}, "kills": [...], "failures",
        "looks", "without_sshd", "took", "again"}]}; times are seconds."""
        return {
            "schema": SCHEMA,
            "kills": self.kills,
            "seed": self.seed,
            "controls": self.controls,
            "chains": [{**asdict(result), "again": self.again(result)} for result in self.results],
        }

    def table(self) -> str:
        """For people: a line a kill, and what failed."""
        lines = []
        for result in sorted(self.results, key=lambda result: result.chain.number):
            chain = result.chain
            verdict = "FAILED" if result.failures else "same end state"
            lines.append(
                f"{chain.number:>4}  {chain.host:<5} {chain.begins:<8} {result.took:4.0f} s  {verdict}"
            )
            for kill in result.kills:
                lines.append(f"        killed in {kill.landed!r}; answers: {kill.reached}")
            lines += [f"        waited for: {waited}" for waited in result.waited]
            lines += [f"        {failure}" for failure in result.failures]
            if result.failures:
                lines.append(f"        again: {self.again(result)}")
        return "\n".join(lines)


# The work


# What somebody may have done to a converged host, or an older converge have left, much of which takes more
# than a file to put right. Nothing of it opens the public side.
_DRIFT = f"""
sed -i '/^ListenAddress fd7a:/d; $a # drifted' {sshd.DROP_IN}
rm {sshd.UNIT_DROP_IN}
systemctl unmask --quiet ssh.socket
ufw delete allow 41641/udp >/dev/null
ufw --force disable >/dev/null
systemctl disable --quiet ufw.service
rm -r /etc/systemd/system/ufw.service.d
sed -i 's/^OnCalendar=.*/OnCalendar=weekly/' /etc/systemd/system/quietport-report.timer
systemctl disable --quiet --now quietport-report.timer
tailscale set --accept-dns=false
rm /etc/apt/keyrings/tailscale.gpg /etc/apt/preferences.d/quietport-tailscale
echo drifted >{SECRET_PATH}
chmod 0644 {SECRET_PATH}
chmod 0755 /var/log/quietport
echo '{{}}' >/etc/quietport/host.json
printf '\\n' >>/usr/local/lib/quietport/quietport.pyz
rm /home/agent/.ssh/authorized_keys
systemctl daemon-reload
systemctl restart ssh.service
"""
_DRIFT_DOCKER = """
echo '{"ip": "0.0.0.0"}' >/etc/docker/daemon.json
systemctl restart docker.service
echo '# drifted' >>/etc/systemd/system/quietport-docker-user.service
iptables -t mangle -F QUIETPORT-FORWARD
"""
# The packages are fetched once: a converge then unpacks them, and does not wait for a mirror.
_WARM = """
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q -y install --download-only --no-install-recommends "$@"
"""
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKillsKillsKillsKillsKillsKillsKillsKillsKills kills"


class Bench:
    """One host, and what is done to it."""

    def __init__(self, lab: Lab, kind: Kind) -> None:
        self.lab = lab
        self.kind = kind
        self.operations: list[Operation] = []
        self.wanted: Fingerprint | None = None
        self.clean = False
        """Whether the host is as after a run that was never killed."""
        self.hosts = self._hosts()

    @property
    def target(self) -> Target:
        """The host in the lab."""
        return self.lab.target(self.kind.name)

    def _hosts(self) -> Hosts:
        """A hosts file of its own: a restored host gets a new key to the tailnet."""
        secrets = {SECRET_PATH: f"env:{SECRET_VARIABLE}"}
        every = {"secrets": secrets, "docker_source": self.kind.docker, "authorized_keys": [_KEY]}
        return Hosts.of(self.lab, f"kills-{self.kind.name}", every=every)

    def execute(self, text: str, *args: str, timeout: float = 300) -> str:
        """Run a script on the host, past its sshd."""
        argv = ["sh", "-euc", text, "sh", *args]
        return targets.execute(self.lab.run, self.target, argv, timeout=timeout).stdout

    def prepare(self) -> None:
        """Fetch packages, and keep the blank host for `restore`."""
        names = [*packages.BASE, "unattended-upgrades"]
        if self.kind.docker != "none":
            names += docker.packages_for(source=self.kind.docker, codename=self.kind.distro)
        self.execute(_WARM, *names)
        self.lab("snapshot", self.kind.name).ok()

    def restore(self) -> None:
        """The host is blank again."""
        self.clean = False
        self.lab("restore", self.kind.name).ok()
        self.hosts = self._hosts()

    def reference(self) -> None:
        """Converge a blank host without a kill: what it is made of, and what every chain must end as."""
        with Converge.start(self.hosts, "--limit", self.kind.name) as run:
            run.finish(RUN_TIMEOUT_S).ok()
            ends = [*run.begun[1:], time.monotonic()]
            took = [end - begin for begin, end in zip(run.begun, ends, strict=True)]
            self.operations = [Operation(*pair) for pair in zip(map(title, run.names), took, strict=True)]
        self.wanted = fingerprint.take(self.lab.run, self.target)
        if self.wanted.due:
            raise AssertionError(f"after a run that was never killed: {self.wanted.due}")
        if changes := self.pending():
            raise AssertionError(f"after a run that was never killed a further one changes {changes}")
        self.clean = True

    def pending(self) -> list[str]:
        """What a further run would change."""
        return sorted(name for _, name in self.hosts.dry("--limit", self.kind.name).changes)

    def drift(self) -> None:
        """The converged host is no longer what is declared."""
        self.clean = False
        self.execute(_DRIFT + (_DRIFT_DOCKER if self.kind.docker != "none" else ""))

    def chain(self, chain: Chain) -> Result:
        """Run one chain. What is wrong afterwards is in its failures."""
        result = Result(chain)
        began = time.monotonic()
        try:
            if chain.begins == "blank":
                self.restore()
            else:
                if not self.clean:
                    self.restore()
                    self.hosts.pyinfra(DEPLOY, "-y", "--limit", self.kind.name).ok()
                self.drift()
            with observed(self.lab.run, self.target, self.places()) as seen:
                self._kills(chain, result)
                if not result.failures:
                    self._last_run(result)
            self._judge(seen, result)
        except Exception as error:
            # The chains after it go on; this one says what happened.
            last = traceback.extract_tb(error.__traceback__)[-1]
            result.failures.append(f"{type(error).__name__} in {last.name}: {str(error)[-2000:]}")
        self.clean = not result.failures
        if result.failures:
            with contextlib.suppress(AssertionError):
                self.lab("logs", self.kind.name).ok()
        result.took = time.monotonic() - began
        return result

    def places(self) -> list[Place]:
        """What is tried from the public side."""
        addresses = (self.target.public_ip, self.target.public_ip6)
        return [(address, port) for address in addresses for port in PROBED]

    def _kills(self, chain: Chain, result: Result) -> None:
        for number, one in enumerate(aims(chain, self.operations), start=1):
            kill = self._kill(one, f"{chain.number}-{number}", result)
            if kill is None:
                return
            result.kills.append(kill)
            if kill.reached == "nothing":
                result.failures.append(
                    f"killed in {kill.landed!r}: for {REACHABLE_WITHIN_S:.0f} s it answered"
                    " neither on its public nor on its tailnet address"
                )
            time.sleep(chain.shots[number - 1].pause)

    def _kill(self, one: Aim, word: str, result: Result) -> Kill | None:
        """Kill a run there; None when it failed by itself before. One that is done too early is run again."""
        delay = one.delay
        for _ in range(3):
            with Converge.start(self.hosts, "--limit", self.kind.name) as run:
                run.wait_for_heading(one.number, timeout=RUN_TIMEOUT_S)
                with contextlib.suppress(TimeoutError):
                    # Today it may be quicker; then at the beginning of the one after it.
                    run.wait_for_heading(one.number + 1, timeout=delay)
                killed = run.running
                run.kill()
                landed = title(run.names[-1]) if run.names else "connecting"
                done = run.finish(30)
            self._log(f"{word}.txt", done.text)
            result.waited += waited_for(done.text)
            result.heard(done.text)
            if killed and done.code < 0:
                reached, after = self.answers()
                return Kill(one.name, delay, landed, reached, after)
            if done.code != 0:
                result.failures.append(f"the run before kill {word} failed: {_end(done.text)}")
                return None
            delay = 0.0
        raise AssertionError(f"no run was still there at {one.name!r} to be killed")

    def _last_run(self, result: Result) -> None:
        done = self.hosts.pyinfra(DEPLOY, "-y", "--limit", self.kind.name)
        self._log(f"{result.chain.number}-last.txt", done.text)
        result.waited += waited_for(done.text)
        result.heard(done.text)
        result.said = next((line for line in _lines(done.text) if GOES_ON in line), "")
        if done.code != 0:
            result.failures.append(f"the run after the kills failed: {_end(done.text)}")
            return
        assert self.wanted is not None
        found = fingerprint.take(self.lab.run, self.target)
        result.failures += [f"end state: {line}" for line in fingerprint.differences(self.wanted, found)]
        result.failures += [f"a further run would change: {name}" for name in self.pending()]

    def _judge(self, seen: Outlook, result: Result) -> None:
        result.looks = (seen.inside.looks, seen.outside.looks)
        result.without_sshd = round(seen.without_sshd(), 2)
        # A blank host is public until a change is proven; one that has drifted was closed all along.
        proven_at = (result.proven_at or math.inf) if result.chain.begins == "blank" else 0.0
        result.failures += seen.violations(proven_at=proven_at)
        if result.without_sshd > SSHD_GONE_S:
            result.failures.append(f"no sshd listened anywhere for {result.without_sshd:.1f} s")

    def answers(self) -> tuple[str, float]:
        """The way by which sshd answers the operator now, and after how many seconds; or nothing."""
        began = time.monotonic()
        while time.monotonic() - began < REACHABLE_WITHIN_S:
            for way, answers in (("public", self._public), ("tailnet", self._tailnet)):
                if answers():
                    return way, round(time.monotonic() - began, 2)
            time.sleep(0.2)
        return "nothing", REACHABLE_WITHIN_S

    def _public(self) -> bool:
        try:
            with socket.create_connection((self.target.public_ip, 22), timeout=1) as connection:
                connection.settimeout(2)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _tailnet(self) -> bool:
        file = self.hosts.file.parent / "operator" / f"{self.kind.name}.json"
        addresses = json.loads(file.read_text())["tailnet_addresses"] if file.is_file() else []
        proxy = Tailnet.attach(self.lab.run.directory).proxy_command
        for address in addresses:
            argv = ["sh", "-c", proxy.replace("%h", address).replace("%p", "22").replace("%%", "%")]
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdout is not None
            alarm = threading.Timer(4, process.kill)
            alarm.start()
            try:
                if process.stdout.read(4) == b"SSH-":
                    return True
            finally:
                alarm.cancel()
                process.kill()
                process.communicate()
        return False

    def _log(self, name: str, text: str) -> None:
        folder = self.lab.run.logs / "kills"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.kind.name}-{name}").write_text(text)

    # Controls: the same looks, at what was done on purpose

    def control_of_the_watch(self) -> list[str]:
        """What is said of a listener that opens to the public for three seconds. The host must be blank."""
        serve = ["timeout", "3", "python3", "-m", "http.server", str(CONTROL_PORT)]
        with observed(self.lab.run, self.target, self.places()) as seen:
            targets.execute(self.lab.run, self.target, serve, check=False)
        return seen.violations()

    def control_of_the_comparison(self) -> list[str]:
        """What is said of a converged host with a due restart, a due reload and a file that was left."""
        assert self.wanted is not None
        left = "/etc/ssh/sshd_config.d/.quietport.0123456789"
        unit = "/etc/systemd/system/quietport-report.timer"
        self.execute(f"touch {sshd.MAIN} {left}; touch -d tomorrow {unit}")
        found = fingerprint.take(self.lab.run, self.target)
        self.execute(f"rm {left}; touch {unit}; systemctl daemon-reload; systemctl restart ssh.service")
        return fingerprint.differences(self.wanted, found)


def waited_for(text: str) -> list[str]:
    """What a run says that it waits for, because a killed one had begun it: programs with their numbers."""
    return re.findall(rf"{BEGUN}: (.+?)\.$", plain(text), re.MULTILINE)


def _lines(text: str) -> list[str]:
    """What a run said, without colours, prefixes and empty lines."""
    lines = (re.sub(r"^\[\w+\] +", "", line.strip()) for line in plain(text).splitlines())
    return [line for line in lines if line]


def _end(text: str) -> str:
    return " / ".join(_lines(text)[-25:])


@contextlib.contextmanager
def benches(lab: Lab, kinds: Sequence[Kind]) -> Iterator[list[Bench]]:
    """The hosts, prepared; they stay until the lab goes down."""
    canary()
    with ThreadPoolExecutor(len(kinds)) as pool:
        list(pool.map(lambda kind: lab.up(kind="container", distro=kind.distro, name=kind.name), kinds))
        found = [Bench(lab, kind) for kind in kinds]
        list(pool.map(Bench.prepare, found))
    yield found


def campaign(
    lab: Lab, *, kills: int, seed: int, only: Collection[int] = (), say: Callable[[str], None] = say
) -> Report:
    """Run the chains of a plan (or `only` some), each host its own, all hosts at the same time."""
    chains = [chain for chain in plan(kills=kills, seed=seed) if not only or chain.number in only]
    report = Report(kills, seed)
    used = {chain.host for chain in chains}
    with benches(lab, [kind for kind in KINDS if kind.name in used]) as hosts, ThreadPoolExecutor(3) as pool:

        def work(bench: Bench) -> None:
            first = bench is hosts[0]
            if first:
                report.controls["watch"] = bench.control_of_the_watch()
            bench.reference()
            say(f"{bench.kind.name}: converged without a kill, {len(bench.operations)} operations")
            if first:
                report.controls["comparison"] = bench.control_of_the_comparison()
            for chain in chains:
                if chain.host == bench.kind.name:
                    result = bench.chain(chain)
                    report.results.append(result)
                    say(Report(kills, seed, [result]).table())

        for done in [pool.submit(work, bench) for bench in hosts]:
            done.result()
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every chain ended as it must, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=DEFAULT_KILLS, help=f"default: {DEFAULT_KILLS}")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"default: {DEFAULT_SEED}")
    parser.add_argument("--only", type=int, nargs="+", default=(), metavar="CHAIN", help="these chains alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--keep", action="store_true", help="leave the hosts as they are when a chain failed")
    options = parser.parse_args(argv)
    lab = Lab.new("kills")
    report = Report(options.kills, options.seed)
    try:
        report = campaign(lab, kills=options.kills, seed=options.seed, only=options.only)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if options.keep and report.failed:
            print(f"kept: lab run {lab.id}")
        else:
            lab.down()
    landed = sum(len(result.kills) for result in report.results)
    chains = f"{len(report.results)} chains, {len(report.failed)} of them failed"
    print(f"{landed} kills, seed {report.seed}: {chains}")
    return 1 if report.failed or not landed else 0


if __name__ == "__main__":
    sys.exit(main())
