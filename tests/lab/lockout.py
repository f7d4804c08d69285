"""The lockout matrix: `python -m tests.lab.lockout --faults 200 --seed 7` (make chaos FAULTS= SEED=).

A round begins with a host that is converged but for firewall and ssh; its converge has a fault at a moment of
the guarded transaction. Within the guard's timeout and a minute the host must be reached by the old path with
the old state, complete, or by the tailnet with the new one, complete; the controller must have said which.

The seed decides which fault comes when and where. When a round fails, its number (`--only`) does it again.
What needs a kernel, a clock or a boot of its own is done to a VM: power.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
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
from typing import Any

from lab import container, faults, targets
from lab.process import LabError, say
from lab.state import Target
from lab.tailnet import Tailnet
from tests.lab.interrupt import Converge
from tests.lab.lockplan import NOTHING, STAYS, UNDONE, UNKNOWN, Round, Seen, plan, turns, verdict, wrong_words
from tests.lab.record import plain
from tests.lab.story import BIN, DEPLOY, PROGRESS, Done, Hosts, Lab, canary, reachable

SCHEMA = 1
HOSTS = {"k1": "trixie", "k2": "trixie", "k3": "bookworm", "k4": "trixie"}
BEFORE = "tests/lab/before_risky.py"
TIMEOUT_S = 20
CALM_TIMEOUT_S = 120
# After the guard's time: a rollback, begun again once, and a host that boots in between.
GRACE_S = 60
# What a converge takes until its risky part, on a machine that does much else.
RUN_TIMEOUT_S = 240
SHORT_CUT_S = 8.0
# Of a round whose moment did not come, on a machine that does much else.
TRIES = 6
ARM_HEADING = "firewall: denied but for the tailnet"
DEFAULT_FAULTS = 36
DEFAULT_SEED = 5
PLACE = "/root/lockout"
LOOK_EVERY_S = 0.02
SETTLED_LOOKS = 50
PYZ = "/usr/local/lib/quietport/quietport.pyz"

# keep: a snapshot as a guard takes it; back: what a rollback does, whatever is armed.
_SNAPSHOT = f"""
import shutil, subprocess, sys
sys.path.insert(0, {PYZ!r})
from quietport.guard import arming, rollback, state
from quietport.guard.machine import Log, Machine
machine, token, place = Machine(), "0" * 16, {PLACE!r} + "/old"
here = machine.path(state.snapshot_folder(token))
here.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
shutil.rmtree(here, ignore_errors=True)
if sys.argv[1] == "keep":
    arming.take(machine, token)
    subprocess.run(["cp", "-aT", here, place], check=True)
else:
    subprocess.run(["cp", "-aT", place, here], check=True)
    armed = state.Armed(token, 0, "lockout", "", 0.0, 0.0, 0, machine.boot(), "any")
    for problem in rollback.Undo(machine, armed, arming.load(machine, token), Log(aloud=False)).run():
        print(problem)
shutil.rmtree(here)
"""
_ARMED = "/etc/quietport/guard/armed.json"
_BREAK_SSHD = "echo 'NoSuchKeyword yes' >>/etc/ssh/sshd_config; systemctl restart ssh.service || true"
_DENY = "ufw prepend deny from any; ufw prepend deny from any to any port 22 proto tcp"
_CHANGE_ADDRESS = """
systemctl stop tailscaled
rm /var/lib/tailscale/tailscaled.state
systemctl start tailscaled
timeout 15 tailscale up "--auth-key=$1" "--login-server=$2" "--hostname=$3"
"""
_QUIET = f"""
systemctl stop 'quietport-guard-*.timer' 'quietport-guard-*.service' 2>/dev/null || true
if [ -e {_ARMED} ]; then /usr/local/sbin/quietport guard rollback >/dev/null || rm -f {_ARMED}; fi
systemctl reset-failed
systemctl start tailscaled
"""


class TooSlow(AssertionError):
    """The guard's time was over before the moment of the fault."""


@dataclass
class Result:
    """A round that was run."""

    round: Round
    state: str = ""
    failures: list[str] = field(default_factory=list)
    code: int | None = None
    """The exit code of the controller; negative for a signal."""
    said: str = ""
    """Its closing line."""
    landed: str = ""
    settled: float = 0.0
    """Seconds from the arming, or the fault, until nothing was armed and every controller had ended."""
    took: float = 0.0
    tries: int = 0
    """More than one: the guard's time was over before the moment of the fault, and the round began again."""


@dataclass
class Report:
    """A campaign."""

    faults: int
    seed: int
    results: list[Result] = field(default_factory=list)
    controls: dict[str, str] = field(default_factory=dict)
    took: float = 0.0

    @property
    def failed(self) -> list[Result]:
        """The rounds that did not end as they must."""
        return [result for result in self.results if result.failures]

    def again(self, result: Result) -> str:
        """The command that does one round again."""
        options = f"--faults {self.faults} --seed {self.seed} --only {result.round.number}"
        return f"python -m tests.lab.lockout {options}"

    def to_json(self) -> dict[str, Any]:
        """{"schema": 1, "faults", "seed", "took", "controls", "rounds": [{"round": {...}, "state",
        "failures", "code", "said", "landed", "settled", "took", "tries", "again"}]}; times are seconds."""
        rounds = [{**asdict(result), "again": self.again(result)} for result in self.results]
        return {
            "schema": SCHEMA,
            "faults": self.faults,
            "seed": self.seed,
            "took": round(self.took),
            "controls": self.controls,
            "rounds": rounds,
        }

    def table(self) -> str:
        """For people: a line a round, and what failed."""
        lines = []
        for one in sorted(self.results, key=lambda one: one.round.number):
            code = "" if one.code is None else f"exit {one.code}"
            verdict = "FAILED" if one.failures else one.state
            lines.append(
                f"{one.round.number:>4}  {one.round.host:<3} {one.took:4.0f} s  {verdict:<7} {code:<9} "
                f"{one.round}{f' ({one.landed})' if one.landed else ''}"
                f"{f', {one.tries} tries' if one.tries > 1 else ''}"
            )
            lines += [f"        {failure}" for failure in one.failures]
            if one.failures:
                lines += [f"        it said: {one.said}", f"        again: {self.again(one)}"]
        return "\n".join(lines)


class Watch:
    """What the guard of a host does, seen through /proc of this machine 50 times a second."""

    def __init__(self, lab: Lab, target: Target) -> None:
        self.root = Path(f"/proc/{container.first_pid(lab.run, target)}/root")
        self.steps: list[str] = []
        self.ended = 0
        self.armed_at: float | None = None
        self.confirming = False
        self._known: dict[str, tuple[int, str]] = {}
        self._news = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join(5)

    def wait(self, happened: Callable[[], bool], *, timeout: float) -> bool:
        """Wait until `happened`, which is asked after every look."""
        with self._news:
            return self._news.wait_for(happened, timeout)

    @property
    def armed(self) -> bool:
        """Whether a guard is armed now."""
        return (self.root / _ARMED.lstrip("/")).exists()

    def _watch(self) -> None:
        while not self._over:
            try:
                armed, lines = self.armed, list(self._lines())
            except OSError:
                # The container went down; the next look may find nothing at all.
                armed, lines = False, []
            with self._news:
                if armed and self.armed_at is None:
                    self.armed_at = time.monotonic()
                at_work = {text.partition(" -- ")[2] for text in lines if " guard exec " in text}
                at_work.discard("")
                self.steps += sorted(at_work - set(self.steps))
                self.ended = len(self.steps) - len(at_work)
                self.confirming = self.confirming or any(" guard confirm " in text for text in lines)
                self._news.notify_all()
            time.sleep(LOOK_EVERY_S)

    def _lines(self) -> Iterator[str]:
        """The command lines of the Python programs in there.

        One that was read so often has done its exec(3) long ago: to read all of them at every look would
        take an eighth of a processor for each host.
        """
        known: dict[str, tuple[int, str]] = {}
        for process in (self.root / "proc").iterdir():
            if not (name := process.name).isdigit():
                continue
            looks, line = self._known.get(name, (0, ""))
            if looks < SETTLED_LOOKS:
                looks, line = looks + 1, self._line(name)
            known[name] = looks, line
            if line:
                yield line
        self._known = known

    def _line(self, name: str) -> str:
        try:
            with (self.root / "proc" / name / "cmdline").open("rb", buffering=0) as file:
                words = file.read(4096).split(b"\0")
        except OSError:
            return ""
        # Without the shell around it, which has the same words in one.
        return b" ".join(words).decode(errors="replace").strip() if words[0].endswith(b"python3") else ""

    def rollbacks(self) -> list[str]:
        """The process ids, inside, of rollbacks at work."""
        found = []
        for process in (self.root / "proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit() and b"\0guard\0rollback\0" in (process / "cmdline").read_bytes():
                    found.append(process.name)
        return found


class Bench:
    """One host, and what is done to it."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        # For what has no fault: on a busy machine a converge may well take longer than the rounds' timeout.
        self.calm = self._hosts("calm", guard_timeout=CALM_TIMEOUT_S)
        self.hosts = self._hosts()
        self.steps: list[str] = []
        self.disk: faults.Disk | None = None

    @property
    def target(self) -> Target:
        """The host in the lab."""
        return self.lab.target(self.name)

    def _hosts(self, word: str = "lockout", **more: Any) -> Hosts:
        every = {"docker_source": "none", "secrets": {}, "guard_timeout": TIMEOUT_S, **more}
        return Hosts.of(self.lab, f"{word}-{self.name}", every=every)

    def execute(self, *argv: str, check: bool = True, timeout: float = 120) -> str:
        """Run a command on the host, past its sshd."""
        return targets.execute(self.lab.run, self.target, argv, check=check, timeout=timeout).stdout

    def converge(self, hosts: Hosts | None = None) -> Converge:
        """Start a converge by the door that knows what became of the host."""
        argv = (str(BIN / "python"), "-P", "-m", "control.converge", "inventory", DEPLOY, self.name)
        return Converge.by(hosts or self.hosts, argv)

    # Before the rounds, and between them

    def prepare(self) -> None:
        """Make the old state, keep it, converge without a fault, and keep the new one."""
        self.hosts.pyinfra(BEFORE, "-y", "--limit", self.name).ok()
        self.execute("mkdir", "-p", PLACE)
        self.execute("python3", "-I", "-c", _SNAPSHOT, "keep")
        self.control()
        self.execute("sh", "-c", f"/usr/local/sbin/quietport guard scope >{PLACE}/new.json")

    def control(self) -> Done:
        """A converge without a fault: it must end new. It also tells which the risky steps are."""
        with Watch(self.lab, self.target) as watch, self.converge(self.calm) as run:
            done = run.finish(RUN_TIMEOUT_S).ok()
            self.steps = list(watch.steps)
        assert watch.confirming, "the control: the confirmation was not seen"
        assert len(self.steps) > 3, f"the control: these steps were seen: {self.steps}"
        return done

    def back(self) -> None:
        """The old state again."""
        self.execute("sh", "-c", _QUIET)
        if not self.on_tailnet():
            self.join()
        left = self.execute("python3", "-I", "-c", _SNAPSHOT, "back").strip()
        assert not left, f"the host does not get back to the old state: {left}"
        # That it is the old state, complete, what puts it back has compared itself.
        places = [(self.target.public_ip, 22), (self.target.public_ip6, 22)]
        answering = reachable(self.target, places)
        assert answering == set(places), f"before the round the old path is open at {answering} alone"

    def on_tailnet(self) -> bool:
        """Whether it is on the tailnet, waited for a little."""
        script = (
            "for i in 1 2 3 4 5 6 7 8; do tailscale ip -4 >/dev/null 2>&1 && exit; sleep 0.5; done; exit 1"
        )
        argv = [
            "sh",
            "-c",
            f"tailscale status >/dev/null 2>&1 || sleep 2; tailscale status >/dev/null && {script}",
        ]
        return targets.execute(self.lab.run, self.target, argv, check=False).returncode == 0

    def join(self) -> None:
        """On the tailnet again, as a new node."""
        self.forget_node()
        self.hosts = self._hosts(auth_key=f"file:{self._tailnet().auth_key()}")
        self.execute("systemctl", "restart", "tailscaled")
        # The old path may be shut by what went wrong before: through the container.
        self.execute("python3", "-I", "-c", _SNAPSHOT, "back")
        self.hosts.pyinfra(BEFORE, "-y", "--limit", self.name).ok()

    def _tailnet(self) -> Tailnet:
        return Tailnet.attach(self.lab.run.directory)

    def forget_node(self) -> None:
        """The control server does not know it any more."""
        for node in self._tailnet().nodes():
            if node.hostname == self.name:
                self._tailnet().delete_node(node.name)

    # A round

    def run(self, one: Round) -> Result:
        """Run one round. What is wrong afterwards is in its failures."""
        result = Result(one)
        began = time.monotonic()
        try:
            for left in reversed(range(TRIES)):
                result.tries += 1
                self.back()
                if one.kind.turn == 2 and self.disk is None:
                    self.disk = faults.Disk(self.lab.run, self.target)
                    self.disk.prepare()
                try:
                    self._round(one, result)
                    break
                except TooSlow:
                    if not left:
                        raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            result.failures.append(f"{type(error).__name__} in {last.name}: {str(error)[-2000:]}")
        if result.failures:
            with contextlib.suppress(AssertionError, LabError, subprocess.TimeoutExpired):
                self._log(
                    f"{one.number}-guard.txt", self.execute("journalctl", "-t", "quietport-guard", "-n", "80")
                )
        result.took = round(time.monotonic() - began, 1)
        return result

    def _round(self, one: Round, result: Result) -> None:
        with contextlib.ExitStack() as stack, Watch(self.lab, self.target) as watch:
            run = stack.enter_context(self.converge())
            self._reach(one, run, watch)
            struck = time.monotonic()
            result.landed = run.names[-1].rpartition(" | ")[2] if run.names else "connecting"
            other = self._strike(one, run, watch, stack)
            grace = GRACE_S * (2 if one.fault == "host restarted" else 1)

            def left() -> float:
                """Seconds until the host must be in one of two states; one that was resumed arms later."""
                return (watch.armed_at or struck) + TIMEOUT_S + grace - time.monotonic()

            # A second controller may have armed meanwhile, for longer.
            late = self._wait_until_unarmed(left) and other is None
            done = run.finish(max(0.0, left()) + 2 * GRACE_S)
            armed = watch.armed_at is not None
            if other is not None:
                second = other.finish(RUN_TIMEOUT_S)
                refused = "another converge is at work here" in second.text
                if done.code < 0:
                    done, armed = second, False
                elif done.code > 0 and second.code == 0:
                    # The first was undone, or changed nothing; the second came after it, and made the state.
                    said = closing(done, self.name)
                    result.failures += wrong_words(code=done.code, said=said, state="old", armed=armed)
                    done, armed = second, False
                elif second.code != 0 and not refused:
                    result.failures.append(f"the second controller: {closing(second, self.name)}")
            late = self._wait_until_unarmed(left) or late
            result.settled = round(time.monotonic() - (watch.armed_at or struck), 1)
            self._log(f"{one.number}.txt", run.text + (f"\n--- second\n{other.text}" if other else ""))
            killed = done.code < 0
            if one.fault == "disk full at the rollback":
                seen = self.look()
                assert self.disk is not None
                self.disk.free()
            elif one.fault.startswith("link"):
                stack.close()
                seen = self.look()
            else:
                seen = self.look()
        result.code, result.said = done.code, closing(done, self.name)
        result.state = verdict(seen)
        if late:
            result.failures.append(f"a guard is armed {result.settled:.0f} s after the arming")
        if result.state in ("mixture", "unreachable"):
            result.failures.append(f"{result.state}: {seen}")
        if not killed:
            words = wrong_words(code=done.code, said=result.said, state=result.state, armed=armed)
            result.failures += words
        wanted = ENDS.get(one.fault)
        if wanted is not None and result.state != wanted:
            result.failures.append(f"{result.state}, and this fault leaves no other state than {wanted}")

    def _wait_until_unarmed(self, left: Callable[[], float]) -> bool:
        """Wait until nothing is armed; whether something is when the time is over."""
        while armed := self.is_armed():
            if left() <= 0:
                break
            time.sleep(0.5)
        return armed

    def is_armed(self) -> bool:
        """Whether the host has a guard armed; one that is down has, for all that is known."""
        try:
            argv = ["test", "!", "-e", _ARMED]
            return targets.execute(self.lab.run, self.target, argv, check=False).returncode != 0
        except LabError:
            return True

    def _reach(self, one: Round, run: Converge, watch: Watch) -> None:
        """Wait until the moment of the round has come."""

        def wait(happened: Callable[[], bool], what: str) -> None:
            if not watch.wait(lambda: happened() or not run.running, timeout=RUN_TIMEOUT_S) or not happened():
                # The fault was not thrown: the host was slower than its guard is patient.
                slow = watch.armed_at is not None and run.wait_for_text(UNDONE.partition(" ")[2], timeout=5)
                kind = TooSlow if slow else AssertionError
                raise kind(f"the run did not get to {what}: {plain(run.text)[-1500:]}")

        if one.moment == "before arm":
            if not run.wait_for_name(ARM_HEADING, timeout=RUN_TIMEOUT_S):
                raise AssertionError(f"the run did not get to the firewall: {plain(run.text)[-1500:]}")
        elif one.moment == "after arm":
            wait(lambda: watch.armed_at is not None, "the arming")
        elif one.moment == "step":
            number = one.step(len(self.steps)) + 1
            wait(lambda: len(watch.steps) >= number, f"step {number}")
            time.sleep(0.4 * one.when)
        elif one.moment == "before confirm":
            wait(lambda: watch.ended >= len(self.steps), "the end of the last step")
            time.sleep(0.3 * one.when)
        else:
            wait(lambda: watch.confirming, "the confirmation")

    def _strike(
        self, one: Round, run: Converge, watch: Watch, stack: contextlib.ExitStack
    ) -> Converge | None:
        """Let the fault happen. Returns a second controller when there is one."""
        fault = one.fault
        if fault == "controller killed":
            run.kill()
        elif fault == "controller frozen past the timeout":
            run.freeze()
            time.sleep(TIMEOUT_S + 5)
            run.thaw()
        elif fault == "link cut for good":
            stack.enter_context(faults.link_cut(self.lab.run, self.target))
        elif fault == "link cut for a while":
            with faults.link_cut(self.lab.run, self.target):
                time.sleep(SHORT_CUT_S)
        elif fault == "disk full at the snapshot":
            assert self.disk is not None
            self.disk.fill()
            stack.callback(self.disk.free)
        elif fault == "disk full at the rollback":
            assert self.disk is not None
            run.kill()
            self.disk.fill()
        elif fault == "host restarted":
            targets.restart(self.lab.run, self.target)
        elif fault.startswith("two controllers"):
            if fault.endswith("killed"):
                run.kill()
            return stack.enter_context(self.converge(self.calm))
        elif fault == "rollback killed half-way":
            run.kill()
            self._kill_rollback(one, watch)
        else:
            # Frozen meanwhile: what is done by hand is done while the guard is armed.
            run.freeze()
            self._by_hand(fault)
            run.thaw()
        return None

    def _kill_rollback(self, one: Round, watch: Watch) -> None:
        end = time.monotonic() + TIMEOUT_S + 15
        while not (found := watch.rollbacks()):
            if time.monotonic() > end:
                raise AssertionError("no rollback began")
            time.sleep(0.02)
        # Python is there after a fraction of a second, the first files a little later.
        time.sleep(0.2 + 2 * one.when)
        self.execute("kill", "-KILL", *found, check=False)

    def _by_hand(self, fault: str) -> None:
        if fault == "tailscaled stopped":
            # A start of sshd at the same time cancels the job: its unit wants tailscaled.
            self.execute("systemctl", "stop", "tailscaled", check=False)
        elif fault == "tailscale logged out":
            self.execute("timeout", "10", "tailscale", "logout")
        elif fault == "tailnet address changed":
            self.forget_node()
            key = self._tailnet().auth_key().read_text().strip()
            argv = ["sh", "-euc", _CHANGE_ADDRESS, "sh", key, self._tailnet().login_server, self.name]
            self.execute(*argv, check=False)
        elif fault == "tailnet key expired":
            self._tailnet().expire_node(self.name)
        elif fault == "sshd_config broken by hand":
            self.execute("sh", "-c", _BREAK_SSHD)
        elif fault == "ufw deny for everything by hand":
            self.execute("sh", "-c", _DENY)
        else:
            raise AssertionError(f"nobody knows how {fault!r} is done")

    # What came of it

    def look(self) -> Seen:
        """How the host is, and how it answers."""
        public4, public6 = self.target.public_ip, self.target.public_ip6
        open_places = reachable(self.target, [(public4, 22), (public6, 22)])
        return Seen(
            not_old=self._against(f"{PLACE}/old/manifest.json"),
            not_new=self._against(f"{PLACE}/new.json"),
            public=len(open_places) == 2 and self._banner(public4),
            open_to_public=bool(open_places),
            tailnet=self._tailnet_answers(),
            login=self.hosts.ssh(self.name, "true", timeout=20).code == 0,
        )

    def _against(self, file: str) -> tuple[str, ...]:
        argv = ["/usr/local/sbin/quietport", "guard", "scope", "--against", file]
        done = targets.execute(self.lab.run, self.target, argv, check=False)
        if done.returncode not in (0, 1):
            raise AssertionError(f"guard scope: {done.stdout}{done.stderr}")
        return tuple(done.stdout.splitlines()) if done.returncode else ()

    def _banner(self, address: str) -> bool:
        try:
            with socket.create_connection((address, 22), timeout=2) as connection:
                connection.settimeout(5)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _tailnet_answers(self) -> bool:
        nodes = [node for node in self._tailnet().nodes() if node.hostname == self.name]
        proxy = self._tailnet().proxy_command
        for address in [address for node in nodes for address in node.addresses]:
            argv = ["sh", "-c", proxy.replace("%h", address).replace("%p", "22").replace("%%", "%")]
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert process.stdout is not None

            def end(group: int = process.pid) -> None:
                # With what the shell has started: that has its output open, too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

            alarm = threading.Timer(5, end)
            alarm.start()
            try:
                if process.stdout.read(4) == b"SSH-":
                    return True
            finally:
                alarm.cancel()
                end()
                process.communicate()
        return False

    def _log(self, name: str, text: str) -> None:
        folder = self.lab.run.logs / "lockout"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.name}-{name}").write_text(text)

    # Controls: the same judge, of what was done on purpose

    def control_of_the_judge(self) -> dict[str, str]:
        """What is said of the new state, of one that is neither, and of a host without sshd."""
        found = {"without a fault": verdict(self.look())}
        self.execute("sh", "-c", "ufw --force disable")
        found["ufw off, sshd new"] = verdict(self.look())
        self.back()
        self.execute("sh", "-c", "ufw allow in on tailscale0; ufw --force enable")
        found["ufw on, sshd old"] = verdict(self.look())
        self.back()
        self.execute("sh", "-c", "systemctl stop ssh.socket ssh.service")
        found["no sshd"] = verdict(self.look())
        self.back()
        return found


GONE = "nothing: the run is gone, and the host acts by itself"
# Faults that leave one state alone.
ENDS = {
    "controller frozen past the timeout": None,
    # sshd's unit wants tailscaled: where the step that restarts sshd comes after the stop, it starts both.
    "tailscaled stopped": None,
    "tailscale logged out": "old",
    "tailnet address changed": "old",
    "tailnet key expired": "old",
    "sshd_config broken by hand": "old",
    "ufw deny for everything by hand": "old",
    "host restarted": "old",
    "disk full at the snapshot": "old",
    "disk full at the rollback": "old",
    "two controllers, the first at work": None,
    "two controllers, the first killed": "new",
    "rollback killed half-way": "old",
}

# After these no run is left that could say what became of the change, or the one that is goes through.
SILENT = {
    "controller killed": GONE,
    "disk full at the rollback": GONE,
    "rollback killed half-way": GONE,
    "two controllers, the first killed": "nothing: the second run goes through",
}


def closing(done: Done, name: str) -> str:
    """What a converge says of the host in the end."""
    lines = [line.strip() for line in plain(done.text).splitlines()]
    found = [line for line in lines if line.startswith(f"quietport: {name} ")]
    return found[-1] if found else ""


def told(fault: str) -> tuple[str, ...]:
    """What a converge may say of the change after a fault, of which `wrong_words` lets only the true pass."""
    if fault == "disk full at the snapshot":
        return (NOTHING,)
    return (UNDONE, NOTHING) if ENDS.get(fault) == "old" else (UNDONE, NOTHING, UNKNOWN, STAYS)


def sentences(fault: str) -> str:
    """The same for the table in the docs, where it is not by chance which of them was seen."""
    if fault in SILENT:
        return SILENT[fault]
    found = [f"{text[0].upper()}{text[1:]}" for text in told(fault)]
    if ENDS.get(fault) != "old":
        found.append("nothing: the run goes through")
    return " / ".join(found)


def words(said: str) -> frozenset[str]:
    """Which of the sentences that say what became of a change are in a closing line."""
    return frozenset(text for text in (UNDONE, STAYS, UNKNOWN, NOTHING) if text in said.lower())


def campaign(
    lab: Lab, *, faults: int, seed: int, only: Collection[int] = (), say: Callable[[str], None] = say
) -> Report:
    """Run the rounds of a plan (or `only` some), on all hosts at the same time."""
    canary()
    began = time.monotonic()
    rounds = [
        one for one in plan(faults=faults, seed=seed, hosts=list(HOSTS)) if not only or one.number in only
    ]
    report = Report(faults, seed)
    names = [name for name in HOSTS if any(one.host == name for one in rounds)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: lab.up(kind="container", distro=HOSTS[name], name=name), names))

        def work(name: str) -> None:
            bench = Bench(lab, name)
            try:
                bench.prepare()
            except Exception as error:
                # Said now: the other hosts go on for minutes.
                say(f"{name}: not prepared: {str(error)[-1500:]}")
                raise
            say(
                f"{name}: converged without a fault after {time.monotonic() - began:.0f} s, "
                f"{len(bench.steps)} risky steps"
            )
            if name == names[0]:
                report.controls = bench.control_of_the_judge()
                say(f"{name}: {report.controls}")
            for one in turns(rounds, name):
                result = bench.run(one)
                report.results.append(result)
                say(Report(faults, seed, [result]).table())

        for done in [pool.submit(work, name) for name in names]:
            done.result()
    report.took = time.monotonic() - began
    return report


def campaign_of_ci(lab: Lab) -> Report:
    """The campaign of every test run, which says how far it is; QUIETPORT_SEED chooses another."""
    seed = int(os.environ.get("QUIETPORT_SEED", DEFAULT_SEED))

    def told(line: str) -> None:
        PROGRESS[-1](f"· lockout {line}")

    report = campaign(lab, faults=DEFAULT_FAULTS, seed=seed, say=told)
    (lab.run.logs / "lockout.json").write_text(json.dumps(report.to_json(), indent=1))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every round ended as it must, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.lockout", description=__doc__)
    parser.add_argument("--faults", type=int, default=DEFAULT_FAULTS, help=f"default: {DEFAULT_FAULTS}")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"default: {DEFAULT_SEED}")
    parser.add_argument("--only", type=int, nargs="+", default=(), metavar="ROUND", help="these rounds alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--keep", action="store_true", help="leave the hosts as they are when a round failed")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    lab = Lab(options.run) if options.run else Lab.new("lockout")
    report = Report(options.faults, options.seed)
    try:
        report = campaign(lab, faults=options.faults, seed=options.seed, only=options.only)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if options.run or (options.keep and report.failed):
            print(f"kept: lab run {lab.id}")
        else:
            lab.down()
    print(report.table())
    rounds = f"{len(report.results)} faults, {len(report.failed)} of them failed"
    print(f"seed {report.seed}: {rounds}, {report.took:.0f} s")
    return 1 if report.failed or not report.results else 0


if __name__ == "__main__":
    sys.exit(main())
