"""The order of the end-to-end tests: nothing waits while something else could run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.lab import conftest


def item(module: str, story: str | None = None) -> Any:
    """What the order goes by: the module and the story of a test."""
    params = {"story": story} if story else {}
    return SimpleNamespace(nodeid=f"{module}::test", callspec=SimpleNamespace(params=params))


def told(*, ended: bool) -> Any:
    return SimpleNamespace(chapters=SimpleNamespace(ended=ended))


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    stories: dict[str, Any] = {"fleet": told(ended=False), "vm": told(ended=False)}
    monkeypatch.setattr(conftest, "TELLING", stories)
    monkeypatch.setattr(conftest, "BEGUN", [])
    return stories


def groups() -> dict[tuple[str | None, str], list[Any]]:
    return {
        (None, "faults"): [item("faults"), item("faults")],
        (None, "kills"): [item("kills")],
        ("fleet", "main"): [item("main", "fleet")],
        ("vm", "main"): [item("main", "vm")],
    }


def taken(left: dict[tuple[str | None, str], list[Any]]) -> tuple[str, str | None]:
    found: Any = conftest._next(left)
    return found.nodeid.partition("::")[0], found.callspec.params.get("story")


def test_what_has_no_story_goes_first_and_then_the_stories_in_order(telling: dict[str, Any]) -> None:
    left = groups()
    order = [taken(left) for _ in range(5)]
    assert order == [("faults", None), ("faults", None), ("kills", None), ("main", "fleet"), ("main", "vm")]
    assert conftest._next(left) is None


def test_a_story_that_ended_is_next_once_the_module_that_was_begun_is_through(
    telling: dict[str, Any],
) -> None:
    left = groups()
    assert taken(left) == ("faults", None)
    telling["vm"] = told(ended=True)
    assert [taken(left) for _ in range(3)] == [("faults", None), ("main", "vm"), ("kills", None)]


def test_the_last_ones_go_first_of_those_that_ended(telling: dict[str, Any]) -> None:
    left = groups()
    telling.update(fleet=told(ended=True), vm=told(ended=True))
    assert [taken(left) for _ in range(2)] == [("main", "vm"), ("main", "fleet")]
