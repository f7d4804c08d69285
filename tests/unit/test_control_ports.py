"""`quietport ports` on the operator's side: each host by its own word, and a silent one is no quiet one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from control import asking, cli, ports
from control.errors import ReachError
from control.session import Result
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Server

LISTENER = {
    "protocol": "tcp",
    "address": "0.0.0.0",
    "port": 80,
    "process": "nginx\x1b[2J",
    "pid": 7,
    "unit": "nginx.service",
    "exposure": "public",
    "verdict": "violation",
    "hint": "Bind it to 127.0.0.1.",
}
OK = {**LISTENER, "address": "127.0.0.1", "exposure": "loopback", "verdict": "ok", "hint": ""}


def printed(*listeners: dict[str, Any], code: int | None = None, **changes: Any) -> Result:
    ok = all(one["verdict"] != "violation" for one in listeners)
    document = {"schema": 1, "ok": ok, "listeners": listeners, **changes}
    return Result(int(not ok) if code is None else code, json.dumps(document).encode(), b"")


FINE = printed(OK)
BAD = printed(LISTENER, OK)


class Opened:
    """A session whose only command has one answer."""

    def __init__(self, name: str, result: Result | Exception) -> None:
        self.name = name
        self.result = result
        self.asked: list[str] = []

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, command: str, *, timeout: float) -> Result:
        assert timeout == asking.ANSWER_S
        self.asked.append(command)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command line against hosts that answer so."""

    def run(answers: dict[str, Result | Exception], *arguments: str) -> tuple[int, str]:
        text = "".join(f'[hosts.{name}]\naddress = "{name}.example.org"\n' for name in answers)
        operator.hosts(text)
        monkeypatch.setattr(ports, "open_session", lambda name: Opened(name, answers[name]))
        code = cli.main(["ports", *arguments])
        return code, capsys.readouterr().out

    return run


def test_every_host_is_shown(ask: Ask) -> None:
    code, out = ask({"a": FINE, "b": BAD})
    assert code == 1
    assert "a: fine\n" in out
    assert "b: something is public that may not be\n" in out
    assert "tcp 0.0.0.0:80: Bind it to 127.0.0.1." in out
    assert "\x1b" not in out


def test_only_those_that_are_named_are_asked(ask: Ask) -> None:
    code, out = ask({"a": FINE, "b": BAD}, "a")
    assert (code, "b:" in out) == (0, False)
    assert ask({"a": FINE, "b": BAD}, "a", "c") == (1, "")


def test_json(ask: Ask) -> None:
    code, out = ask({"a": FINE, "b": ReachError("b: nobody answers.", hint="Look.")}, "--json")
    assert code == 1
    document = json.loads(out)
    assert (document["schema"], document["ok"]) == (1, False)
    assert document["hosts"]["a"] == {"report": json.loads(FINE.stdout), "error": ""}
    assert document["hosts"]["b"] == {"report": None, "error": "nobody answers. Look."}
    assert json.loads(ask({"a": FINE}, "--json")[1])["ok"] is True


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ReachError("a: nobody answers."), "a: nobody answers."),
        (TimeoutError("a: a command took longer than 60 s"), "took longer"),
        (Result(127, b"", b"sh: not found"), "Converge it: `quietport apply a`"),
        (Result(2, b"", b"quietport: no program called 'ports'."), "another version. Converge it: "),
        (Result(3, b"", b"quietport ports: ss is not installed."), "could not tell: quietport ports: ss is"),
        (Result(-1, b"", b""), "could not tell: it said nothing"),
        (Result(0, b"", b""), "not understood"),
        (Result(0, b"[]", b""), "not understood"),
        (printed(OK, schema=2), "not understood"),
        (printed(OK, listeners=None), "not understood"),
        (printed(OK, listeners=["x"]), "not understood"),
        (printed(OK, ok="yes"), "not understood"),
        (printed(OK, code=1), "not understood"),
        (printed(LISTENER, code=0), "not understood"),
        (printed(LISTENER, code=3), "not understood"),
        (Result(0, b"[" * 100_000, b""), "not understood"),
    ],
)
def test_what_is_not_an_answer_is_never_fine(answer: Result | Exception, words: str, ask: Ask) -> None:
    code, out = ask({"a": answer})
    assert code == 1
    assert words in out


def test_a_listener_of_another_version_is_shown_as_far_as_it_goes(ask: Ask) -> None:
    code, out = ask({"a": printed({"verdict": "ok", "exposure": "elsewhere", "port": None})})
    assert code == 0
    assert "elsewhere" in out


@NEEDS_ROOT
def test_over_a_real_connection(
    operator: Operator,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "quiet port"
    monkeypatch.setattr(asking, "LAUNCHER", str(program))
    operator.host(port=server.port)
    assert cli.main(["ports"]) == 1
    assert "vps1: it has no quietport program yet." in capsys.readouterr().out
    program.write_text(f"#!/bin/sh\ntest \"$*\" = 'ports --json' && echo '{BAD.stdout.decode()}'; exit 1\n")
    program.chmod(0o755)
    assert cli.main(["ports", "vps1"]) == 1
    assert "tcp 0.0.0.0:80: Bind it to 127.0.0.1." in capsys.readouterr().out
    server.stop()
    assert cli.main(["ports"]) == 1
    assert "EXPOSURE" not in capsys.readouterr().out
