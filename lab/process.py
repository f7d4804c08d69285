"""Running programs: argv lists, one sentence when they fail, and daemons that are never confused.

Standard library only: `lab.bootstrap` uses it before the project's environment exists.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")
Argv = Sequence[str | os.PathLike[str]]

# What was started here and not yet waited for; `alive` reaps them, so that a dead child is not a zombie.
_children: list[subprocess.Popen[bytes]] = []


class LabError(Exception):
    """What went wrong in the lab and where (`what`), and the next step (`hint`)."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what} {hint}".strip())


def die(message: str, hint: str = "") -> NoReturn:
    """Raise LabError with the message and the next step."""
    raise LabError(message, hint=hint)


def run(
    argv: Argv,
    *,
    check: bool = True,
    input: str | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program and wait for it.

    `env` is added to this process's environment; `timeout` is in seconds. With `log` both outputs are
    appended to that file as they come, and the result's are empty.
    Raises LabError when the program is missing, takes too long, or (with `check`) fails.
    """
    words = [os.fspath(word) for word in argv]
    sink = log.open("a", encoding="utf-8", errors="replace") if log else None
    try:
        done = subprocess.run(
            words,
            stdout=sink or subprocess.PIPE,
            stderr=subprocess.STDOUT if sink else subprocess.PIPE,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
            timeout=timeout,
            env=_environment(env),
            cwd=cwd,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(
            f"{words[0]}: not installed.", hint="`python -m lab doctor` says how to get it."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shlex.join(words)}: still not done after {timeout:g} s.", hint=_see(log)) from error
    finally:
        if sink:
            sink.close()
    done = subprocess.CompletedProcess(words, done.returncode, done.stdout or "", done.stderr or "")
    if check and done.returncode != 0:
        said = _tail(log.read_text(errors="replace") if log else done.stderr or done.stdout)
        raise LabError(f"{shlex.join(words)}: exit code {done.returncode}: {said}", hint=_see(log))
    return done


def output(argv: Argv, *, timeout: float | None = None) -> str:
    """What a program prints, without the white space around it. Raises LabError when it fails."""
    return run(argv, timeout=timeout).stdout.strip()


def succeeds(argv: Argv, *, timeout: float = 30) -> bool:
    """Whether a program is there and ends with exit code 0 within `timeout` seconds."""
    try:
        return run(argv, check=False, timeout=timeout).returncode == 0
    except LabError:
        return False


def _environment(extra: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if extra is None else {**os.environ, **extra}


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:]) or "no output"


def _see(log: Path | None) -> str:
    return f"All of its output: {log}" if log else ""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say on stderr what is being done, and how long it took."""
    say(f"· {what} ...")
    start = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"  {what}: failed after {time.monotonic() - start:.1f} s")
        raise
    say(f"  {what}: {time.monotonic() - start:.1f} s")


def say(text: str) -> None:
    """A line for the reader, on stderr: stdout belongs to what was asked for."""
    print(text, file=sys.stderr, flush=True)


def wait_until(
    probe: Callable[[], Value], *, timeout: float, what: str, interval: float = 0.2, hint: str = ""
) -> Value:
    """Ask `probe` until its answer is truthy, and return that answer.

    `what` is the state waited for ("sshd answers at 10.0.0.2"). `probe` only queries; changes are never
    retried. Raises LabError with a sentence that says what did not happen within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while True:
        if answer := probe():
            return answer
        if time.monotonic() >= end:
            raise LabError(f"Waited {timeout:g} s, and this did not happen: {what}.", hint=hint)
        time.sleep(interval)


@dataclass(frozen=True)
class Process:
    """A process that is never confused with another: process ids are reused, and boots begin anew."""

    pid: int
    started: int
    """Clock ticks after boot, field 22 of /proc/PID/stat (proc(5))."""
    boot_id: str

    def to_json(self) -> dict[str, Any]:
        """For a state file."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Process:
        """What `to_json` wrote."""
        return Process(pid=int(value["pid"]), started=int(value["started"]), boot_id=str(value["boot_id"]))


def boot_id() -> str:
    """The running boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> Process:
    """The process that has `pid` now. Raises LabError when none has."""
    stat = _stat(pid)
    if stat is None:
        raise LabError(f"Process {pid} is gone.")
    return Process(pid=pid, started=stat[1], boot_id=boot_id())


def spawn(argv: Argv, *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Start a daemon in a session of its own, with both outputs appended to `log`.

    Raises LabError when the program is missing.
    """
    words = [os.fspath(word) for word in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=_environment(env),
                cwd=cwd,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise LabError(
                f"{words[0]}: not installed.", hint="`python -m lab doctor` says how to get it."
            ) from error
    _children.append(child)
    return identify(child.pid)


def alive(process: Process) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    for child in _children:
        child.poll()
    stat = _stat(process.pid)
    return (
        stat is not None
        and stat[0] not in "ZX"
        and stat[1] == process.started
        and process.boot_id == boot_id()
    )


def stop(process: Process, *, timeout: float = 10) -> None:
    """End that process, politely for `timeout` seconds and then by force. Gone already is fine.

    Raises LabError when it is there even after that.
    """
    for sign, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
        if not alive(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, sign)
        with contextlib.suppress(LabError):
            wait_until(lambda: not alive(process), timeout=patience, what="the process ends", interval=0.05)
    if alive(process):
        raise LabError(f"Process {process.pid} does not end.")


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself hold spaces and parentheses: fields count from the last one.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
