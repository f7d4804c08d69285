"""Operations fail one host with a sentence: a lost fact, a failed command, an error in a function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import paramiko
import pytest
from pyinfra.api import Config, FactBase, Inventory, State, StringCommand
from pyinfra.api.command import FunctionCommand, PyinfraCommand
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra.context import ctx_host, ctx_state, host

from control.connector import Unanswered
from control.errors import ReachError
from operations import common
from operations.common import Commands, no_room, one_host_at_most, operation, program

LOST = "the connection to 192.0.2.1 is lost. Run the same command again."


@dataclass
class World:
    """Hosts without a connection; `broken` are those whose link is cut."""

    state: State
    broken: set[str]
    ran: list[tuple[str, str]]

    def plan(self, act: Callable[[], Any]) -> None:
        """What a deploy file does, on every host."""
        for each in self.state.inventory:
            with ctx_host.use(each):
                act()

    def execute(self) -> None:
        self.state.set_stage(StateStage.Execute)
        run_ops(self.state)


class Colour(FactBase[dict[str, str]]):
    """A fact whose default cannot be worked with."""

    @staticmethod
    def default() -> dict[str, str]:
        return {}

    def command(self) -> str:
        return "colour"

    def process(self, output: list[str]) -> dict[str, str]:
        return {"colour": output[0]}


@operation()
def painted() -> Commands:
    colour = host.get_fact(Colour)["colour"]
    yield program("paint", colour)


@operation()
def painted_anyway() -> Commands:
    yield program("paint", host.get_fact(Colour).get("colour", "grey"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    inventory = Inventory((["one", "two"], {}))
    state = State(inventory, Config())
    world = World(state, set(), [])
    for each in inventory:
        each.connected = True

    def run(self: Any, command: StringCommand | str, *_: Any, **__: Any) -> tuple[bool, CommandOutput]:
        name = self.host.name
        if name in world.broken:
            return False, Unanswered(name, [], LOST)
        raw = command if isinstance(command, str) else command.get_raw_value()
        world.ran.append((name, raw))
        return True, CommandOutput([OutputLine("stdout", "red")])

    monkeypatch.setattr("pyinfra.connectors.ssh.SSHConnector.run_shell_command", run)
    with ctx_state.use(state):
        state.activate_host(inventory.get_host("one"))
        state.activate_host(inventory.get_host("two"))
        state.set_stage(StateStage.Prepare)
        yield world


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="pyinfra"):
        yield caplog


def painting(world: World) -> list[str]:
    return [name for name, command in world.ran if command.startswith("paint")]


@pytest.mark.parametrize("act", [painted, painted_anyway])
def test_a_lost_fact_fails_its_host_and_no_other(
    act: Callable[[], Any], world: World, said: pytest.LogCaptureFixture
) -> None:
    world.state.check_for_changes = False
    world.plan(act)
    world.broken = {"one"}
    world.execute()
    assert painting(world) == ["two"]
    assert {each.name for each in world.state.failed_hosts} == {"one"}
    assert f"one: failed: {LOST}" in said.text
    assert "Traceback" not in said.text
    results = world.state.results
    assert {each.name: results[each].error_ops for each in results} == {"one": 1, "two": 0}


@pytest.mark.parametrize("act", [painted, painted_anyway])
def test_the_last_host_ends_the_run_without_a_traceback(
    act: Callable[[], Any], world: World, said: pytest.LogCaptureFixture
) -> None:
    world.state.check_for_changes = False
    world.plan(act)
    world.broken = {"one", "two"}
    with pytest.raises(PyinfraError, match="No hosts remaining"):
        world.execute()
    assert painting(world) == []
    assert said.text.count(LOST) == 2
    assert "Traceback" not in said.text


def test_a_host_that_is_lost_while_it_is_planned_is_not_planned_further(world: World) -> None:
    import gevent

    def deploy() -> None:
        painted()
        planned.append(host.name)

    planned: list[str] = []
    world.state.check_for_changes = True
    world.broken = {"one"}
    jobs = [gevent.spawn(world_job, each, deploy) for each in world.state.inventory]
    gevent.joinall(jobs)
    assert planned == ["two"]
    assert [isinstance(job.value, Exception) for job in jobs] == [False, False]


def world_job(each: Any, act: Callable[[], None]) -> None:
    with ctx_host.use(each):
        act()


@pytest.mark.parametrize(
    "error",
    [
        ReachError("one: it is gone.", hint="Run again."),
        paramiko.SSHException("it is gone. Run again."),
        OSError("it is gone. Run again."),
    ],
)
def test_an_error_of_ours_or_of_the_link_refuses_its_host(
    error: Exception, world: World, said: pytest.LogCaptureFixture
) -> None:
    @operation()
    def step() -> Commands:
        yield program("paint", "first")
        if host.name == "one":
            raise error
        yield program("paint", "second")

    world.state.check_for_changes = False
    world.plan(step)
    world.execute()
    assert sorted(painting(world)) == ["one", "two", "two"]
    assert "one: refused: it is gone. Run again." in said.text
    assert "Traceback" not in said.text


def test_an_error_that_is_no_lost_fact_is_not_hidden(world: World) -> None:
    @operation()
    def wrong() -> Commands:
        raise KeyError("a mistake of ours")
        yield program("never")

    world.state.check_for_changes = False
    world.plan(wrong)
    with pytest.raises(KeyError, match="a mistake of ours"):
        world.execute()


@operation()
def called(function: Callable[..., bool]) -> Commands:
    yield FunctionCommand(function, ("argument",), {})


def test_an_error_in_a_function_is_a_sentence(world: World, said: pytest.LogCaptureFixture) -> None:
    @one_host_at_most
    def unreachable(state: Any, host: Any, argument: str) -> bool:
        if host.name == "one":
            raise ReachError(f"{host.name}: {argument} is wrong.", hint="Mend it.")
        world.ran.append((host.name, f"paint {argument}"))
        return True

    world.state.check_for_changes = False
    world.plan(lambda: called(unreachable))
    world.execute()
    assert painting(world) == ["two"]
    assert "one: failed: argument is wrong. Mend it." in said.text
    assert "Traceback" not in said.text


def test_a_lost_fact_in_a_function_fails_its_host(world: World, said: pytest.LogCaptureFixture) -> None:
    @one_host_at_most
    def read(state: Any, host: Any, argument: str) -> bool:
        colour = host.get_fact(Colour)["colour"]
        world.ran.append((host.name, f"paint {colour}"))
        return True

    world.state.check_for_changes = False
    world.plan(lambda: called(read))
    world.broken = {"one"}
    world.execute()
    assert painting(world) == ["two"]
    assert "Traceback" not in said.text
    assert LOST in said.text


class Answer:
    """A host whose commands all end like this."""

    name = "vps1"
    print_prefix = "[vps1] "

    def __init__(self, ok: bool, output: CommandOutput) -> None:
        self.answer = (ok, output)

    def run_shell_command(self, command: PyinfraCommand, **_: Any) -> tuple[bool, CommandOutput]:
        return self.answer


def executed(ok: bool, output: CommandOutput) -> list[str]:
    class Quiet:
        print_output = False
        print_input = False

    command = program("cat", why=lambda text: "it is red. Paint it." if "red" in text else None)
    answer: Any = Answer(ok, output)
    quiet: Any = Quiet()
    result: tuple[bool, CommandOutput] = command.execute(quiet, answer, {})
    assert result[0] is ok
    return result[1].output_lines


def test_a_failed_command_is_explained_after_what_it_said() -> None:
    red = CommandOutput([OutputLine("stdout", "red")])
    assert executed(False, red) == ["red", "vps1: failed: it is red. Paint it."]
    assert executed(True, red) == ["red"]
    assert executed(False, CommandOutput([OutputLine("stdout", "blue")])) == ["blue"]


def test_a_command_whose_end_nobody_saw_is_not_explained() -> None:
    lost = Unanswered("vps1", [OutputLine("stdout", "red")], LOST)
    assert executed(False, lost) == ["red", f"vps1: failed: {LOST}"]


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("mktemp: failed to create file via template '/etc/x': No space left on device", "its disk is full"),
        ("E: Write error - write (28: No space left on device)", "its disk is full"),
        ("touch: cannot touch '/etc/x': Read-only file system", "a file system of it is read-only"),
        ("cat: write error: Disk quota exceeded", "its disk quota is used up"),
    ],
)
def test_a_disk_without_room_is_named_as_the_reason(said: str, part: str) -> None:
    sentence = no_room(f"first\n{said}\nlast")
    assert sentence is not None
    assert part in sentence
    assert said in sentence
    assert "run again" in sentence


def test_other_failures_are_not_taken_for_a_full_disk() -> None:
    assert no_room("cat: /etc/x: No such file or directory") is None
    assert common.no_room("") is None
