"""The fuzz target of ports, for a moment, and that it finds a parser which breaks a promise."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quietport import ports_cli
from quietport.errors import HostProgramError
from quietport.ss import Listener, parse_ss
from tests.fuzz import ports

PATIENCE_S = 60


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_promise_is_broken(seed: int) -> None:
    tried, data, problem = ports.search(seed, seconds=PATIENCE_S, inputs=400)
    assert (problem, data) == ("", b"")
    assert tried > 100


@pytest.mark.parametrize("file", sorted(ports.SEEDS.glob("*.txt")), ids=lambda file: file.stem)
def test_real_outputs_keep_every_promise(file: Path) -> None:
    ports.one(file.read_bytes())
    assert ports.read(file.read_bytes())


def skips_what_it_does_not_know(text: str) -> list[Listener]:
    lines = [
        line
        for line in text.splitlines(keepends=True)
        if re.match(r"(tcp|udp|LISTEN|UNCONN|Netid|State)", line)
    ]
    return parse_ss("".join(lines) or text)


def stops_at_an_error(text: str) -> list[Listener]:
    try:
        return parse_ss(text)
    except HostProgramError:
        return []


def crashes(text: str) -> list[Listener]:
    text.encode("ascii")
    return parse_ss(text)


def reads_the_first_rows(text: str) -> list[Listener]:
    return parse_ss(text)[:3]


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (skips_what_it_does_not_know, "garbage was passed over"),
        (stops_at_an_error, "quiet host|garbage was passed over"),
        (crashes, "crashed: UnicodeEncodeError"),
        (reads_the_first_rows, "a row was lost"),
    ],
)
def test_a_parser_that_breaks_a_promise_is_found(
    parser: Callable[[str], list[Listener]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports_cli, "parse_ss", parser)
    _, data, problem = ports.search(1, seconds=PATIENCE_S, inputs=400)
    assert re.search(words, problem)
    with pytest.raises(AssertionError, match=words):
        ports.one(data)


def test_what_it_finds_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ports, "OUTPUT", tmp_path / "found")
    assert ports.main(["--seconds", "0.2", "--seed", "5"]) == 0
    monkeypatch.setattr(ports_cli, "parse_ss", stops_at_an_error)
    assert ports.main(["--seconds", "5", "--seed", "5"]) == 1
    assert "--seed 5" in capsys.readouterr().out
    assert (tmp_path / "found/seed-5.txt").is_file()
