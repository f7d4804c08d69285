"""usage: codex-openclaw-ssh-agent [--ttl 30m] [--key-env NAME | --key-fd N] [--allow-host HOST ...]
                                [--known-hosts FILE] [--runtime-root DIR] [-- COMMAND...]
       codex-openclaw-ssh-agent --list [--json] [--runtime-root DIR]
       codex-openclaw-ssh-agent --prune [--dry-run] [--runtime-root DIR]
       codex-openclaw-ssh-agent --stop ID [--runtime-root DIR]
       codex-openclaw-ssh-agent --version

Runs COMMAND, or your shell, with an ssh-agent of its own that holds one key and ends with it, or at its TTL.

  --ttl TIME          such as 90s, 30m or 2h; 30m unless given, at most 24h
  --key-env NAME      the variable that holds the private key, OPENCLAW_SSH_PRIVATE_KEY unless given; it is
                      gone from the environment of the session
  --key-fd N          an open descriptor to read the private key from instead
  --allow-host HOST   the key is of use for this host alone; HOST, USER@HOST or [HOST]:PORT as in the file
  --known-hosts FILE  host keys for --allow-host, root's alone; /etc/quietport/agent_known_hosts unless given
  --runtime-root DIR  keep everything in DIR, not in ~/.local/state and /run/user
  --list              all sessions; --json for programs
  --prune             take away what is left of sessions that are over; --dry-run says which
  --stop ID           end the keys and the agent of a session; its command goes on

Exit code: the command's, 128+N for signal N; 125 a failure of this program, 126 the command cannot be
executed, 127 it cannot be found, 2 wrong usage.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quietport.errors import FINE, USAGE, printable
from quietport.sshagent.hosts import KNOWN_HOSTS, MAX_HOSTS, is_host
from quietport.sshagent.names import (
    DEFAULT_TTL_S,
    FAILED,
    KEY_VARIABLE,
    MAX_TTL_S,
    PROGRAM,
    AgentAccessError,
    complain,
    duration,
    seconds_of,
)
from quietport.sshagent.wanted import Wanted, find_tools, refuse_nesting

_VALUES = (
    "--ttl", "--key-env", "--key-fd", "--allow-host", "--known-hosts", "--runtime-root", "--stop",
    "--handed-over",
)  # fmt: skip
_FLAGS = ("--list", "--json", "--prune", "--dry-run", "--version", "--help")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


class UsageError(AgentAccessError):
    """The arguments are wrong. Exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, code=USAGE)


@dataclass
class Arguments:
    """The arguments, not yet judged: options with their values, flags, and the command if there is a `--`."""

    values: dict[str, list[str]] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    command: tuple[str, ...] = ()
    has_command: bool = False

    def one(self, name: str) -> str | None:
        """The value of an option that is given once at most. Raises UsageError."""
        given = self.values.get(name, [])
        if len(given) > 1:
            raise UsageError(f"{name} is given more than once.")
        return given[0] if given else None


def main(argv: list[str]) -> int:
    """Do what `argv` asks for; returns the exit code."""
    try:
        return _main(argv)
    except AgentAccessError as error:
        complain(str(error))
        return error.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"The system refuses: {error.strerror}.")
        return FAILED
    except Exception as error:  # its text and its traceback could hold anything
        complain(f"This is a bug of {PROGRAM}: {type(error).__name__}.")
        return FAILED


def parse(argv: Sequence[str]) -> Arguments:
    """Raises UsageError."""
    found = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            found.command, found.has_command = tuple(rest), True
            break
        if name in _VALUES:
            if not equals and not rest:
                raise UsageError(f"{name} needs a value.")
            found.values.setdefault(name, []).append(value if equals else rest.pop(0))
        elif word in _FLAGS or word == "-h":
            found.flags.add("--help" if word == "-h" else word)
        elif word.startswith("-"):
            raise UsageError(f"{name!r} is not an option: --help shows them.")
        else:
            raise UsageError("A command goes after --: its arguments could be taken for options.")
    return found


def _main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if "--help" in arguments.flags:
        print(__doc__, end="")
        return FINE
    if "--version" in arguments.flags:
        from quietport.sshagent.version import version

        print(f"{PROGRAM} {version()}")
        return FINE
    modes: list[str] = [name for name in ("--list", "--prune") if name in arguments.flags]
    modes += ["--stop"] if "--stop" in arguments.values else []
    if len(modes) > 1:
        raise UsageError(f"{modes[0]} and {modes[1]} exclude each other.")
    mode = modes[0] if modes else ""
    _refuse_strangers(arguments, mode)
    if mode:
        return _with_root(arguments, mode)
    return _session(arguments, argv)


def _refuse_strangers(arguments: Arguments, mode: str) -> None:
    allowed = {
        "": {"--ttl", "--key-env", "--key-fd", "--allow-host", "--known-hosts", "--handed-over"},
        "--list": {"--list", "--json"},
        "--prune": {"--prune", "--dry-run"},
        "--stop": {"--stop"},
    }[mode] | {"--runtime-root"}
    for name in [*arguments.values, *sorted(arguments.flags)]:
        if name not in allowed:
            raise UsageError(f"{name} does not go with {mode or 'a session'}.")
    if mode and arguments.has_command:
        raise UsageError(f"{mode} takes no command.")


def _with_root(arguments: Arguments, mode: str) -> int:
    from quietport.sshagent.root import MissingError, open_root

    try:
        root = open_root(arguments.one("--runtime-root"), create=False, sockets=mode == "--prune")
    except MissingError as error:
        if mode == "--stop":
            raise AgentAccessError(f"There are no sessions: {error}") from error
        if "--json" in arguments.flags:
            from quietport.sshagent.listing import list_json

            print(list_json([]))
        return FINE
    previous = os.umask(0o077)
    try:
        if mode == "--list":
            from quietport.sshagent.listing import show

            show(root, as_json="--json" in arguments.flags)
            return FINE
        if mode == "--prune":
            from quietport.sshagent.prune import prune

            lines: list[str] = []
            try:
                for verdict in prune(root, dry="--dry-run" in arguments.flags):
                    lines.append(f"{verdict.word} {printable(verdict.id)}")
            finally:
                # Not while the lock is held: whoever reads this may be slow.
                print("".join(f"{line}\n" for line in lines), end="")
            return FINE
        from quietport.sshagent.stop import stop

        name = arguments.one("--stop") or ""
        print(f"{stop(root, name)} {name}")
        return FINE
    finally:
        os.umask(previous)
        root.close()


def _session(arguments: Arguments, argv: Sequence[str]) -> int:
    handed_over = arguments.one("--handed-over")
    wanted = _wanted(arguments)
    if handed_over is not None:
        # All that a session needs until its end: an upgrade may replace the zipapp meanwhile.
        from quietport.sshagent import wrapper

        return wrapper.run(wanted, _descriptor("--handed-over", handed_over))
    variable, descriptor = arguments.one("--key-env"), arguments.one("--key-fd")
    if variable is not None and descriptor is not None:
        raise UsageError("--key-env and --key-fd exclude each other.")
    if variable is not None and _VARIABLE.fullmatch(variable) is None:
        raise UsageError("--key-env takes the name of a variable.")
    number = None if descriptor is None else _descriptor("--key-fd", descriptor)
    from quietport.sshagent import key
    from quietport.sshagent.process import keep_secret
    from quietport.sshagent.spawn import standard_descriptors

    # From here on there is a key in our memory.
    keep_secret()
    standard_descriptors()
    refuse_nesting()
    find_tools(wanted.command)
    if wanted.hosts:
        from quietport.sshagent.hostkeys import check

        wanted = replace(wanted, known_hosts=check(wanted.hosts, wanted.known_hosts))
    variable = variable or KEY_VARIABLE
    material = key.from_variable(variable) if number is None else key.from_descriptor(number)
    key.hand_over(material, _again(wanted), began_with=argv, variable=variable)
    return FAILED


def _wanted(arguments: Arguments) -> Wanted:
    allowed = tuple(arguments.values.get("--allow-host", ()))
    for host in allowed:
        if not is_host(host):
            raise UsageError(f"--allow-host {host!r} is not HOST, USER@HOST or [HOST]:PORT.")
    if len(allowed) > MAX_HOSTS:
        raise UsageError(f"--allow-host is given more than {MAX_HOSTS} times.")
    known = arguments.one("--known-hosts")
    if known is not None and not Path(known).is_absolute():
        raise UsageError("--known-hosts takes an absolute path.")
    return Wanted(
        ttl_s=_ttl(arguments.one("--ttl")),
        hosts=allowed,
        known_hosts=KNOWN_HOSTS if known is None else Path(known),
        runtime_root=arguments.one("--runtime-root"),
        command=arguments.command,
    )


def _again(wanted: Wanted) -> list[str]:
    """The arguments that ask for the same, without the key."""
    arguments = ["--ttl", str(wanted.ttl_s), "--known-hosts", os.fspath(wanted.known_hosts)]
    for host in wanted.hosts:
        arguments += ["--allow-host", host]
    if wanted.runtime_root is not None:
        arguments += ["--runtime-root", wanted.runtime_root]
    return [*arguments, "--", *wanted.command] if wanted.command else arguments


def _ttl(text: str | None) -> int:
    if text is None:
        return DEFAULT_TTL_S
    try:
        seconds = seconds_of(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= MAX_TTL_S:
        raise UsageError(
            f"--ttl {text!r} is not a time from 1s to {duration(MAX_TTL_S)}, such as 90s, 30m or 2h."
        )
    return seconds


def _descriptor(name: str, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,6}", text) is None:
        raise UsageError(f"{name} takes the number of an open descriptor.")
    try:
        os.fstat(int(text))
    except OSError:
        raise UsageError(
            f"{name} {int(text)} is not open: open it for the command, as in {int(text)}<file."
        ) from None
    return int(text)
