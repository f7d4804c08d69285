"""What goes wrong in one host's operation stays with that host."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest
from pyinfra.api.command import FunctionCommand, PyinfraCommand
from pyinfra.context import ctx_host

from control.errors import ReachError
from operations import common
from operations.common import Commands, operation, program


class FakeHost(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def fake() -> Iterator[Any]:
    state = SimpleNamespace(is_executing=True, failed_hosts=set())
    made = FakeHost(name="vps1", print_prefix="", state=state)
    with ctx_host.use(made):
        yield made


@operation()
def step(error: Exception | None = None) -> Commands:
    """Two commands, and an error in between."""
    yield program("first")
    if error is not None:
        raise error
    yield program("second")


def said(commands: list[PyinfraCommand]) -> list[str]:
    return [
        str(command.args[0]) if isinstance(command, FunctionCommand) else str(command) for command in commands
    ]


def run(error: Exception | None = None) -> Iterator[PyinfraCommand]:
    return iter(step._inner(error=error))


def test_without_an_error_nothing_is_added(fake: Any) -> None:
    assert said(list(run())) == ["first", "second"]


@pytest.mark.parametrize(
    "error",
    [
        ReachError("the link is gone.", hint="Run again."),
        paramiko.SSHException("the link is gone. Run again."),
        OSError("the link is gone. Run again."),
    ],
)
def test_an_error_of_ours_or_of_the_link_refuses_the_host(fake: Any, error: Exception) -> None:
    commands = list(run(error))
    assert said(commands) == ["first", "the link is gone. Run again."]
    last = commands[-1]
    assert isinstance(last, FunctionCommand)
    assert last.function is common._refused


def test_a_mistake_in_our_code_is_not_hidden(fake: Any) -> None:
    with pytest.raises(KeyError):
        list(run(KeyError("x")))


def test_what_a_host_did_not_tell_is_not_acted_upon(fake: Any) -> None:
    commands = run()
    assert said([next(commands)]) == ["first"]
    # As pyinfra does when a fact cannot be read; the generator got the fact's default.
    fake.state.failed_hosts.add(fake)
    assert said(list(commands)) == ["it did not tell its state (see above), so nothing more is done to it."]


def test_a_plan_goes_on_for_a_host_that_is_out_already(fake: Any) -> None:
    fake.state.is_executing = False
    fake.state.failed_hosts.add(fake)
    assert said(list(run())) == ["first", "second"]
