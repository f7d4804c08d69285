"""The benchmark of ports measures what it says, and its table is made of its document."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import ports
from quietport.ss import parse_ss


def test_it_measures_and_writes_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    python = getattr(sys, "_base_executable", sys.executable)
    words = ["--rounds", "2", "--sockets", "12", "--python", python, "--output", str(output)]
    assert ports.main(words) == 0
    document = json.loads(output.read_text())
    assert (document["schema"], document["rounds"], document["sockets"]) == (1, 2, 12)
    assert set(document["ms"]) == {"split", "parse", "judge", "program"}
    assert document["ms"]["program"]["median"] > 0
    assert f"| program | {document['ms']['program']['median']:g} ms |" in capsys.readouterr().out


def test_both_ways_read_the_same_sockets() -> None:
    text = ports.text_of_sockets(70_000)
    assert [(protocol, port) for protocol, _, port, _ in ports.split(text)] == [
        (one.protocol, one.port) for one in parse_ss(text)
    ]


def test_a_way_that_misses_sockets_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="found 3 sockets, not 4"):
        ports.cpu_ms(ports.parse, ports.text_of_sockets(3), 4)
    with pytest.raises(SystemExit, match="exit code 3: no"):
        ports.program_ms(["sh", "-c", "echo no >&2; exit 3"], 1)
    with pytest.raises(SystemExit, match="found 0 sockets, not 1"):
        ports.program_ms(["echo", '{"listeners": []}'], 1)
