"""A guard whose machine goes down, or whose clock is set: the host is as it was, complete, and answers."""

from __future__ import annotations

import pytest

from tests.lab.power import FAULTS
from tests.lab.record import record
from tests.lab.tale import Tale
from tests.lab.variants import OF_POWER

TOLD_BY = (OF_POWER,)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_host_is_as_it_was_and_answers(tale: Tale, fault: str) -> None:
    ended = tale.chapters["power"][fault]
    assert ended.failure is None
    record(
        "fault",
        f"{fault}, while a guard is armed (VM)",
        sees=f"`quietport guard status`: {ended.said}",
        after="as it was",
    )
