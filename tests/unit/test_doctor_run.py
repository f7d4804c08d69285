"""The doctor itself: running the checks, what is kept of it, who is told, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.settings import HostSettings
from deploys import programs, timers
from quietport import cli as quietport_cli
from quietport import commands, hostfile
from quietport.commands import Done
from quietport.doctor import checks, cli, history, notify
from quietport.doctor.model import Check, CutShortError, Finding, Status, keeping
from quietport.doctor.place import LOOK_AGAIN, by_converge
from quietport.doctor.run import SLOW_S, Row, exit_code, report, row, rows_of, run, state_of, text_of
from quietport.errors import HostProgramError

AT = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
PASS = Finding("PASS", "fine.")
FAIL = Finding("FAIL", "broken.", "`mend it`")
STATUSES: tuple[Status, ...] = ("PASS", "WARN", "FAIL", "SKIP")


def saying(*findings: Finding) -> Callable[[Mapping[str, Any]], list[Finding]]:
    return lambda declared: list(findings)


def raising(error: Exception) -> Callable[[Mapping[str, Any]], list[Finding]]:
    def look(declared: Mapping[str, Any]) -> list[Finding]:
        raise error

    return look


def rows(*findings: Finding) -> list[Row]:
    return [row("one", finding, AT) for finding in findings]


# --- running ---


def test_each_check_answers_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(
        [
            Check("good", saying(PASS)),
            Check("bad", saying(FAIL, Finding("WARN", "old.", "`look`"))),
            Check("blind", raising(HostProgramError("ss is not installed."))),
            Check("broken", raising(ZeroDivisionError("by zero"))),
            Check("silent", saying()),
        ],
        {},
        now=lambda: AT,
    )
    assert list(found) == ["good", "bad", "blind", "broken", "silent"]
    assert [one.status for one in found["bad"]] == ["FAIL", "WARN"]
    assert found["bad"][0].to_json() == {
        "check": "bad",
        "status": "FAIL",
        "reason": "broken.",
        "next_step": "`mend it`",
        "at": "2026-05-01T12:00:00+00:00",
    }
    blind = {name: found[name][0] for name in ("blind", "broken", "silent")}
    assert {(one.status, one.told) for one in blind.values()} == {("SKIP", False)}
    assert blind["blind"].reason == "could not tell: ss is not installed."
    assert "ZeroDivisionError: by zero" in blind["broken"].reason
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert found["good"][0].told


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HostProgramError("ss is not installed."), "could not tell: ss is not installed."),
        (ZeroDivisionError("by zero"), "could not tell: ZeroDivisionError: by zero"),
    ],
)
def test_what_a_check_has_found_stands_when_it_cannot_go_on(
    error: Exception, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(declared: Mapping[str, Any]) -> list[Finding]:
        found: list[Finding] = []
        with keeping(found):
            found += cut()
        return found

    def cut() -> Iterator[Finding]:
        yield FAIL
        raise error

    found = run([Check("cut", look)], {}, now=lambda: AT)["cut"]
    assert [(one.status, one.reason) for one in found] == [("FAIL", "broken."), ("SKIP", reason)]
    assert state_of(found) == "fail"
    # A defect of ours is told in whole.
    assert ("Traceback" in capsys.readouterr().err) is isinstance(error, ZeroDivisionError)


def test_where_nothing_was_found_the_error_is_what_it_was() -> None:
    with pytest.raises(ZeroDivisionError), keeping([]):
        raise ZeroDivisionError
    assert str(CutShortError(ZeroDivisionError("by zero"), [FAIL])) == "by zero"


def test_checks_run_at_the_same_time_and_one_that_hangs_keeps_nobody_waiting() -> None:
    def slow(declared: Mapping[str, Any]) -> list[Finding]:
        time.sleep(0.2)
        return [PASS]

    def hanging(declared: Mapping[str, Any]) -> list[Finding]:
        time.sleep(5)
        return [PASS]

    many = [Check(f"slow-{number}", slow) for number in range(10)]
    began = time.monotonic()
    found = run([*many, Check("hanging", hanging)], {}, limit_s=1.5)
    assert time.monotonic() - began < 3
    assert all(found[check.name][0].status == "PASS" for check in many)
    assert found["hanging"][0].reason == "could not tell: no answer within 1.5 s."


def test_names_of_the_host_do_not_steer_a_terminal() -> None:
    hostile = row("one", Finding("FAIL", "a\x1b[2Jb\n", "`x\r`"), AT)
    assert (hostile.reason, hostile.next_step) == ("a?[2Jb?", "`x?`")


# --- what comes of it ---


@pytest.mark.parametrize(
    ("findings", "state", "code"),
    [
        ([PASS], "pass", 0),
        ([], "pass", 0),
        ([PASS, Finding("SKIP", "no Docker.")], "pass", 0),
        ([PASS, Finding("WARN", "old.")], "warn", 0),
        ([Finding("WARN", "old."), Finding("SKIP", "could not tell: gone.")], "unknown", 3),
        ([Finding("SKIP", "could not tell: gone."), FAIL], "fail", 1),
    ],
)
def test_states_and_exit_codes(findings: list[Finding], state: str, code: int) -> None:
    assert state_of(rows(*findings)) == state
    assert exit_code(state_of(rows(*findings))) == code
    document = report(rows(*findings), AT)
    assert (document["schema"], document["state"], document["ok"]) == (1, state, code == 0)
    assert len(document["checks"]) == len(findings)


FINDINGS = st.builds(Finding, st.sampled_from(STATUSES), st.text(max_size=30), st.text(max_size=30))


@given(st.lists(FINDINGS, max_size=5))
def test_what_is_kept_is_read_back(findings: list[Finding]) -> None:
    made = rows(*findings)
    assert rows_of(json.loads(json.dumps(report(made, AT)))) == made


@pytest.mark.parametrize(
    "checks",
    [None, "x", [1], [{}], [{"check": "a", "status": "OK", "reason": "", "next_step": "", "at": ""}]],
)
def test_a_result_of_somebody_else_is_no_result(checks: Any) -> None:
    with pytest.raises(HostProgramError):
        rows_of({"schema": 1, "checks": checks})


# --- what is kept ---

SLOW = (Check("updates", saying(PASS), slow=True), Check("dns", saying(PASS), slow=True))


def keep(folder: Path, *findings: Finding, at: datetime = AT) -> None:
    history.keep(report([row("updates", one, at) for one in findings], at), at, folder=folder)


def test_results_are_kept_for_thirty_days(tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    for days in (0, 1, 29, 31, 40):
        keep(folder, PASS, at=AT + timedelta(days=days))
        (folder / "runs/notes.json").write_text("somebody's")
    kept = sorted(file.name for file in (folder / "runs").iterdir())
    assert kept == ["20260530T120000Z.json", "20260601T120000Z.json", "20260610T120000Z.json", "notes.json"]
    assert (folder / "latest.json").stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o027 == 0
    document = history.latest(folder)
    assert document is not None
    assert document["at"] == text_of(AT + timedelta(days=40))


def test_what_is_slow_is_told_with_its_time(tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    before = history.told(SLOW, AT, folder=folder)
    assert {(name, one.status, one.next_step) for name, (one,) in before.items()} == {
        ("updates", "SKIP", LOOK_AGAIN),
        ("dns", "SKIP", LOOK_AGAIN),
    }
    assert before["dns"][0].told, "a host that has just been converged is not a problem"
    keep(folder, FAIL, PASS)
    soon = history.told(SLOW, AT + timedelta(hours=2), folder=folder)
    assert [(one.status, one.at) for one in soon["updates"]] == [("FAIL", text_of(AT)), ("PASS", text_of(AT))]
    assert soon["dns"][0].reason == "Not looked at yet."
    for late in (AT + timedelta(hours=4), AT - timedelta(hours=1)):
        old = history.told(SLOW, late, folder=folder)["updates"]
        assert [(one.status, one.next_step) for one in old] == [("WARN", LOOK_AGAIN), ("FAIL", "`mend it`")]


def test_what_could_not_be_told_is_not_told_by_growing_old(tmp_path: Path) -> None:
    folder = tmp_path / "doctor"
    keep(folder, PASS, Finding("SKIP", "could not tell: apt is broken."))
    late = history.told(SLOW[:1], AT + timedelta(hours=4), folder=folder)["updates"]
    assert [(one.status, one.told) for one in late] == [("WARN", True), ("SKIP", False)]
    assert (state_of(late), exit_code(state_of(late))) == ("unknown", 3)


def test_results_that_cannot_be_pruned_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no directory")
    with pytest.raises(HostProgramError, match=r"runs cannot be pruned: Not a directory\.$"):
        history.prune(AT, folder=tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 2}', '{"schema": 1, "checks": 7}'])
def test_a_broken_result_could_not_tell(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest.json").write_text(text)
    (one,) = history.told(SLOW[:1], AT, folder=tmp_path)["updates"]
    assert not one.told
    assert one.next_step == LOOK_AGAIN


# --- who is told ---


class Told:
    """Stands in for the program that tells somebody."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.texts: list[str] = []

    def __call__(self, argv: list[str], *, stdin: str, timeout: float) -> Done:
        assert argv == ["tell", "ops"]
        assert timeout == 60
        self.texts.append(stdin)
        code = self.codes.pop(0) if self.codes else 0
        return Done(code, "", "no such channel" if code else "")


def tell(folder: Path, state: Any, told: Told) -> str:
    return notify.if_changed(
        ["tell", "ops"], state, "the table", name="vps1", at=AT, folder=folder, runner=told
    )


def test_a_change_of_state_is_told_once_with_the_report(tmp_path: Path) -> None:
    told = Told()
    assert tell(tmp_path, "pass", told) == ""
    assert tell(tmp_path, "pass", told) == ""
    assert told.texts == [], "that all is well from the beginning is no news"
    assert "pass -> fail" in tell(tmp_path, "fail", told)
    assert tell(tmp_path, "fail", told) == ""
    assert "fail -> warn" in tell(tmp_path, "warn", told)
    assert told.texts == ["vps1: pass -> fail\n\nthe table\n", "vps1: fail -> warn\n\nthe table\n"]


def test_a_first_result_that_is_bad_is_told(tmp_path: Path) -> None:
    told = Told()
    tell(tmp_path, "fail", told)
    assert told.texts[0].startswith("vps1: never looked -> fail\n")


def test_what_could_not_be_told_is_told_at_the_next_run(tmp_path: Path) -> None:
    tell(tmp_path, "pass", Told())
    failing = Told(1, 0)
    said = tell(tmp_path, "fail", failing)
    assert "again at the next run" in said
    assert "no such channel" in said
    assert "pass -> fail" in tell(tmp_path, "fail", failing)
    assert len(failing.texts) == 2
    # Back to what was told last, before anybody heard of it: there is nothing to tell.
    failing = Told(1)
    tell(tmp_path, "pass", failing)
    assert tell(tmp_path, "fail", failing) == ""
    assert len(failing.texts) == 1


def test_a_command_that_hangs_or_is_missing_is_a_sentence_without_its_arguments(tmp_path: Path) -> None:
    for raised in ("tell ops took longer than 60 s.", "tell is not installed."):

        def broken(argv: list[str], *, stdin: str, timeout: float, raised: str = raised) -> Done:
            raise HostProgramError(raised)

        said = notify.if_changed(
            ["tell", "ops"], "fail", "", name="vps1", at=AT, folder=tmp_path, runner=broken
        )
        assert "tell cannot be run, or took longer than 60 s" in said
        assert "ops" not in said
    assert not (tmp_path / notify.NOTIFIED).exists()


def test_without_a_command_nothing_is_remembered(tmp_path: Path) -> None:
    assert notify.if_changed([], "fail", "", name="vps1", at=AT, folder=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_report_really_goes_to_standard_input(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    command = ["sh", "-c", 'cat > "$1"', "sh", str(heard)]
    notify.if_changed(command, "fail", "the table", name="vps1", at=AT, folder=tmp_path)
    assert heard.read_text() == "vps1: never looked -> fail\n\nthe table\n"


def test_what_the_command_leaves_running_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "LIMIT_S", 5.0)
    began = time.monotonic()
    said = notify.if_changed(
        ["sh", "-c", "sleep 10 & exit 0"], "fail", "the table", name="vps1", at=AT, folder=tmp_path
    )
    assert time.monotonic() - began < 5
    assert said == "notify_command was told: vps1: never looked -> fail"
    assert notify.last_told(tmp_path) == "fail"


@pytest.mark.parametrize(
    ("script", "limit_s", "words"),
    [
        ("echo all; echo no such channel >&2; exit 7", 5, "sh ended with exit code 7: no such channel"),
        ("echo no such channel; sleep 10 & exit 7", 5, "sh ended with exit code 7: no such channel"),
        ("yes | head -n 100000; echo the end; exit 7", 5, "sh ended with exit code 7: the end"),
        ("exec sleep 10", 0.5, "sh cannot be run, or took longer than 0.5 s"),
    ],
)
def test_the_last_words_of_a_command_that_fails_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit_s: float, words: str
) -> None:
    monkeypatch.setattr(notify, "LIMIT_S", limit_s)
    began = time.monotonic()
    said = notify.if_changed(["sh", "-c", script], "fail", "", name="vps1", at=AT, folder=tmp_path)
    assert words in said
    assert time.monotonic() - began < 5
    assert not (tmp_path / notify.NOTIFIED).exists()


def test_the_command_has_the_environment_that_is_promised() -> None:
    done = notify.run_alone(["env"], stdin="", timeout=10)
    assert dict(line.split("=", 1) for line in done.out.splitlines()) == commands.ENVIRONMENT
    with pytest.raises(HostProgramError, match="cannot be run"):
        notify.run_alone(["/nonexistent"], stdin="", timeout=10)


def test_a_memory_that_is_broken_tells_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / notify.NOTIFIED).write_text("{")
    told = Told()
    tell(tmp_path, "fail", told)
    assert len(told.texts) == 1
    assert notify.NOTIFIED in capsys.readouterr().out


# --- the command ---


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host that was converged, with four checks."""
    told = (
        Check("tailnet", saying(PASS)),
        Check("listeners", saying(FAIL)),
        Check("updates", saying(Finding("WARN", "three wait.", "`upgrade`")), slow=True),
        Check("dns", saying(PASS), slow=True),
    )
    declared = {"schema": 1, "name": "vps1", "notify_command": ["cat"]}
    monkeypatch.setattr(cli, "CHECKS", told)
    monkeypatch.setattr(cli, "host_settings", lambda: declared)
    monkeypatch.setattr(cli.os, "geteuid", lambda: 0)
    monkeypatch.setattr(cli, "converging", lambda: False)
    folder = tmp_path / "doctor"
    for module, name in ((history.keep, "folder"), (history.told, "folder"), (notify.if_changed, "folder")):
        monkeypatch.setitem(module.__kwdefaults__, name, folder)
    return folder


def test_it_changes_nothing_and_reads_what_is_slow(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quietport_cli.main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [(one["check"], one["status"]) for one in document["checks"]] == [
        ("tailnet", "PASS"),
        ("listeners", "FAIL"),
        ("updates", "SKIP"),
        ("dns", "SKIP"),
    ]
    assert (document["ok"], document["state"]) == (False, "fail")
    assert not host.exists()


def test_the_timer_keeps_it_and_ends_well(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A doctor whose own unit failed because of what it found would find that next."""
    assert quietport_cli.main(["doctor", "--record"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("vps1: fail, ")
    assert "notify_command was told: vps1: never looked -> fail" in out
    kept = json.loads((host / "latest.json").read_text())
    assert [one["status"] for one in kept["checks"]] == ["PASS", "FAIL", "WARN", "PASS"]
    assert len(list((host / "runs").iterdir())) == 1
    assert quietport_cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "three wait." in out
    assert "listeners: `mend it`" in out
    assert quietport_cli.main(["doctor", "--record", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "fail"


@pytest.mark.parametrize("when", ["before", "during"])
def test_nobody_is_told_of_what_a_converge_has_done_half_of(
    host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    seen = iter([when == "before", when == "during"])
    monkeypatch.setattr(cli, "converging", lambda: next(seen))
    assert quietport_cli.main(["doctor", "--record"]) == 0
    assert cli.AT_WORK in capsys.readouterr().out
    assert json.loads((host / "latest.json").read_text())["state"] == "fail"
    assert not (host / notify.NOTIFIED).exists()
    monkeypatch.setattr(cli, "converging", lambda: False)
    assert quietport_cli.main(["doctor", "--record"]) == 0
    assert "notify_command was told: vps1: never looked -> fail" in capsys.readouterr().out


def test_a_result_that_cannot_be_kept_is_an_error(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host.write_text("not a directory")
    assert quietport_cli.main(["doctor", "--record"]) == 3
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize("notes", ["can be kept", "cannot be kept either"])
def test_a_disk_that_is_full_is_told_all_the_same(
    host: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    notes: str,
) -> None:
    heard = tmp_path / "heard"
    tells = ["sh", "-c", 'cat >> "$1"', "sh", str(heard)]
    monkeypatch.setattr(cli, "host_settings", lambda: {"name": "vps1", "notify_command": tells})
    written: list[Path] = []

    def full(path: Path, content: bytes, *, mode: int) -> None:
        written.append(path)
        raise hostfile.HostFileError(f"{path} cannot be written: {os.strerror(errno.ENOSPC)}.")

    monkeypatch.setattr(history, "write_atomic", full)
    if notes != "can be kept":
        monkeypatch.setattr(notify, "write_atomic", full)
    assert quietport_cli.main(["doctor", "--record"]) == 3
    out, err = capsys.readouterr()
    assert out.startswith("vps1: fail, ")
    assert "listeners: `mend it`" in out
    assert heard.read_text().startswith("vps1: never looked -> fail\n\nvps1: fail, ")
    assert f"{host}/runs/" in err and err.count("No space left on device") == len(written)
    assert len(written) == (1 if notes == "can be kept" else 2)
    # Nobody is told twice, unless it cannot be remembered.
    assert quietport_cli.main(["doctor", "--record", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "fail"
    assert heard.read_text().count("never looked -> fail") == (1 if notes == "can be kept" else 2)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.os, "geteuid", lambda: 1000)
    assert quietport_cli.main(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "quietport doctor: only root sees enough of the host; run it with sudo.\n"


def test_names_are_each_ones_own_and_in_order() -> None:
    names = [check.name for check in checks.CHECKS]
    core = ["tailnet", "key-expiry", "firewall", "listeners", "ssh-sockets", "sshd"]
    assert names[: len(core)] == core
    assert len(set(names)) == len(names)


def test_host_json_tells_the_doctor_what_it_needs() -> None:
    settings = HostSettings(address="192.0.2.1", notify_command=("tell", "ops"), accept_key_expiry=True)
    declared = json.loads(json.dumps(programs.declared("vps1", settings)))
    assert declared["notify_command"] == ["tell", "ops"]
    needed = ("accept_key_expiry", "prune_foreign", "unattended_upgrades")
    assert [declared[key] for key in needed] == [True, False, True]


def test_the_timer_records_every_hour() -> None:
    (timer,) = [one for one in timers.TIMERS if one.name == "doctor"]
    assert timer.program[-2:] == ("doctor", "--record")
    assert timer.schedule == "hourly"
    # What it may take at most, the notification included, is over before systemd ends it.
    assert timer.timeout_s > SLOW_S + notify.LIMIT_S
    assert f"{timer.unit}.service" in LOOK_AGAIN


def test_the_next_step_names_the_host() -> None:
    assert by_converge({"name": "vps1"}) == "On your machine: `quietport apply vps1`."


def test_a_host_that_was_never_converged_gets_no_row_that_needs_a_converge() -> None:
    for check in checks.CHECKS:
        if check.name in ("firewall", "ssh-sockets", "sshd"):
            (one,) = check.look({})
            assert (one.status, "host.json" in one.reason) == ("SKIP", True)
