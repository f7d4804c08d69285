"""A converge that runs in the background, followed from outside by the headings pyinfra prints.

What happens to it (a kill, a cut link, a reboot) is provoked when the K-th operation begins, so that a
seed names the moment and a failure can be had again.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tests.lab.story import BIN, CONVERGE_TIMEOUT_S, DEPLOY, ROOT, Done, Hosts

HEADING = re.compile(r"^--> Starting operation: (.*?)\s*$")
DEFAULT_SEED = 20


def seeded(word: str) -> random.Random:
    """The dice of a test called `word`: the same in every run unless QUIETPORT_SEED says otherwise.

    The seed is printed, so that what a failing run did can be done again.
    """
    seed = os.environ.get("QUIETPORT_SEED", str(DEFAULT_SEED))
    print(f"{word}: QUIETPORT_SEED={seed}", flush=True)
    return random.Random(f"{seed} {word}")  # noqa: S311


class Converge:
    """A running `pyinfra inventory deploys/vps.py -y`. Left as a context, it is killed if it still runs."""

    def __init__(self, process: subprocess.Popen[str], argv: tuple[str, ...]) -> None:
        self.began = time.monotonic()
        self._process = process
        self._argv = argv
        self._lines: list[str] = []
        self._names: list[str] = []
        self._times: list[float] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def start(hosts: Hosts, *args: str, through: Sequence[str] = (), **env: str) -> Converge:
        """Start one with these further arguments, with `env` on top of the hosts file's environment.

        `through` is a program and its options that end up as pyinfra themselves, in the same process.
        """
        argv = (*through, str(BIN / "pyinfra"), "inventory", DEPLOY, "-y", *args)
        return Converge.by(hosts, argv, **env)

    @staticmethod
    def by(hosts: Hosts, argv: tuple[str, ...], **env: str) -> Converge:
        """Start whatever command converges, in a process group of its own."""
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **hosts.env(**env)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # One stream: what came first stays first.
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        return Converge(process, argv)

    def __enter__(self) -> Converge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def names(self) -> list[str]:
        """Names of the operations that have begun, in order."""
        with self._news:
            return list(self._names)

    @property
    def begun(self) -> list[float]:
        """When they did, as `time.monotonic` says."""
        with self._news:
            return list(self._times)

    @property
    def text(self) -> str:
        """What it has said until now."""
        with self._news:
            return "".join(self._lines)

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process.poll() is None

    def wait_for_heading(self, number: int, *, timeout: float = CONVERGE_TIMEOUT_S) -> str | None:
        """Wait until the operation with this number (from 1) begins; its name, or None when the run ended.

        Raises TimeoutError after `timeout` seconds.
        """
        self._wait(lambda: len(self._names) >= number, f"operation {number}", timeout)
        return self.names[number - 1] if len(self.names) >= number else None

    def wait_for_name(self, name: str, *, timeout: float = CONVERGE_TIMEOUT_S) -> bool:
        """Wait until an operation with `name` in its heading begins; False when the run ended before.

        Raises TimeoutError after `timeout` seconds.
        """
        self._wait(lambda: self._has_begun(name), f"operation {name!r}", timeout)
        with self._news:
            return self._has_begun(name)

    def wait_for_text(self, *parts: str, timeout: float) -> bool:
        """Wait until it has said one of `parts`; False when it ended without.

        Raises TimeoutError after `timeout` seconds.
        """

        def said() -> bool:
            text = "".join(self._lines)
            return any(part in text for part in parts)

        self._wait(said, f"what says {' or '.join(map(repr, parts))}", timeout)
        with self._news:
            return said()

    def kill(self) -> None:
        """SIGKILL to pyinfra itself, as `kill -9` or the kernel out of memory would; harmless when it ended.

        What carries its connections ends by itself, as its input does.
        """
        if self.running:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP, as a laptop that sleeps; harmless when it ended."""
        if self.running:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        if self.running:
            self._process.send_signal(signal.SIGCONT)

    def finish(self, timeout: float) -> Done:
        """Wait for its end and tell how it went. Taking longer than `timeout` seconds fails the test."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            said = self.text[-3000:]
            self.kill()
            raise AssertionError(f"the converge took longer than {timeout:.0f} s; it said:\n{said}") from None
        # A child that outlives it may hold the stream open; what it says is not awaited.
        self._reader.join(10)
        return Done(self._argv, code, self.text, "")

    def _has_begun(self, name: str) -> bool:
        return any(name in begun for begun in self._names)

    def _wait(self, happened: Callable[[], bool], what: str, timeout: float) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self._ended or happened(), timeout):
                said = "".join(self._lines)[-3000:]
                raise TimeoutError(f"{what} did not begin within {timeout:.0f} s; the converge said:\n{said}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heading = HEADING.match(line)
            with self._news:
                self._lines.append(line)
                if heading:
                    self._names.append(heading[1])
                    self._times.append(time.monotonic())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
