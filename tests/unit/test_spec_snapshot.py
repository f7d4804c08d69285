"""The specs ask a host most of it at once: the questions are theirs, and the answers are the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from control import verify
from control.session import Result
from control.settings import HostSettings
from tests.spec import backend, snapshot
from tests.spec.backend import QuietportBackend
from tests.spec.conftest import OfHost, note, summary
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Server

ROOT = Path(__file__).parents[2]
SETTINGS = HostSettings(
    address="192.0.2.1",
    agent_users=("agent",),
    secrets={"/etc/x/secrets/one": "env:X"},
    docker_source="debian",
)
WHERE = "not asked at once: name them in tests/spec/snapshot.py"
# A few round trips are no harm.
ALONE_AT_MOST = 6


# --- the questions are those of the specs ---


def asked_by_the_specs() -> Iterator[tuple[str, ast.Call]]:
    """(module, call) of each question to `reading`."""
    for file in sorted((ROOT / "tests/spec").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "reading"
            ):
                yield file.stem, node


def pattern_of(node: ast.expr) -> re.Pattern[str] | None:
    """What a command's template may look like; None where it is a variable."""
    if isinstance(node, ast.Constant):
        return re.compile(re.escape(str(node.value)))
    if isinstance(node, ast.JoinedStr):
        parts = (re.escape(str(one.value)) if isinstance(one, ast.Constant) else ".+" for one in node.values)
        return re.compile("".join(parts))
    return None


def templates() -> list[str]:
    return [question[0] for question in (*snapshot.QUESTIONS, *users_and_timers())]


def users_and_timers() -> list[snapshot.Question]:
    return [*snapshot._of_users(SETTINGS), *snapshot._of_timers(SETTINGS)]


def test_nearly_every_command_of_the_specs_is_asked_at_once() -> None:
    commands = [
        (module, pattern)
        for module, call in asked_by_the_specs()
        if call.func.attr in ("text", "lines", "json")  # type: ignore[attr-defined]
        and (pattern := pattern_of(call.args[0])) is not None
    ]
    assert len(commands) > 30
    known = templates()
    lacking = {(module, one.pattern) for module, one in commands if not any(map(one.fullmatch, known))}
    assert len(lacking) <= ALONE_AT_MOST, (WHERE, lacking)


def test_nearly_every_fact_of_the_specs_is_asked_at_once() -> None:
    known = {one[0].__name__ for one in snapshot.facts_of(SETTINGS)}
    facts = {
        call.args[0].id
        for _, call in asked_by_the_specs()
        if call.func.attr == "fact" and isinstance(call.args[0], ast.Name)  # type: ignore[attr-defined]
    }
    assert len(facts) > 10
    assert len(facts - known) <= ALONE_AT_MOST // 2, (WHERE, facts - known)


def test_no_question_is_of_no_spec() -> None:
    """What is asked for nothing costs a host its time."""
    patterns = [
        pattern
        for _, call in asked_by_the_specs()
        if call.func.attr in ("text", "lines", "json")  # type: ignore[attr-defined]
        and (pattern := pattern_of(call.args[0])) is not None
    ]
    # `reading.unit` asks this one.
    unit = re.compile(re.escape(snapshot.UNIT))
    unasked = [one for one in templates() if not any(each.fullmatch(one) for each in (*patterns, unit))]
    assert unasked == []


def test_every_line_is_a_command_of_its_own() -> None:
    lines = snapshot.lines(SETTINGS)
    assert len(lines) > 60
    assert all(isinstance(line, str) and line for line in lines)
    # No name of a secret's source, and nothing that is not quoted.
    assert not [line for line in lines if "env:X" in line]


# --- the answers ---


@dataclass
class Here:
    """A session to this machine."""

    ran: list[str] = field(default_factory=list)
    python: bool = True

    def run(self, line: str, *, stdin: bytes | None = None, timeout: float) -> Result:
        self.ran.append(line)
        if not self.python and line.startswith("python3"):
            return Result(127, b"", b"sh: python3: not found\n")
        argv = ["sh", "-c", line]
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    session = Here()
    monkeypatch.setattr(backend, "open_session", lambda name: session)
    yield session
    QuietportBackend.close_all()


LINES = ["echo one", "printf '\\377\\n'; echo two >&2", "cat", "exit 3", "echo one"]


def test_all_is_asked_in_one_round_trip_with_the_same_answers(here: Here) -> None:
    alone = [QuietportBackend("vps1").run(line) for line in LINES]
    QuietportBackend.close_all()
    here.ran.clear()
    host = QuietportBackend("vps1")
    host.ask_all(LINES)
    assert len(here.ran) == 1
    together = [host.run(line) for line in LINES]
    assert [(one.rc, one.stdout_bytes, one.stderr_bytes) for one in together] == [
        (one.rc, one.stdout_bytes, one.stderr_bytes) for one in alone
    ]
    # One that failed is asked again: another might just have held a lock that it wanted.
    assert here.ran[1:] == ["exit 3"]
    assert QuietportBackend.alone == {"vps1": ["exit 3"]}


def test_another_host_has_answers_of_its_own(here: Here) -> None:
    QuietportBackend("vps1").ask_all(LINES)
    QuietportBackend("vps2").run("echo one")
    assert here.ran[1:] == ["echo one"]


def test_a_host_without_python_is_asked_one_by_one(here: Here) -> None:
    here.python = False
    host = QuietportBackend("vps1")
    host.ask_all(LINES)
    assert host.run("echo one").stdout == "one\n"
    assert here.ran[1:] == ["echo one"]


def test_what_takes_too_long_is_left_out(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ONE_OF_ALL_S", 1)
    host = QuietportBackend("vps1")
    host.ask_all(["echo one", "sleep 1.5"])
    assert host.run("echo one").stdout == "one\n"
    assert len(here.ran) == 1
    assert "sleep 1.5" not in QuietportBackend._snapshots["vps1"]


# --- the end of a run ---


def report(outcome: str, when: str) -> pytest.TestReport:
    return pytest.TestReport("tests/spec/test_ssh.py::test_x[vps1]", ("", 0, ""), {}, outcome, None, when)  # type: ignore[arg-type]


def test_a_host_is_summed_up_in_a_line_and_what_does_not_hold_in_one_each() -> None:
    good, bad = OfHost(), OfHost(alone=3)
    for when in ("setup", "call", "teardown"):
        note(good, report("passed", when), "ssh: it holds")
    note(good, report("skipped", "setup"), "ssh: it is not asked")
    note(bad, report("passed", "setup"), "firewall: it is active")
    note(bad, report("failed", "call"), "firewall: it is active")
    note(bad, report("failed", "setup"), "docker: it runs")
    assert list(summary({"vps1": good, "vps2": bad})) == [
        "vps1: 1 hold, 1 not asked of it (0 questions besides the snapshot)",
        "vps2: 2 DO NOT HOLD, 0 hold (3 questions besides the snapshot)",
        "    firewall: it is active",
        "    docker: it runs",
    ]


def test_verify_is_the_specs_by_name() -> None:
    argv = verify.argv(ROOT, ["vps1", "vps2"], junit="report.xml")
    assert argv[0] == "pytest"
    assert argv[-3:] == ["--hosts=vps1,vps2", "--junitxml=report.xml", str(ROOT / "tests/spec")]
    assert not [word for word in verify.argv(ROOT, [], junit=None) if word.startswith(("--hosts", "--junit"))]


@NEEDS_ROOT
def test_a_run_is_grouped_by_host(operator: Operator, server: Server, tmp_path: Path) -> None:
    """This machine is no host of ours, so nearly nothing holds; what is said of that is what counts here."""
    operator.hosts(
        '[defaults]\nuser = "root"\n'
        + "".join(
            f'[hosts.{name}]\naddress = "{address}"\nport = {server.port}\n'
            for name, address in (("one", "127.0.0.1"), ("two", "127.0.0.2"))
        )
    )
    junit = tmp_path / "report.xml"
    argv = [sys.executable, "-P", "-m", *verify.argv(ROOT, ["two", "one"], junit=str(junit))]
    argv[-1] += "/test_guard.py"
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False, cwd="/")
    assert done.returncode == 1, done.stdout + done.stderr
    classes = re.findall(r'<testcase [^>]*classname="([^"]*)"', junit.read_text())
    assert classes == ["two.test_guard"] * 2 + ["one.test_guard"] * 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("two: 2 DO NOT HOLD, 0 hold")], done.stdout
    assert "    guard: no guard is left armed" in lines
