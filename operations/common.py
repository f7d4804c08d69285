"""What every operation shares: refusing and failing on one host alone, quoting, showing a difference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from greenlet import GreenletExit  # type: ignore[import-untyped]
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.arguments_typed import PyinfraOperation
from pyinfra.api.command import FunctionCommand, PyinfraCommand, QuoteString, StringCommand
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.operation import operation as pyinfra_operation
from pyinfra.api.state import State
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra.context import host
from typing_extensions import override

from control.connector import Unanswered
from control.errors import QuietportError
from control.secret import Secret
from operations import notes

P = ParamSpec("P")
T = TypeVar("T")

# What an operation yields.
Commands = Generator[PyinfraCommand, None, None]
# From what a failed command said to one sentence: why, and the next step. None when it speaks for itself.
Why = Callable[[str], str | None]


def operation() -> Callable[[Callable[P, Commands]], PyinfraOperation[P]]:
    """pyinfra's decorator, for operations that fail one host at most.

    pyinfra ends the run of every host when a generator raises, and goes on with a fact's default when it
    could not be read. Here an error of ours or of the link refuses this host, and what is not known of a
    host is not acted upon.
    """

    def decorate(generate: Callable[P, Commands]) -> PyinfraOperation[P]:
        @wraps(generate)
        def careful(*args: P.args, **kwargs: P.kwargs) -> Commands:
            notes.begin()
            try:
                for command in _asked(generate(*args, **kwargs)):
                    if has_failed(host.state, host):
                        break
                    yield command
            except Exception as error:
                if has_failed(host.state, host):
                    # What the generator made of a fact's default; or pyinfra's "No hosts remaining!", said
                    # again when this operation has failed.
                    if isinstance(error, PyinfraError) and not executing():
                        raise
                elif isinstance(error, (QuietportError, SSHException, OSError)):
                    yield refuse(str(error))
                    return
                else:
                    raise
            if has_failed(host.state, host):
                if not executing():
                    # Ends what is planned for this host; everything else would fail as this did.
                    raise GreenletExit
                yield FunctionCommand(_failed_already, (), {})

        return pyinfra_operation()(careful)

    return decorate


def _asked(commands: Commands) -> Iterable[PyinfraCommand]:
    """The commands; all of them for a plan. pyinfra stops at the first, and later reasons would be lost."""
    return list(commands) if notes.collecting() else commands


def _failed_already(state: State, host: Host) -> bool:
    return False


def has_failed(state: Any, host: Any) -> bool:
    """Whether pyinfra has given up this host, because a fact could not be read."""
    return any(failed.name == host.name for failed in getattr(state, "failed_hosts", ()))


def one_host_at_most(
    function: Callable[Concatenate[State, Host, P], bool],
) -> Callable[Concatenate[State, Host, P], bool]:
    """For what a FunctionCommand calls: an error is a sentence about this host, never a traceback."""

    # pyinfra passes state and host to a function whose own arguments have these names.
    def careful(state: State, host: Host, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            went_well = function(state, host, *args, **kwargs)
        except (QuietportError, TimeoutError) as error:
            return fail(host, str(error))
        except Exception:
            # Whatever it made of a fact's default; the reason was said when the fact could not be read.
            if not has_failed(state, host):
                raise
            return False
        return went_well and not has_failed(state, host)

    return wraps(function)(careful)


def fail(host: Host, sentence: str) -> bool:
    """Say why this host failed, as `NAME: failed: sentence`. False, which pyinfra counts as failure."""
    said = f"{host.name}: failed: {sentence.removeprefix(f'{host.name}: ')}"
    logger.error(f"{host.print_prefix}{click.style(said, fg='red')}")
    return False


class Explained(StringCommand):
    """A command whose failure is told in one sentence, after what it said itself."""

    def __init__(self, *bits: Any, why: Why, **arguments: Any) -> None:
        super().__init__(*bits, **arguments)
        self.why = why

    @override
    def execute(self, state: State, host: Host, connector_arguments: Any) -> tuple[bool, CommandOutput]:
        ok, output = super().execute(state, host, connector_arguments)
        if ok or isinstance(output, Unanswered):
            return ok, output
        sentence = self.why(output.output)
        if sentence is None:
            return ok, output
        if state.print_output:
            # It showed the command's output as it came, and does not show it again.
            fail(host, sentence)
        line = OutputLine("stderr", f"{host.name}: failed: {sentence}")
        return ok, CommandOutput([*output, line])


def no_room(said: str) -> str | None:
    """The sentence for a command that failed because nothing can be written; None when it did not say so."""
    for words, reason in (
        ("No space left on device", "its disk is full"),
        # apt's words when it reckons before it begins.
        ("enough free space in", "its disk is full"),
        ("Disk quota exceeded", "its disk quota is used up"),
        ("Read-only file system", "a file system of it is read-only"),
    ):
        lines = [line.strip() for line in said.splitlines() if words.lower() in line.lower()]
        if lines:
            return (
                f"{reason} ({lines[-1][:200]}). Make room, or mend it (`df -h`, `df -i` and `findmnt` there "
                "show where), then run again."
            )
    return None


def refuse(sentence: str) -> FunctionCommand:
    """A command that fails on this host alone with `NAME: refused: sentence`; later steps are not run there.

    Use as `yield refuse("..."); return`. A dry run shows the sentence too, as a warning. An exception
    in an operation would stop every host of the run instead.
    """
    # Errors that are made elsewhere name the host themselves.
    sentence = sentence.removeprefix(f"{host.name}: ")
    notes.refusal(sentence)
    if not host.state.is_executing:
        logger.warning(f"{host.print_prefix}{host.name}: will be refused: {sentence}")
    return FunctionCommand(_refused, (sentence,), {})


def _refused(state: State, host: Host, sentence: str) -> bool:
    # pyinfra passes state and host to a function with these argument names, and counts False as failure.
    logger.error(f"{host.print_prefix}{click.style(f'{host.name}: refused: {sentence}', fg='red')}")
    return False


def _said_already() -> bool:
    """Whether the plan has said it. With -y pyinfra makes none, and it is said while the change is made."""
    return host.state.is_executing and bool(host.state.check_for_changes)


def warn(sentence: str) -> None:
    """Log one line about this host that is no change and no error, once a run."""
    notes.remark(sentence)
    if not _said_already():
        logger.warning(f"{host.print_prefix}{host.name}: {sentence}")


def show_diff(path: str, old: str | None, new: str | None) -> None:
    """Tell how the text of `path` will change: to a plan, and when the run was started with --diff.

    None: no such file. Printed once a run. Never call it with a secret.
    """
    shown = host.state.config.DIFF and not _said_already()
    if not (shown or notes.collecting()):
        return
    lines = difflib.unified_diff(
        (old or "").splitlines(),
        (new or "").splitlines(),
        fromfile="/dev/null" if old is None else path,
        tofile="/dev/null" if new is None else path,
        lineterm="",
    )
    # Text from a host reaches a terminal without control characters.
    clean = ["".join(char if char.isprintable() or char == "\t" else "�" for char in line) for line in lines]
    notes.difference(path, "\n".join(clean))
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in clean if shown else ():
        logger.info(f"{host.print_prefix}  {click.style(line, fg=colours.get(line[:1]))}")


def program(
    *argv: str, stdin: bytes | Secret | None = None, timeout: int | None = None, why: Why = no_room
) -> StringCommand:
    """The command that runs a program with exactly these arguments.

    `stdin` is written as it is, nothing added. `timeout` is in seconds. `why` explains a failure.
    """
    return Explained(*(QuoteString(word) for word in argv), why=why, **_arguments(stdin, timeout))


def script(
    text: str,
    *args: str,
    stdin: bytes | Secret | None = None,
    timeout: int | None = None,
    why: Why = no_room,
) -> StringCommand:
    """The command that runs a shell script with `args` as its $1, $2... No value is pasted into `text`."""
    return program("sh", "-c", text, "sh", *args, stdin=stdin, timeout=timeout, why=why)


def _arguments(stdin: bytes | Secret | None, timeout: int | None) -> Any:
    # Untyped: pyinfra declares _stdin as text, and our connector takes bytes and Secret besides.
    arguments: dict[str, Any] = {}
    if stdin is not None:
        arguments["_stdin"] = stdin
    if timeout is not None:
        arguments["_timeout"] = timeout
    return arguments


def unknown_yet(what: str) -> str:
    """What an operation's name ends with when its content is known only after an earlier change."""
    return f" [content known after {what}]"


def each(items: Iterable[T]) -> Iterator[T]:
    """The items, for a loop that calls operations. A plain loop ends in a cycle on hosts of unlike length."""
    loop: Callable[[Iterable[T]], Iterator[T]] = host.loop
    return loop(items)


def executing() -> bool:
    """True while the host is being changed, False while the plan is made."""
    return host.state.is_executing
