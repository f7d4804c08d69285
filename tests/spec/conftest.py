"""One source of specs for containers, VMs and live hosts: QUIETPORT_HOSTS decides which are read.

`pytest tests/spec` reads every host of the file, `--hosts=NAME,NAME` some of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import testinfra
from _pytest.junitxml import xml_key

from control.errors import QuietportError
from control.outside import Seen
from control.settings import HostSettings, fleet
from tests.spec import backend, snapshot
from tests.spec.public_side import begin
from tests.spec.reading import Reading

backend.register()

# Tests of a host in one run. For a few of them the answers to all questions are not worth their while.
SNAPSHOT_FROM = 25


def _chosen(config: pytest.Config) -> list[str]:
    """The hosts this run is about. A wrong file or name ends the run with a sentence."""
    try:
        known = sorted(fleet().hosts)
    except QuietportError as error:
        raise pytest.UsageError(str(error)) from None
    wanted = config.getoption("hosts")
    if not wanted:
        return known
    names = [name.removeprefix(f"{backend.NAME}://") for name in wanted.split(",")]
    if unknown := sorted(set(names) - set(known)):
        raise pytest.UsageError(f"{fleet().file} names no {', '.join(unknown)}. It has: {', '.join(known)}.")
    return names


def pytest_sessionstart(session: pytest.Session) -> None:
    """A wrong file or name is one sentence, not one for each module."""
    _chosen(session.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a host. Session scope: pytest then finishes one host before the next."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", _chosen(metafunc.config), scope="session")


@pytest.fixture(scope="session")
def reading(name: str, request: pytest.FixtureRequest) -> Reading:
    """The host, read through the project's own connection, most of it at once; kept for the whole run."""
    read = Reading(name=name, host=testinfra.get_host(f"{backend.NAME}://{name}"))
    if sum(_host_of(item) == name for item in request.session.items) >= SNAPSHOT_FROM:
        read.host.backend.ask_all(snapshot.lines(read.settings))
    return read


@pytest.fixture(scope="session")
def full_scan(reading: Reading) -> Future[Seen]:
    """A scan of all ports of the host's public side, which takes a while."""
    return begin(reading)


@pytest.fixture(scope="session", autouse=True)
def _long_things_first(reading: Reading, request: pytest.FixtureRequest) -> None:
    """Begin with a host's first test what its last ones wait for."""
    if any(item.path.name == "test_public_side.py" for item in request.session.items):
        request.getfixturevalue("full_scan")


@pytest.fixture(scope="session")
def settings(reading: Reading) -> HostSettings:
    """What hosts.toml says about the host."""
    return reading.settings


@dataclass
class OfHost:
    """What came of the specs of one host."""

    hold: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    alone: int = 0


FOUND: defaultdict[str, OfHost] = defaultdict(OfHost)


def _host_of(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("name") if parameters else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what became of each spec, by host."""
    report = yield
    if name := _host_of(item):
        sentence = item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
        note(FOUND[name], report, f"{item.path.stem.removeprefix('test_')}: {sentence}")
    return report


def note(found: OfHost, report: pytest.TestReport, sentence: str) -> None:
    """Count one phase of a test; `sentence` is what should hold."""
    if report.failed:
        found.failed.append(sentence)
    elif report.skipped:
        found.skipped += 1
    elif report.when == "call":
        found.hold += 1


@pytest.fixture(autouse=True)
def _grouped_by_host(request: pytest.FixtureRequest) -> None:
    """In a JUnit report each test is of a class that begins with its host.

    As pytest's record_xml_attribute does it, which warns each time that it is an experiment.
    """
    name = _host_of(request.node)
    xml = request.config.stash.get(xml_key, None)
    if name and xml is not None:
        xml.node_reporter(request.node.nodeid).add_attribute("classname", f"{name}.{request.path.stem}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a host, and one for each thing that does not hold there."""
    if FOUND:
        terminalreporter.section("hosts")
    for line in summary(FOUND):
        terminalreporter.line(line)


def summary(found: Mapping[str, OfHost]) -> Iterator[str]:
    """What is said of each host in the end."""
    for name, one in found.items():
        skipped = f", {one.skipped} not asked of it" if one.skipped else ""
        yield (
            f"{name}: {f'{len(one.failed)} DO NOT HOLD, ' if one.failed else ''}{one.hold} hold{skipped} "
            f"({one.alone} questions besides the snapshot)"
        )
        yield from (f"    {sentence}" for sentence in one.failed)


@pytest.fixture(scope="session", autouse=True)
def _close_sessions() -> Iterator[None]:
    yield
    for name, asked in backend.QuietportBackend.alone.items():
        FOUND[name].alone = len(asked)
    backend.QuietportBackend.close_all()
