"""The words the end-to-end tests are written in: a lab run, a converge, a probe from the public side.

Everything goes through the same commands an operator types, in processes of their own: two labs can be
told apart, and what is shown here is what a reader of the docs gets.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab import public
from lab.state import Run, Target
from lab.up import Wanted
from tests.lab.record import known_host

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DEPLOY = "deploys/vps.py"
SECRET_PATH = "/etc/ai-ops-runner/secrets/openai_api_key"
SECRET_VARIABLE = "QUIETPORT_E2E_CANARY"

# An address and a TCP port.
Place = tuple[str, int]

UP_TIMEOUT_S = 2400
CONVERGE_TIMEOUT_S = 1800
COMMAND_TIMEOUT_S = 300


def in_test_all() -> bool:
    """Whether this is `make test-all`."""
    return os.environ.get("QUIETPORT_TEST_ALL") == "1"


def in_ci() -> bool:
    """Whether nothing may be skipped."""
    return os.environ.get("CI") == "true"


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything it said."""
        return self.out + self.err

    def ok(self) -> Done:
        """Itself, when it ended with 0. A failure shows the end of what it said for people."""
        out = "" if self.out.startswith("{") else self.out[-6000:]
        said = f"{out}\n{self.err[-6000:]}"
        assert self.code == 0, f"{shlex.join(self.argv)}: exit code {self.code}\n{said}"
        return self

    def json(self) -> Any:
        """Its standard output, which must be JSON and nothing else."""
        return json.loads(self.ok().out)


def run(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = COMMAND_TIMEOUT_S
) -> Done:
    """Run a command at the top of the checkout, `timeout` in seconds."""
    done = subprocess.run(
        list(argv),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    return Done(tuple(argv), done.returncode, done.stdout, done.stderr)


def toml_of(value: Any) -> str:
    """A TOML value; strings, numbers, booleans, lists and tables are all a hosts file has."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_of(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml_of(item) for item in value) + "]"
    return json.dumps(value)


@dataclass(frozen=True)
class Lab:
    """One lab run, driven by its command line."""

    id: str

    @staticmethod
    def new(word: str) -> Lab:
        """A run of its own, whatever else runs on this machine."""
        return Lab(f"e2e-{word}-{secrets.token_hex(2)}")

    @property
    def run(self) -> Run:
        """The run's state, for what no command prints."""
        return Run(self.id)

    def __call__(self, *args: str, timeout: float = COMMAND_TIMEOUT_S) -> Done:
        """`python -m lab ARGS` for this run."""
        return run([sys.executable, "-m", "lab", "--run", self.id, *args], timeout=timeout)

    def up(self, *, kind: str, distro: str, name: str | None = None, variants: Sequence[str] = ()) -> str:
        """Make a target, blank unless it has variants, and return its name."""
        wanted = Wanted.of(kind, distro, name=name, variants=variants)
        more = ["--name", name] if name else []
        more += ["--variant", ",".join(variants)] if variants else []
        known_host(wanted.name)
        self("up", "--target", kind, "--distro", distro, *more, timeout=UP_TIMEOUT_S).ok()
        return wanted.name

    def down(self) -> Done:
        """Remove what this run made."""
        return self("down")

    def target(self, name: str) -> Target:
        """Addresses of a target and of its public side."""
        return self.run.target(name)

    def collect(self) -> None:
        """Gather the logs of every target; the targets stay."""
        for name in self.run.read().targets:
            done = self("logs", name)
            print(f"kept: lab run {self.id}, target {name}. {done.text[-500:]}", file=sys.stderr)


# In a process of its own: `control` reads the hosts file of its process once.
_SSH = """
import sys
from control.reach import open_session
done = open_session(sys.argv[1]).run(sys.argv[2], timeout=float(sys.argv[3]))
sys.stdout.buffer.write(done.stdout)
sys.stderr.buffer.write(done.stderr)
sys.exit(done.exit_code)
"""


@dataclass(frozen=True)
class Hosts:
    """A hosts file of a lab, varied: what an operator would write, for one story."""

    lab: Lab
    file: Path

    @staticmethod
    def of(lab: Lab, word: str, *, every: Mapping[str, Any] | None = None, **one: Mapping[str, Any]) -> Hosts:
        """The lab's own file, with changes for `every` host or for `one`; None removes a key."""
        table = tomllib.loads(lab.run.hosts_file.read_text())
        lines = []
        for name, host in table["hosts"].items():
            merged = {**table.get("defaults", {}), **host, **(every or {}), **one.get(name, {})}
            lines.append(f"[hosts.{name}]")
            lines += [f"{key} = {toml_of(value)}" for key, value in merged.items() if value is not None]
        # Beside lab.json: pins and remembered addresses are then the lab's, as for its own file.
        file = lab.run.directory / f"{word}.toml"
        file.write_text("\n".join(lines) + "\n")
        return Hosts(lab, file)

    def env(self, **extra: str) -> dict[str, str]:
        """The environment that points every command at this file."""
        base = {"QUIETPORT_HOSTS": str(self.file), "PYINFRA_PROGRESS": "off", SECRET_VARIABLE: canary()}
        return {**base, **extra}

    def pyinfra(self, *args: str, timeout: float = CONVERGE_TIMEOUT_S, **env: str) -> Done:
        """`pyinfra inventory ARGS`."""
        return run([str(BIN / "pyinfra"), "inventory", *args], env=self.env(**env), timeout=timeout)

    def quietport(self, *args: str, **env: str) -> Done:
        """`quietport ARGS`."""
        return run([str(BIN / "quietport"), *args], env=self.env(**env))

    def dry(self, *args: str) -> Plan:
        """What a converge would change."""
        done = self.pyinfra(DEPLOY, "--dry", "--json", *args)
        return Plan(changes_of(done.json()["plan"], "hosts_with_change"), done)

    def apply(self, *args: str) -> Applied:
        """Converge, whatever the result."""
        done = self.pyinfra(DEPLOY, "-y", "--json", *args)
        results = json.loads(done.out)["results"] if done.out.strip() else None
        operations = results["operations"] if results else []
        return Applied(
            changed=changes_of(operations, "success"),
            failed=changes_of(operations, "error"),
            unchanged=changes_of(operations, "no_change"),
            operations=len(operations),
            done=done,
        )

    def spec(self, *args: str) -> Done:
        """`pytest tests/spec`, read by this file's hosts."""
        return run(
            [str(BIN / "pytest"), "-q", "-p", "no:cacheprovider", *(args or ["tests/spec"])],
            env=self.env(),
            timeout=CONVERGE_TIMEOUT_S,
        )

    def ssh(self, name: str, command: str, *, timeout: float = COMMAND_TIMEOUT_S) -> Done:
        """Run a shell command as root on a target, by the way that is open now."""
        argv = [sys.executable, "-c", _SSH, name, command, str(timeout)]
        return run(argv, env=self.env(), timeout=timeout + 60)


@dataclass(frozen=True)
class Plan:
    """(host, operation) pairs that a dry run announced."""

    changes: frozenset[tuple[str, str]]
    done: Done


@dataclass(frozen=True)
class Applied:
    """(host, operation) pairs that a converge changed, that failed, and that it found as wanted."""

    changed: frozenset[tuple[str, str]]
    failed: frozenset[tuple[str, str]]
    unchanged: frozenset[tuple[str, str]]
    operations: int
    done: Done

    def ok(self) -> Applied:
        """Itself, when everything went well on every host."""
        self.done.ok()
        assert not self.failed
        assert self.operations > 10, "a converge of almost nothing"
        return self


def changes_of(operations: Sequence[Mapping[str, Any]], key: str) -> frozenset[tuple[str, str]]:
    """(host, operation) pairs of pyinfra's JSON.

    Hosts of one run may have one operation by two names, with and without what is known later; pyinfra shows
    one of them, by chance.
    """
    later = re.compile(r" \[content known after [^\]]*\]$")
    return frozenset(
        (host, later.sub("", operation["name"])) for operation in operations for host in operation[key]
    )


def canary() -> str:
    """A secret that must be seen nowhere but in its file, the same for the whole test run."""
    return os.environ.setdefault(SECRET_VARIABLE, f"canary-{secrets.token_hex(16)}")


# Where a story says how far it is; the last one counts.
PROGRESS: list[Callable[[str], None]] = [lambda line: print(line, file=sys.stderr, flush=True)]
# Every story that was begun, for the summary.
TOLD: list[Chapters] = []


@dataclass
class Chapters:
    """Named steps of a story that runs in a thread of its own; a test waits for the one it is about.

    A step that fails ends the story: later ones fail with the same reason, without being tried.
    """

    steps: Sequence[tuple[str, Callable[[], Any]]]
    name: str = ""
    """What the summary of the test run calls it."""
    results: dict[str, Future[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each step took."""

    def start(self) -> Chapters:
        """Begin telling."""
        TOLD.append(self)
        self.results = {name: Future() for name, _ in self.steps}
        threading.Thread(target=self._tell, daemon=True).start()
        return self

    def _tell(self) -> None:
        failed: str | None = None
        for name, act in self.steps:
            if failed is not None:
                self.results[name].set_exception(LookupError(f"not reached: {failed}"))
                continue
            began = time.monotonic()
            try:
                self.results[name].set_result(act())
            except BaseException as error:
                failed = f"{name!r} failed: {str(error)[-1500:]}"
                self.results[name].set_exception(error)
            self.seconds[name] = time.monotonic() - began
            PROGRESS[-1](f"· {self.name} {name}: {self.seconds[name]:.0f} s")

    @property
    def ended(self) -> bool:
        """Whether the story was told, or broke off."""
        return all(result.done() for result in self.results.values())

    def wait(self) -> None:
        """Wait until the story is told, or broke off."""
        for result in self.results.values():
            result.exception()

    def __getitem__(self, name: str) -> Any:
        """The result of a step, waited for. A step that failed, or was not reached, fails the test."""
        try:
            return self.results[name].result(timeout=2 * CONVERGE_TIMEOUT_S)
        except Exception as error:
            # Many tests wait for one step; each would print the traceback of all before it.
            reason = f"step {name!r}: {type(error).__name__}: {error}"
        pytest.fail(reason, pytrace=False)


# Runs in the public side's namespace: tries every place (all at the same time) once, or until it is told to
# stop, and prints each that opens, and how often it has tried.
_PROBER = """
import json, os, socket, sys, threading, time
pause = float(sys.argv[2])

def say(value):
    # One write a line: print would mix the lines of threads.
    os.write(1, (json.dumps(value) + "\\n").encode())

def watch(address, port):
    while True:
        try:
            socket.create_connection((address, port), timeout=0.7).close()
            say([address, port])
        except OSError:
            pass
        say(1)
        if not pause:
            return
        time.sleep(pause)

threads = [threading.Thread(target=watch, args=place) for place in json.loads(sys.argv[1])]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def prober(target: Target, places: Sequence[Place], *, every: float = 0) -> list[str]:
    """The command that probes from the target's public side, `every` so many seconds; once without."""
    return public.argv(target, [sys.executable, "-c", _PROBER, json.dumps(places), str(every)])


def reachable(target: Target, places: Sequence[Place]) -> set[Place]:
    """Which of these can be connected to from the target's public side, each tried once."""
    lines = [json.loads(line) for line in run(prober(target, places)).ok().out.splitlines()]
    return {(line[0], line[1]) for line in lines if isinstance(line, list)}


@dataclass
class Watch:
    """What a prober saw while it ran."""

    opened: list[Place] = field(default_factory=list)
    tries: int = 0


@contextmanager
def watched(target: Target, places: Sequence[Place], *, every: float = 0.1) -> Iterator[Watch]:
    """Probe these places from the public side, `every` so many seconds, for as long as the block lasts."""
    seen = Watch()
    # Into a file: a pipe that nobody reads meanwhile is full one day, and the prober would stand still.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(prober(target, places, every=every), stdout=said)
        try:
            yield seen
        finally:
            process.terminate()
            process.wait(timeout=30)
        said.seek(0)
        # The last line may be cut by the signal.
        for line in said.read().split("\n")[:-1]:
            value = json.loads(line)
            if isinstance(value, int):
                seen.tries += value
            else:
                seen.opened.append((value[0], value[1]))
