"""`quietport plan` and `drift`: what they say, and their exit codes, against a real sshd."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyinfra.context import ctx_host

from control import plan
from control.plan import Change, HostPlan
from control.reach import remember_tailnet
from control.secret import masked, resolve
from operations import common, notes, proven, units
from operations import guard as guard_operations
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Server, free_port

ROOT = Path(__file__).parents[2]
CHANGE = Change("ufw: as declared", "certain")


# --- exit codes and what is shown ---


@pytest.mark.parametrize(
    ("plans", "code"),
    [
        ([HostPlan("a"), HostPlan("b")], 0),
        ([HostPlan("a", remarks=("a foreign rule",))], 0),
        ([HostPlan("a"), HostPlan("b", (CHANGE,))], 2),
        ([HostPlan("a", (CHANGE,)), HostPlan("b", error="gone")], 1),
        ([HostPlan("a", (CHANGE,), error="would be refused: no")], 1),
        ([], 1),
    ],
)
def test_the_exit_code_says_what_is_pending(plans: list[HostPlan], code: int) -> None:
    assert plan.exit_code(plans) == code


def test_one_row_a_change_with_its_reasons_and_differences() -> None:
    change = Change(
        "ssh: on the tailnet",
        "depends on an earlier change",
        "the join",
        ("sshd listens on 0.0.0.0:22", "ssh.socket is not masked"),
        {"/etc/ssh/x.conf": "--- /dev/null\n+++ /etc/ssh/x.conf\n@@ -0,0 +1 @@\n+Port 22"},
    )
    plans = [HostPlan("vps1", (change, CHANGE), ("left alone: allow 80",)), HostPlan("vps2")]
    assert _plain(plan.rendered(plans, form="plan")).splitlines() == [
        "vps1: 2 changes pending",
        "  [depends on an earlier change: the join] ssh: on the tailnet",
        "      sshd listens on 0.0.0.0:22",
        "      ssh.socket is not masked",
        "    --- /dev/null",
        "    +++ /etc/ssh/x.conf",
        "    @@ -0,0 +1 @@",
        "    +Port 22",
        "  [certain] ufw: as declared",
        "  note: left alone: allow 80",
        "vps2: as declared",
    ]
    assert "+Port 22" not in plan.rendered(plans, form="drift")
    told = json.loads(plan.rendered(plans, form="json"))
    assert (told["schema"], [host["state"] for host in told["hosts"]]) == (
        1,
        ["changes pending", "as declared"],
    )
    assert told["hosts"][0]["changes"][0]["differences"][0]["path"] == "/etc/ssh/x.conf"


def test_an_error_is_told_before_what_would_be_done_until_then() -> None:
    text = _plain(plan.rendered([HostPlan("vps1", (CHANGE,), error="would be refused: no.")], form="drift"))
    assert text.splitlines() == [
        "vps1: error: would be refused: no.; 1 change pending",
        "  [certain] ufw: as declared",
    ]


@pytest.mark.parametrize("form", ["plan", "drift", "json"])
def test_no_line_of_a_secret_is_shown_wherever_it_comes_from(
    form: plan.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QP_PLAN_SECRET", "first-line-of-it\nsecond line of it\n\nshort\n")
    resolve("env:QP_PLAN_SECRET", what="a secret")
    everywhere = "x first-line-of-it y second line of it"
    change = Change(everywhere, "certain", everywhere, (everywhere,), {"/etc/x": f"-{everywhere}\n+z"})
    plans = [HostPlan("vps1", (change,), (everywhere,), everywhere)]
    text = plan.rendered(plans, form=form)
    assert "***" in text
    assert "first-line" not in text
    assert "second line" not in text
    # The positive control: what is no secret stays, a short line of one too.
    assert masked("short first line of it") == "short first line of it"


def test_what_steers_a_terminal_is_not_printed() -> None:
    text = plan.rendered([HostPlan("vps1", remarks=("rule \x1b[2J\x07 there\nagain",))], form="drift")
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "there again" in text


def _plain(text: str) -> str:
    for code in ("\x1b[1m", "\x1b[0m", "\x1b[31m", "\x1b[32m", "\x1b[36m"):
        text = text.replace(code, "")
    return text


# --- what an operation notes ---


class Host:
    """A host whose operation is asked."""

    name = "vps1"
    print_prefix = ""
    current_op_hash = "it"

    def __init__(self, *, executing: bool = False) -> None:
        self.current_op_global_arguments = {"name": "step: it"}
        self.state = type("State", (), {"is_executing": executing, "check_for_changes": True})()
        self.state.config = type("Config", (), {"DIFF": False})()
        self.noops: list[str] = []

    def noop(self, sentence: str) -> None:
        self.noops.append(sentence)


def asked(operation: Any, *args: Any, host: Host | None = None) -> tuple[notes.Note, notes.Notes]:
    collected = notes.collect()
    try:
        with ctx_host.use(host or Host()):
            list(operation(*args))
    finally:
        notes.forget()
    return collected.of.get("vps1", {}).get("it", notes.Note()), collected


def test_every_reason_is_told_though_pyinfra_stops_at_the_first_command() -> None:
    @common.operation()
    def two() -> common.Commands:
        for what in ("one", "two", "one"):
            notes.because(what)
            yield common.program("true")

    collected = notes.collect()
    try:
        with ctx_host.use(Host()):  # type: ignore[arg-type]
            next(iter(two._inner()))
    finally:
        notes.forget()
    note = collected.of["vps1"]["it"]
    assert (note.name, note.reasons) == ("step: it", ["one", "two"])


def test_without_a_plan_an_operation_is_asked_no_further_than_pyinfra_asks() -> None:
    went: list[str] = []

    @common.operation()
    def two() -> common.Commands:
        for what in ("one", "two"):
            went.append(what)
            yield common.program("true")

    with ctx_host.use(Host()):  # type: ignore[arg-type]
        next(iter(two._inner()))
    assert went == ["one"]


def test_a_difference_is_noted_and_cleaned_and_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    def shown() -> common.Commands:
        notes.begin()
        common.show_diff("/etc/x", "a\x1b[2J\n", "b\n")
        yield common.program("true")

    with caplog.at_level(logging.INFO, logger="pyinfra"):
        note, _ = asked(shown)
    assert note.differences == {"/etc/x": "--- /etc/x\n+++ /etc/x\n@@ -1 +1 @@\n-a�[2J\n+b"}
    assert caplog.text == ""


def test_what_is_said_while_it_is_executed_is_no_plan() -> None:
    def said() -> common.Commands:
        notes.begin()
        notes.because("something")
        common.warn("a remark")
        yield common.program("true")

    note, collected = asked(said, host=Host(executing=True))
    assert (note.reasons, collected.remarks) == ([], {})
    note, collected = asked(said)
    assert (note.reasons, collected.remarks) == (["something"], {"vps1": ["a remark"]})


def test_a_drop_in_of_somebody_else_is_named() -> None:
    def looked() -> common.Commands:
        notes.begin()
        state = {
            "drop_ins": [
                "/etc/systemd/system/ssh.service.d/10-quietport.conf",
                "/etc/systemd/system/ssh.service.d/20-hand.conf",
                "/run/systemd/system/service.d/zzz-provider.conf",
            ]
        }
        units.name_others("ssh.service", state)
        units.name_others("ufw.service", {})
        yield from ()

    _, collected = asked(looked)
    assert collected.remarks == {
        "vps1": [
            "ssh.service: /etc/systemd/system/ssh.service.d/20-hand.conf is not ours, and may undo what ours "
            "says (left alone)"
        ]
    }


def test_what_cannot_be_known_is_not_called_less() -> None:
    def said() -> common.Commands:
        notes.begin()
        notes.depends("the join")
        notes.unknown("nobody can tell")
        notes.depends("something else")
        yield common.program("true")

    note, _ = asked(said)
    assert (note.certainty, note.on) == ("cannot be known", "nobody can tell")


def test_a_change_depends_on_an_earlier_one_of_the_same_host_and_plan() -> None:
    def makes() -> common.Commands:
        notes.begin()
        notes.brings("the account agent")
        yield common.program("true")

    def uses() -> common.Commands:
        notes.begin()
        notes.after("the account agent")
        yield common.program("true")

    def both() -> common.Commands:
        yield from makes()
        yield from uses()

    note, _ = asked(both)
    assert (note.certainty, note.on) == ("depends on an earlier change", "the account agent")
    # On its own it is certain, also after another plan; and on another host.
    assert asked(uses)[0].certainty == "certain"

    def elsewhere() -> common.Commands:
        yield from makes()
        another = Host()
        another.name = "vps2"
        with ctx_host.use(another):  # type: ignore[arg-type]
            yield from uses()

    _, collected = asked(elsewhere)
    assert collected.of["vps2"]["it"].certainty == "certain"


def test_the_proof_depends_on_what_it_proves() -> None:
    guard_operations.forget()
    guard_operations.will_be_armed("vps1")
    try:
        note, _ = asked(proven.stays._inner, "root")
    finally:
        guard_operations.forget()
    assert (note.certainty, note.on) == ("depends on an earlier change", "firewall and ssh")


# --- before anything is reached ---


def quietport(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("quietport")
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("verb", ["plan", "drift", "verify"])
def test_an_unknown_host_is_named_with_the_nearest(operator: Operator, verb: str) -> None:
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.1"\n')
    done = quietport(verb, "vsp1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"quietport: {operator.hosts_file}: no host called 'vsp1'. Did you mean vps1?\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["plan", "--jsn"], 1), (["drift", "-x", "a"], 1), (["apply", "-x"], 2)]
)
def test_a_wrong_usage_is_no_drift(arguments: list[str], code: int) -> None:
    done = quietport(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert "usage: quietport" in done.stderr


@pytest.mark.parametrize("verb", ["plan", "drift"])
def test_a_host_that_is_not_there_is_an_error_in_one_line(operator: Operator, verb: str) -> None:
    operator.hosts(f'[hosts.down]\naddress = "127.0.0.1"\nport = {free_port()}\n')
    done = quietport(verb, "down")
    assert done.returncode == 1
    assert _plain(done.stdout).startswith("down: error: cannot connect to 127.0.0.1:")
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


# --- a whole dry run ---

DEPLOY = """
from pyinfra.context import host
from pyinfra.operations import server
from operations import files, notes
from operations.common import Commands, operation, program, refuse, unknown_yet, warn

@operation()
def changing(what) -> Commands:
    notes.because(f"the first thing of {what}")
    yield program("touch", "{touched}")
    notes.because(f"the second thing of {what}")
    yield program("true")

@operation()
def right() -> Commands:
    yield from ()
    host.noop("as declared")

@operation()
def waiting() -> Commands:
    notes.leaves_host()
    notes.because("a lock is held")
    yield program("true")

@operation()
def later() -> Commands:
    notes.because("not there yet")
    notes.depends("the first step")
    yield program("true")

@operation()
def picky() -> Commands:
    yield refuse("no good.")

if host.name == "declared":
    right(name="step: right")
else:
    warn("something foreign is left alone")
    changing(name="step: first" + unknown_yet("the join"), what=host.name)
    waiting(name="step: waits")
    files.put(name="step: a file", path="{file}", content="new\\n")
    later(name="step: later")
    server.shell(name="step: unguarded", commands=["touch {touched}"])
    later(name="step: conditional", _if=lambda: True)
    if host.name == "picky":
        picky(name="step: picky")
        changing(name="step: never", what="never")
"""


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    path = tmp_path / "deploys/some.py"
    path.parent.mkdir()
    (tmp_path / "a-file").write_text("old\n")
    text = DEPLOY.replace("{touched}", str(tmp_path / "touched"))
    path.write_text(text.replace("{file}", str(tmp_path / "a-file")))
    return path


def dry(form: str, deploy: Path, *names: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "control.dryrun", form, str(ROOT / "inventory"), str(deploy), *names]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL, cwd="/"
    )


def several(operator: Operator, **ports: int) -> None:
    addresses = iter(("127.0.0.1", "127.0.0.2", "::1", "localhost"))
    operator.hosts(
        '[defaults]\nuser = "root"\n'
        + "".join(f'[hosts.{n}]\naddress = "{next(addresses)}"\nport = {p}\n' for n, p in ports.items())
    )


@NEEDS_ROOT
def test_a_host_that_is_as_declared_has_nothing_to_report(
    operator: Operator, server: Server, deploy: Path
) -> None:
    several(operator, declared=server.port, changed=server.port)
    done = dry("plan", deploy, "declared")
    assert (done.returncode, _plain(done.stdout), done.stderr) == (0, "declared: as declared\n", "")
    told = json.loads(dry("json", deploy, "declared").stdout)
    assert told["hosts"][0] == {
        "name": "declared",
        "state": "as declared",
        "error": None,
        "remarks": [],
        "changes": [],
    }


@NEEDS_ROOT
def test_each_change_is_a_row_that_says_how_sure_it_is(
    operator: Operator, server: Server, deploy: Path
) -> None:
    several(operator, changed=server.port)
    done = dry("json", deploy)
    assert done.returncode == 2, done.stderr
    (host,) = json.loads(done.stdout)["hosts"]
    rows = [(one["what"], one["certainty"], one["on"]) for one in host["changes"]]
    assert rows == [
        ("step: first", "certain", None),
        ("step: a file", "certain", None),
        ("step: later", "depends on an earlier change", "the first step"),
        ("step: unguarded", "cannot be known", "the operation does not say what it finds"),
        ("step: conditional", "cannot be known", "its condition is read when it is its turn"),
    ]
    assert host["changes"][0]["reasons"] == ["the first thing of changed", "the second thing of changed"]
    file = deploy.parents[1] / "a-file"
    assert host["changes"][1]["reasons"] == [f"{file}: its content differs"]
    assert host["changes"][1]["differences"][0]["text"].splitlines()[-2:] == ["-old", "+new"]
    assert host["remarks"] == ["something foreign is left alone"]
    # It was a dry run.
    assert file.read_text() == "old\n"
    assert not (deploy.parents[1] / "touched").exists()


@NEEDS_ROOT
def test_a_way_that_did_not_answer_is_a_note(operator: Operator, server: Server, deploy: Path) -> None:
    several(operator, declared=server.port)
    remember_tailnet("declared", ["127.0.0.9"])
    done = dry("plan", deploy, "declared")
    state, note = _plain(done.stdout).splitlines()
    assert (done.returncode, state) == (0, "declared: as declared")
    assert note.startswith("  note: cannot connect to 127.0.0.9")
    assert note.endswith("Going on by the public address 127.0.0.1.")


@NEEDS_ROOT
def test_a_reader_that_leaves_early_changes_no_answer(
    operator: Operator, server: Server, deploy: Path
) -> None:
    several(operator, changed=server.port)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        argv = [sys.executable, "-P", "-m", "control.dryrun", "plan", str(ROOT / "inventory"), str(deploy)]
        done = subprocess.run(
            argv, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (2, "")


@NEEDS_ROOT
def test_every_host_is_told_of_and_an_error_counts_most(
    operator: Operator, server: Server, deploy: Path
) -> None:
    several(operator, declared=server.port, changed=server.port, picky=server.port, down=free_port())
    done = dry("drift", deploy)
    assert done.returncode == 1
    lines = [line for line in _plain(done.stdout).splitlines() if not line.startswith(" ")]
    assert lines[:2] == ["declared: as declared", "changed: 5 changes pending"]
    # What comes after a refusal would not be done.
    assert lines[2] == "picky: error: would be refused: no good.; 5 changes pending"
    assert lines[3].startswith("down: error: cannot connect to localhost:")
    assert "+new" not in done.stdout
    assert "Traceback" not in done.stderr


@NEEDS_ROOT
def test_a_mistake_in_the_deploy_is_no_empty_plan(operator: Operator, server: Server, deploy: Path) -> None:
    several(operator, one=server.port)
    deploy.write_text("1 / 0\n")
    done = dry("plan", deploy)
    assert done.returncode == 1
    assert "one: error: the dry run ended before it was through" in _plain(done.stdout)


@NEEDS_ROOT
def test_the_real_deploy_is_planned_to_its_end_without_a_change(
    operator: Operator, server: Server, tmp_path: Path
) -> None:
    """This machine is no host of ours: the plan is refused with the reasons, and that is all it does."""
    operator.hosts(f'[hosts.vps1]\naddress = "127.0.0.1"\nuser = "root"\nport = {server.port}\n')
    done = quietport("plan", "--json", "vps1")
    assert done.returncode == 1, done.stderr
    (host,) = json.loads(done.stdout)["hosts"]
    assert host["state"] == "error"
    assert "it is not on the tailnet, and has no auth_key" in host["error"]
    assert host["changes"] == []
