"""The page that the end-to-end run makes of what its tests recorded, and compares itself with."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.lab import record, table
from tests.lab.record import Row

LOCKS = Row("variant", "apt locks held for 90 s", "c|d `x` waits *", "private")
FULL = Row("fault", "disk full", "HOST: refused: no space", "as it was")
FULL_LATE = Row("fault", "disk full", "HOST: refused: late", "as it was")
KEY = Row("input", "no such file | command", "quietport: no, say `this`", "untouched")
ROWS = frozenset({LOCKS, FULL, FULL_LATE, KEY})


def test_the_page_can_be_read_back() -> None:
    page = table.page_of(ROWS)
    assert table.rows_of(page) == ROWS
    assert table.page_of(table.rows_of(page)) == page


def test_a_page_without_rows_has_none() -> None:
    assert table.rows_of(table.page_of([])) == frozenset()


def test_a_part_of_a_run_replaces_what_it_is_about() -> None:
    assert table.merged(ROWS, [FULL], whole=False) == {LOCKS, FULL, KEY}
    assert table.merged(ROWS, [FULL], whole=True) == {FULL}


def test_a_run_that_saw_the_page_differs_in_nothing() -> None:
    assert table.differences(ROWS, ROWS, whole=True) == []
    assert table.differences(ROWS, [KEY], whole=False) == []


def test_differences_name_the_row() -> None:
    changed = Row("input", KEY.what, "quietport: other", KEY.after)
    (line,) = table.differences(ROWS, [changed], whole=False)
    assert KEY.what in line
    assert "quietport: other" in line
    assert repr(KEY.sees) in line
    (line,) = table.differences([KEY], [KEY, LOCKS], whole=False)
    assert "is not in it" in line
    assert LOCKS.what in line
    (line,) = table.differences([KEY, LOCKS], [KEY], whole=True)
    assert "no test recorded it" in line
    assert LOCKS.what in line


def test_a_larger_run_may_see_more_but_nothing_else() -> None:
    assert table.differences([KEY], [KEY, LOCKS], whole=False, more=True) == []
    assert table.differences([FULL], [FULL_LATE], whole=False, more=True)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "PAGE", tmp_path / "docs.md")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.delenv(record.ENV, raising=False)
    return tmp_path / "docs.md"


def test_the_page_is_written_from_the_last_run(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.main([]) == 1
    runs = record.directory()
    for run, row in (("20250101T000000-9", LOCKS), ("20250102T000000-1", KEY)):
        monkeypatch.setenv(record.ENV, str(runs / run))
        record.record(row.area, row.what, sees=row.sees, after=row.after)
    monkeypatch.delenv(record.ENV)
    (runs / "20250103T000000-1").mkdir()
    assert table.main([]) == 0
    assert table.page_rows() == {KEY}
    assert "a part of a run" in capsys.readouterr().out
    assert table.main([str(runs / "20250101T000000-9")]) == 0
    assert table.page_rows() == {KEY, LOCKS}
    (runs / "20250102T000000-1" / table.WHOLE).touch()
    assert table.main([]) == 0
    assert table.page_rows() == {KEY}


def test_the_page_in_the_docs_was_written_by_the_program() -> None:
    """Nothing in it by hand."""
    text = table.PAGE.read_text()
    assert table.page_of(table.rows_of(text)) == text


def end_to_end(tmp_path: Path, **row: str) -> subprocess.CompletedProcess[str]:
    """A run of one test that records this row, with what the end-to-end tests add to pytest."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "from tests.lab.record import record\n"
        f"def test_it():\n    row = {row!r}\n    record(row.pop('area'), row.pop('what'), **row)\n"
    )
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.lab.conftest",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    env = {**os.environ, record.ENV: str(tmp_path / "rows"), "PYTHONPATH": str(record.ROOT)}
    return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)


def test_a_run_that_saw_something_else_says_so_and_how_to_mend_it(tmp_path: Path) -> None:
    done = end_to_end(tmp_path, area="fault", what="a fault of the unit tests", sees="x", after="y")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert "fault 'a fault of the unit tests' is not in it: seen 'x', after: 'y'" in done.stdout
    assert table.COMMAND in done.stdout
    assert "test_it.py" in done.stdout.partition("seconds")[2]


def test_a_run_that_saw_what_the_page_says_has_nothing_to_say(tmp_path: Path) -> None:
    rows = sorted(table.page_rows())
    if not rows:
        pytest.skip("the page has no rows yet")
    done = end_to_end(tmp_path, **asdict(rows[0]))
    assert done.returncode == 0, done.stdout
    assert table.COMMAND not in done.stdout
