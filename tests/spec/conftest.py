"""One source of specs for containers, VMs and live hosts: QUIETPORT_HOSTS decides which are read.

`pytest tests/spec` reads every host of the file, `--hosts=NAME,NAME` some of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import testinfra

from control.errors import QuietportError
from control.settings import HostSettings, fleet
from tests.spec import backend
from tests.spec.public_side import Seen, begin
from tests.spec.reading import Reading

backend.register()


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
def reading(name: str) -> Reading:
    """The host, read through the project's own connection; kept for the whole run."""
    return Reading(name=name, host=testinfra.get_host(f"{backend.NAME}://{name}"))


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


@pytest.fixture(scope="session", autouse=True)
def _close_sessions() -> Iterator[None]:
    yield
    backend.QuietportBackend.close_all()
