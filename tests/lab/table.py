"""docs/when-things-go-wrong.md, made from the rows that a test run recorded.

`python -m tests.lab.table [DIRECTORY]` writes the page: rows of a whole run replace all of it, rows of a part
those about the same. The end-to-end run itself compares its rows with the page (tests/lab/conftest.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tests.lab import record
from tests.lab.record import Row

PAGE = record.ROOT / "docs/when-things-go-wrong.md"
COMMAND = "make docs-table"
# In a run's directory: every row of the page's tests is there, and all of them passed.
WHOLE = "whole"

_HEAD = """\
# When things go wrong

The end-to-end tests made this page; nothing in it is typed by hand. A row is here because a test of the run \
did that to a host, took the sentence from the output, and then looked at the host. `make test` ends with \
what it saw otherwise than this page says; `make docs-table` writes the page from the last run.

What differs from run to run is named in capitals: `HOST`, `ADDRESS`, `TIME`, `ID`, `TEMP` and `LAB` \
(directories), `N` (a number).
"""
_SECTIONS = {
    "variant": ("Hosts as they are found", "the host as it is found"),
    "fault": ("Faults", "what happens"),
    "input": ("Wrong input", "what is wrong"),
}
_COLUMNS = ("what you see", "state after")
_CELL = re.compile(r"(?<!\\)\|")


def page_of(rows: Collection[Row]) -> str:
    """The page with these rows."""
    parts = [_HEAD]
    for area, (title, first) in _SECTIONS.items():
        found = sorted(row for row in rows if row.area == area)
        lines = [_line(row.what, _code(row.sees), row.after) for row in found]
        table = [_line(first, *_COLUMNS), "|---|---|---|", *lines] if lines else ["None yet."]
        parts.append("\n".join([f"## {title}", "", *table, ""]))
    return "\n".join(parts)


def rows_of(page: str) -> frozenset[Row]:
    """The rows of a page that `page_of` made."""
    areas = {f"## {title}": area for area, (title, _) in _SECTIONS.items()}
    rows = set()
    area = ""
    in_table = False
    for line in page.splitlines():
        area = areas.get(line, area)
        if not line.startswith("|"):
            in_table = False
        elif line.startswith("|---"):
            in_table = True
        elif in_table:
            what, sees, after = (cell.strip().replace(r"\|", "|") for cell in _CELL.split(line)[1:-1])
            rows.add(Row(area, what, sees[3:-3] if sees.startswith("``") else sees[1:-1], after))
    return frozenset(rows)


def _line(*cells: str) -> str:
    return "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|"


def _code(text: str) -> str:
    """A code span: nothing in it is markup."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def merged(old: Collection[Row], new: Collection[Row], *, whole: bool) -> frozenset[Row]:
    """The page's rows after a run: all of a whole run's, else those about the same are replaced."""
    about = {(row.area, row.what) for row in new}
    kept = [] if whole else [row for row in old if (row.area, row.what) not in about]
    return frozenset([*kept, *new])


def differences(page: Collection[Row], run: Collection[Row], *, whole: bool, more: bool = False) -> list[str]:
    """What the page says otherwise than the run saw, a line each.

    Rows of the page that the run lacks count when it was `whole`. With `more` the run is a larger one than
    the page is made from: what the page has no word about does not count.
    """
    known = {(row.area, row.what) for row in page}
    lines = []
    for row in sorted(set(run) - set(page)):
        if (row.area, row.what) in known:
            theirs = sorted(old for old in page if (old.area, old.what) == (row.area, row.what))
            was = "; ".join(f"{old.sees!r}, after: {old.after!r}" for old in theirs)
            lines.append(f"{row.area} {row.what!r}: seen {row.sees!r}, after: {row.after!r}; the page: {was}")
        elif not more:
            lines.append(f"{row.area} {row.what!r} is not in it: seen {row.sees!r}, after: {row.after!r}")
    about = {(row.area, row.what) for row in run}
    gone = {(row.area, row.what) for row in page} - about if whole else set()
    return [*lines, *(f"{area} {what!r} is in it, and no test recorded it" for area, what in sorted(gone))]


def page_rows() -> frozenset[Row]:
    """The rows of the page in docs/; none when there is no page."""
    return rows_of(PAGE.read_text()) if PAGE.is_file() else frozenset()


def last_run(place: Path | None = None) -> Path:
    """The newest run's directory below `place`, whose names begin with the time; itself when it has none."""
    place = place or record.directory()
    return max((path for path in place.glob("*/") if any(path.glob("*.jsonl"))), default=place)


def main(argv: Sequence[str]) -> int:
    """Write the page. Exit code 1 when nothing was recorded."""
    place = Path(argv[0]) if argv else last_run()
    run = record.recorded(place)
    if not run:
        print(f"No rows in {place}. Run end-to-end tests first: pytest tests/lab.", file=sys.stderr)
        return 1
    old = page_rows()
    whole = (place / WHOLE).exists()
    new = merged(old, run, whole=whole)
    PAGE.write_text(page_of(new))
    for line in differences(old, run, whole=whole):
        print(line)
    kind = "a whole run" if whole else "a part of a run"
    print(f"{PAGE.relative_to(record.ROOT)}: {len(new)} rows; {len(run)} came from {kind}, {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
