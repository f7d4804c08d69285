"""The benchmark of agent access measures what it says, and its table is made of its document."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bench import agent_access


def test_it_measures_and_writes_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    python = getattr(sys, "_base_executable", sys.executable)
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n")
    words = ["--rounds", "2", "--sessions", "5", "--python", python, "--output", str(output)]
    words += ["--append", str(page)]
    assert agent_access.main(words) == 0
    document = json.loads(output.read_text())
    assert (document["schema"], document["rounds"], document["list"]["sessions"]) == (1, 2, 5)
    assert all(document["start_ms"][name]["median"] > 0 for name in ("bare", "session"))
    shown = capsys.readouterr().out
    assert f"| overhead | {document['start_ms']['overhead']['median']} ms |" in shown
    assert page.read_text().startswith("# Benchmarks\n\n## A session") and shown.strip() in page.read_text()


def test_a_start_that_fails_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="exit code 3: no"):
        agent_access.start_ms(["sh", "-c", "echo no >&2; exit 3"], os.environ)
    with pytest.raises(SystemExit, match="failed"):
        agent_access.start_ms(["sh", "-c", "echo other"], os.environ)
    assert agent_access.start_ms(["sh", "-c", "echo x"], os.environ) > 0
