"""What every operation shares: refusing on one host, quoting, and showing a difference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.arguments_typed import PyinfraOperation
from pyinfra.api.command import FunctionCommand, PyinfraCommand, QuoteString, StringCommand
from pyinfra.api.host import Host
from pyinfra.api.operation import operation as pyinfra_operation
from pyinfra.api.state import State
from pyinfra.context import host

from control.errors import QuietportError
from control.secret import Secret

P = ParamSpec("P")
T = TypeVar("T")

# What an operation yields.
Commands = Generator[PyinfraCommand, None, None]


def operation() -> Callable[[Callable[P, Commands]], PyinfraOperation[P]]:
    """pyinfra's decorator, for operations that fail one host at most.

    pyinfra ends the run of every host when a generator raises, and goes on with a fact's default when it
    could not be read. Here an error of ours or of the link refuses this host, and what is not known of a
    host is not acted upon.
    """

    def decorate(generate: Callable[P, Commands]) -> PyinfraOperation[P]:
        @wraps(generate)
        def one_host_at_most(*args: P.args, **kwargs: P.kwargs) -> Commands:
            try:
                for command in generate(*args, **kwargs):
                    if executing() and host in _failed_hosts():
                        yield refuse("it did not tell its state (see above), so nothing more is done to it.")
                        return
                    yield command
            except (QuietportError, SSHException, OSError) as error:
                yield refuse(str(error))

        return pyinfra_operation()(one_host_at_most)

    return decorate


def _failed_hosts() -> Iterable[Host]:
    # Stand-ins for the state in tests of single operations have none.
    return getattr(host.state, "failed_hosts", ())


def refuse(sentence: str) -> FunctionCommand:
    """A command that fails on this host alone with `NAME: refused: sentence`; later steps are not run there.

    Use as `yield refuse("..."); return`. A dry run shows the sentence too, as a warning. An exception
    in an operation would stop every host of the run instead.
    """
    # Errors that are made elsewhere name the host themselves.
    sentence = sentence.removeprefix(f"{host.name}: ")
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
    if not _said_already():
        logger.warning(f"{host.print_prefix}{host.name}: {sentence}")


def show_diff(path: str, old: str | None, new: str | None) -> None:
    """Print how the text of `path` will change, when the run was started with --diff. None: no such file.

    Once a run. Never call it with a secret.
    """
    if _said_already() or not host.state.config.DIFF:
        return
    lines = difflib.unified_diff(
        (old or "").splitlines(),
        (new or "").splitlines(),
        fromfile="/dev/null" if old is None else path,
        tofile="/dev/null" if new is None else path,
        lineterm="",
    )
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        # Text from a host reaches a terminal without control characters.
        clean = "".join(char if char.isprintable() or char == "\t" else "�" for char in line)
        logger.info(f"{host.print_prefix}  {click.style(clean, fg=colours.get(clean[:1]))}")


def program(*argv: str, stdin: bytes | Secret | None = None, timeout: int | None = None) -> StringCommand:
    """The command that runs a program with exactly these arguments.

    `stdin` is written as it is, nothing added. `timeout` is in seconds.
    """
    return StringCommand(*(QuoteString(word) for word in argv), **_arguments(stdin, timeout))


def script(
    text: str, *args: str, stdin: bytes | Secret | None = None, timeout: int | None = None
) -> StringCommand:
    """The command that runs a shell script with `args` as its $1, $2... No value is pasted into `text`."""
    return program("sh", "-c", text, "sh", *args, stdin=stdin, timeout=timeout)


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
