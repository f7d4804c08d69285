"""Running the host's own programs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from quietport.errors import HostProgramError

# Ours, not the caller's: a timer, sudo and a unit each have another, and messages are parsed in C.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

# What is said of a program that is not there.
NOT_INSTALLED = "is not installed"


@dataclass(frozen=True)
class Done:
    """Exit code and text of a program that ran to its end."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line of what it said went wrong."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def is_installed(name: str) -> bool:
    """Whether `run` would find the program `name`."""
    return shutil.which(name, path=ENVIRONMENT["PATH"]) is not None


def run(argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
    """Run `argv` (no shell) for at most `timeout` seconds.

    Bytes that are not UTF-8 become replacement characters. Raises HostProgramError when the program is
    missing or takes too long; a failure of its own is the caller's to judge.
    """
    done = ended(argv, stdin=stdin, timeout=timeout, out=subprocess.PIPE, err=subprocess.PIPE)
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def ended(
    argv: Sequence[str], *, stdin: str, timeout: float, out: int | IO[bytes], err: int | IO[bytes]
) -> subprocess.CompletedProcess[bytes]:
    """As `run`, with what it says going to `out` and `err`: a pipe also waits for what it leaves running."""
    try:
        return subprocess.run(
            argv,
            input=stdin.encode(),
            stdout=out,
            stderr=err,
            timeout=timeout,
            check=False,
            env=ENVIRONMENT,
        )
    except FileNotFoundError as error:
        raise HostProgramError(f"{argv[0]} {NOT_INSTALLED}.") from error
    except OSError as error:
        raise HostProgramError(f"{argv[0]} cannot be run: {error.strerror}.") from error
    except subprocess.TimeoutExpired as error:
        raise HostProgramError(f"{' '.join(argv[:3])} took longer than {timeout:g} s.") from error


def output_of(argv: Sequence[str], *, timeout: float = 30) -> str:
    """What `argv` prints. Raises HostProgramError also when it fails."""
    done = run(argv, timeout=timeout)
    if done.code != 0:
        raise HostProgramError(f"{' '.join(argv)} failed: {done.complaint}.")
    return done.out
