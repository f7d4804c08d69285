"""docs/agent-access.md explains every word that the program prints, and none that it does not."""

from __future__ import annotations

import re
from pathlib import Path

from quietport.sshagent import audit, cli, prune, sessions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/agent-access.md").read_text()
SOURCE = "".join(place.read_text() for place in (ROOT / "quietport/sshagent").glob("*.py"))
PRUNE_WORD = r"(?:PRUNED|WOULD_PRUNE|SKIP_[A-Z_]+)"


def rows(title: str) -> list[str]:
    """The first column of the table below a heading of the page."""
    section = PAGE.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"^\| `?([^|`]+?)`? \|", section, flags=re.MULTILINE)[1:]


def test_every_status_is_explained() -> None:
    assert sorted(rows("Status")) == sorted(sessions.STATUSES)


def test_every_word_of_prune_is_explained() -> None:
    said = set(re.findall(rf"^    ({PRUNE_WORD}) ID", prune.__doc__ or "", flags=re.MULTILINE))
    written = set(re.findall(rf'"({PRUNE_WORD})"', SOURCE))
    # Those of a status are put together from its name.
    made = {f"SKIP_{status.upper()}" for status in ("active", "unknown", "invalid", "unsafe")}
    assert set(rows("`--prune`, a line a session")) == said | {"WOULD_PRUNE"} == written | made


def test_every_reason_is_explained() -> None:
    words = "command|key|stop|wrapper|watch|agent|host|interrupted|ttl"
    written = set(re.findall(rf'"((?:{words})(?:-(?:[a-z]+))*)"', SOURCE))
    reasons = {one for one in written if "-" in one or one in ("ttl", "interrupted")}
    explained = rows("Why it ended (`exit_reason`; `reason` in the audit)")
    assert sorted(explained) == sorted(reasons)


def test_every_event_and_exit_code_is_explained() -> None:
    section = PAGE.split("### Events of the audit\n", 1)[1].split("\n#", 1)[0]
    assert set(re.findall(r"`([a-z_]+)`", section)) == audit.EVENTS
    assert rows("Exit codes") == ["0", "2", "3", "125", "126", "127", "128+N", "others"]


def test_every_option_is_explained() -> None:
    for option in re.findall(r"--[a-z-]+", (cli.__doc__ or "").replace("-- COMMAND", "")):
        assert option in PAGE, option
