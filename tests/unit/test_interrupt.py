"""The piece of the end-to-end tests that acts when an operation begins."""

from __future__ import annotations

import subprocess

import pytest

from tests.lab.interrupt import Converge, seeded

SCRIPT = """
echo '    [c13] Connected'
echo '--> Starting operation: first, the one '
echo '    [c13] Success'
echo '--> Starting operation: second '
read line
echo '--> Starting operation: third '
exit 3
"""


def converge(*, waits: bool) -> Converge:
    argv = ("sh", "-c", SCRIPT)
    stdin = subprocess.PIPE if waits else subprocess.DEVNULL
    process = subprocess.Popen(
        argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Converge(process, argv)


def test_headings_are_seen_as_they_come_and_a_kill_ends_it() -> None:
    with converge(waits=True) as running:
        assert running.wait_for_heading(2, timeout=10) == "second"
        assert running.wait_for_name("first", timeout=10)
        assert running.names == ["first, the one", "second"]
        assert running.wait_for_text("Success", timeout=10)
        with pytest.raises(TimeoutError, match="what says 'lost'"):
            running.wait_for_text("lost", timeout=0.2)
        assert len(running.begun) == 2
        assert running.began <= running.begun[0] <= running.begun[1]
        with pytest.raises(TimeoutError, match=r"operation 3 did not begin.*\n.*Connected"):
            running.wait_for_heading(3, timeout=0.2)
        running.kill()
        done = running.finish(10)
    assert done.code == -9
    assert "Success" in done.out


def test_a_run_that_ended_is_waited_for_no_longer() -> None:
    with converge(waits=False) as running:
        assert running.finish(10).code == 3
        assert running.wait_for_heading(4, timeout=10) is None
        assert running.wait_for_heading(3, timeout=10) == "third"
        assert not running.wait_for_name("fourth", timeout=10)
        assert not running.wait_for_text("lost", timeout=10)


def test_one_that_hangs_fails_and_is_ended() -> None:
    with converge(waits=True) as running:
        with pytest.raises(AssertionError, match="took longer than"):
            running.finish(0.3)
        assert not running.running


def test_the_same_seed_throws_the_same_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    first = seeded("a").random()
    assert seeded("a").random() == first
    assert seeded("b").random() != first
    monkeypatch.setenv("QUIETPORT_SEED", "7")
    assert seeded("a").random() != first
