"""Which program a name runs. Modules are imported when asked for: the timers run on small machines."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import cast

from quietport import __version__
from quietport.errors import INTERRUPTED, UNKNOWN, USAGE, HostProgramError, printable

PROGRAMS = {
    "ports": ("quietport.ports_cli", "what listens, who can reach it, and whether that may be"),
    "doctor": ("quietport.doctor.cli", "is this host as declared, and what to do where it is not"),
    "report": ("quietport.report", "write the daily report of listening sockets"),
    "open": ("quietport.open", "sshd in public, to keys alone, now: for a provider's console"),
    "close": ("quietport.close", "the end of open, when the tailnet works"),
    "sshd-wait": ("quietport.sshd_wait", "wait until the addresses sshd shall listen on are there"),
    "sshd-apply": ("quietport.sshd_apply", "apply a plan for sshd, or put everything back"),
    "sshd-restore": ("quietport.sshd_restore", "put sshd back as the distribution ships it, in public"),
    "sshd-follow": ("quietport.sshd_follow", "keep sshd on the addresses of the tailnet"),
    "guard": ("quietport.guard.cli", "undo a change that can lock you out, unless it is confirmed"),
    "docker-user": ("quietport.docker_user", "keep the public side away from containers"),
    "ssh-agent": ("quietport.sshagent.cli", "run a command with an ssh-agent that expires"),
    "ttl-evidence": ("quietport.sshagent.evidence", "how long those sessions last, from their audit"),
}


def usage() -> str:
    """The text of --help."""
    lines = "\n".join(f"  {name:12} {summary}" for name, (_, summary) in PROGRAMS.items())
    return f"usage: quietport [--version] NAME [...]\n\n{lines}\n\nquietport NAME --help tells more.\n"


def main(argv: list[str]) -> int:
    """Run the program named first in `argv`; returns 0 fine, 1 a problem, 2 usage, 3 could not tell."""
    # A name may have a character that the stream lacks (LC_ALL=C); that is no reason to crash.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if argv[:1] == ["--version"]:
        print(f"quietport {__version__}")
        return 0
    if argv[:1] in (["--help"], ["-h"]):
        print(usage(), end="")
        return 0
    if not argv or argv[0] not in PROGRAMS:
        complaint = f"quietport: no program called {printable(argv[0])!r}.\n" if argv else ""
        print(complaint + usage(), end="", file=sys.stderr)
        return USAGE
    return _run(argv[0], argv[1:])


def reader_left() -> None:
    """After a BrokenPipeError (`| head`): the rest goes nowhere, and Python does not complain at exit.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, argv: list[str]) -> int:
    try:
        program = cast(Callable[[list[str]], int], importlib.import_module(PROGRAMS[name][0]).main)
        code = program(argv)
        sys.stdout.flush()
    except HostProgramError as error:
        print(f"quietport {name}: {printable(str(error))}", file=sys.stderr)
        return error.code
    except BrokenPipeError:
        reader_left()
        return UNKNOWN
    except KeyboardInterrupt:
        print(f"quietport {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # a crash means that nothing was found out, never that something was found
        import traceback  # every program would pay for it

        traceback.print_exc()
        return UNKNOWN
    return code
