"""What the audit says about the length of sessions, and when it says that it does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from quietport.sshagent import audit, evidence
from quietport.sshagent.audit import Event, Trail
from quietport.sshagent.evidence import gather
from quietport.sshagent.names import now, stamp

MOMENT = now()
DAY = timedelta(days=1)
WEEK_S = 7 * 86400


def session(number: int, at: datetime, length: float | None, end: str = "stopped") -> list[Event]:
    name = f"20260101T000000Z-{number:08x}"
    found = [Event(at, "created", name, {"ttl_s": 1800}), Event(at, "key_loaded", name, {})]
    if end:
        later = at + timedelta(seconds=length or 0)
        found.append(Event(later, end, name, {"duration_s": length, "reason": "x", "exit_status": 0}))
    return found


def trail(*parts: list[Event], damaged: int = 0) -> Trail:
    return Trail(sorted((one for part in parts for one in part), key=lambda one: one.at), damaged)


def test_percentiles_candidates_and_a_verdict() -> None:
    lengths = [float(10 * n) for n in range(1, 101)]
    parts = [session(n, MOMENT - 6 * DAY, length) for n, length in enumerate(lengths)]
    before = session(999, MOMENT - 8 * DAY, 90000.0)  # covers the week, but did not begin in it
    found = gather(trail(*parts, before), moment=MOMENT, since_s=WEEK_S)
    assert found.sessions["count"] == 100
    assert found.duration_s == {"p50": 500.0, "p90": 900.0, "p95": 950.0, "max": 1000.0}
    cut = {one.ttl: one.cut for one in found.candidates}
    assert (cut["5m"], cut["10m"], cut["15m"], cut["20m"], cut["30m"]) == (71, 41, 11, 0, 0)
    assert (found.full_days, found.missing, found.verdict) == (7, [], {"ttl": "20m", "ttl_s": 1200})
    assert found.days_with_sessions == 1


def test_a_session_that_its_ttl_ended_counts_as_cut_at_that_length() -> None:
    parts = [session(1, MOMENT - 7 * DAY, 1800.0, "expired"), session(2, MOMENT - DAY, 5.0)]
    found = gather(trail(*parts), moment=MOMENT, since_s=WEEK_S)
    cut = {one.ttl: one.cut for one in found.candidates}
    assert (cut["20m"], cut["30m"], cut["45m"]) == (1, 1, 0)
    assert found.verdict == {"ttl": "45m", "ttl_s": 2700}


@pytest.mark.parametrize(
    ("age", "days", "word"), [(6.99, 6, "1 more full day is needed"), (0.5, 0, "7 more full days are needed")]
)
def test_no_verdict_before_seven_full_days(age: float, days: int, word: str) -> None:
    found = gather(trail(session(1, MOMENT - age * DAY, 5.0)), moment=MOMENT, since_s=WEEK_S)
    assert (found.full_days, found.verdict) == (days, None)
    assert word in found.missing[0]
    # The positive control.
    whole = gather(trail(session(1, MOMENT - 7 * DAY, 5.0)), moment=MOMENT, since_s=WEEK_S)
    assert (whole.missing, whole.verdict) == ([], {"ttl": "5m", "ttl_s": 300})


def test_what_else_can_be_missing() -> None:
    nothing = gather(trail(), moment=MOMENT, since_s=WEEK_S)
    assert len(nothing.missing) == 2
    old = gather(trail(session(1, MOMENT - 20 * DAY, 5.0)), moment=MOMENT, since_s=WEEK_S)
    assert old.missing == ["There is no session whose length is known."]
    short = gather(trail(session(1, MOMENT - 20 * DAY, 5.0)), moment=MOMENT, since_s=86400)
    assert "--since is shorter than 7 days" in short.missing[0]
    unknown = session(1, MOMENT - 6 * DAY, None, "crashed")
    running = session(2, MOMENT - 6 * DAY, None, "")
    failed = [one for one in session(3, MOMENT - 6 * DAY, 1.0) if one.event != "key_loaded"]
    found = gather(trail(unknown, running, failed), moment=MOMENT, since_s=WEEK_S)
    assert found.sessions == {
        "count": 2, "stopped": 0, "expired": 0, "crashed": 1, "running": 1, "unknown_length": 1,
    }  # fmt: skip
    ahead = gather(trail(session(1, MOMENT + 9 * DAY, 5.0)), moment=MOMENT, since_s=WEEK_S)
    assert (ahead.full_days, ahead.sessions["count"]) == (0, 0)


def write(root: Path, found: Trail) -> None:
    for place in (root, root / "sessions"):
        place.mkdir(mode=0o700)
    place = root / "audit.jsonl"
    place.write_text("".join(one.line() + "\n" for one in found.events) + '{"torn')
    place.chmod(0o600)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "quietport", "ttl-evidence", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
    root = tmp_path / "r"
    write(root, trail(*[session(n, now() - n * DAY, 60.0 * n) for n in range(1, 9)]))
    done = run("--runtime-root", str(root), "--json", "--since", "8d")
    document = json.loads(done.stdout)
    assert (done.returncode, document["schema"], document["damaged_lines"]) == (0, 1, 1)
    assert document["verdict"] == {"ttl": "10m", "ttl_s": 600}
    done = run("--runtime-root", str(root), "--since=8d")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "verdict: a TTL of 10m would have cut no session",
    )
    assert "1 damaged lines" in done.stdout
    done = run("--runtime-root", str(tmp_path / "none"))
    assert done.returncode == 3
    assert "insufficient evidence" in done.stdout
    assert not (tmp_path / "none").exists()


def test_wrong_usage_and_a_root_that_is_not_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--since", "x"], ["--since", "0"], ["--since"], ["--no"], ["word"], ["--since", "9999d"]):
        assert evidence.main(words) == 2
    root = tmp_path / "r"
    write(root, trail())
    root.chmod(0o755)
    assert evidence.main(["--runtime-root", str(root)]) == 125
    assert capsys.readouterr().out == ""
    root.chmod(0o700)
    assert evidence.main(["--runtime-root", str(root)]) == 3


def test_lines_are_what_the_audit_writes() -> None:
    event = session(1, MOMENT, 5.0)[-1]
    again = audit.parse_line(event.line().encode())
    assert stamp(again.at) == stamp(MOMENT + timedelta(seconds=5))
    assert (again.event, again.id, again.more) == (event.event, event.id, event.more)
