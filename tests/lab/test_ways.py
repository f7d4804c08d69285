"""The ways in besides the tailnet: each is there when it is asked for, and gone when it is taken back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.own import Waits
from tests.lab.ways import Ways

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def ways(waits: Waits) -> Iterator[Ways]:
    """The story of one host; it is told in the background."""
    told: Ways = waits.told("ways")
    yield told
    told.story.wait()
    waits.leave("ways")


@pytest.mark.parametrize(
    "what",
    [
        "break-glass",
        "break-glass without a tailnet",
        "break-glass for another network",
        "break-glass taken back",
    ],
)
def test_break_glass_is_for_the_listed_networks_alone(ways: Ways, what: str) -> None:
    assert ways.story[what] is None


def test_open_lets_keys_in_and_close_shuts(ways: Ways) -> None:
    assert ways.story["opened and closed"] is None
    assert "Closed: " in ways.said["close"]


def test_open_works_without_tailscale_and_closes_by_itself_with_it(ways: Ways) -> None:
    assert ways.story["opened without tailscale"] is None
    assert "No address is on tailscale0." in ways.said["stays open"]


def test_the_lines_of_the_recovery_page_open_it_to_keys_alone(ways: Ways) -> None:
    assert ways.story["opened line by line"] is None


def test_an_undo_that_would_shut_its_own_way_is_undone(ways: Ways) -> None:
    assert ways.story["an undo that proves nothing"] is None
    assert "only the rule of `quietport open` lets anybody in at port 22" in ways.said["undo"]
    assert "c13-ways: undone: the change was undone by the host's guard" in ways.said["undo"]


def test_undo_makes_a_public_host(ways: Ways) -> None:
    assert ways.story["undone"] is None


def test_a_converge_after_undo_is_a_converge(ways: Ways) -> None:
    assert ways.story["converged again"] is None
