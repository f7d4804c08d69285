"""The converge, killed at thirty moments that a seed chose: nothing of it is lost, and nothing opens.

`make kills N=200 SEED=7` kills as often as you like; tests/lab/kills.py says how a failure is had again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.lab import kills
from tests.lab.kills import GOES_ON, RISKY, Report
from tests.lab.own import own_lab
from tests.lab.record import record

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, needs_containers: None) -> Iterator[Report]:
    """What thirty kills did."""
    seed = int(os.environ.get("QUIETPORT_SEED", kills.DEFAULT_SEED))
    with own_lab("kills", request.session, asked_by="report") as lab:
        found = kills.campaign(lab, kills=kills.DEFAULT_KILLS, seed=seed)
        (lab.run.logs / "kills.json").write_text(json.dumps(found.to_json(), indent=1))
        yield found


def test_the_looks_see_what_is_done_on_purpose(report: Report) -> None:
    """Positive controls: a public listener, a due restart, a due reload and a file that was left behind."""
    watch = "\n".join(report.controls["watch"])
    assert f"a public listener that was not there before: tcp 0.0.0.0 {kills.CONTROL_PORT}" in watch
    assert "reached from the public side, as not before" in watch
    comparison = "\n".join(report.controls["comparison"])
    assert "due: ssh.service is older than /etc/ssh/sshd_config" in comparison
    assert "due: quietport-report.timer waits for a daemon-reload" in comparison
    assert "path /etc/ssh/sshd_config.d/.quietport.0123456789: is there, and should not" in comparison


def test_every_killed_run_ends_as_one_that_was_never_killed(report: Report) -> None:
    """The same end state, due restarts included; always reachable; nothing opened to the public."""
    print(report.table())
    assert not report.failed, report.table()


def test_the_kills_were_kills(report: Report) -> None:
    """As many as the plan has, many in the steps that can lock out, some while the host was at work."""
    done = [kill for result in report.results for kill in result.kills]
    assert len(done) == kills.DEFAULT_KILLS
    assert sum(kill.landed.startswith(RISKY) for kill in done) >= len(done) // 4
    # A command was at work on the host when its run was killed, and the next run let it end.
    assert any(result.waited for result in report.results)
    assert all(min(result.looks) > 20 for result in report.results)
    # One that lands after the last operation leaves nothing to go on from.
    assert sum(GOES_ON in result.said for result in report.results) >= len(report.results) / 2
    record(
        "fault",
        "the converge is killed (SIGKILL) and run again",
        sees=next(result.said for result in report.results if GOES_ON in result.said),
        after="as after a run that was never killed, restarts that were due included. It was reachable after "
        "every kill, and nothing was open to the public in between that was not before (what firewall and "
        "ssh changed and nobody proved is undone first)",
    )
