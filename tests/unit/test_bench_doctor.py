"""The benchmark of the doctor times what it says, and takes no failure for a measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import doctor
from control.session import Result


def test_the_ways_take_turns_and_are_timed() -> None:
    text = doctor.script({"doctor": "sleep 0.05; exit 1", "by hand": "echo 'x y'"}, 3)
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    found = doctor.parse(done.stdout, rounds=3)
    assert list(found) == ["doctor", "by hand"]
    assert min(found["doctor"]) >= 50
    assert all(len(times) == 3 for times in found.values())


@pytest.mark.parametrize("text", ["", "doctor\t0\t1000\n", "doctor\t3\t1000\ndoctor\t3\t1000\n"])
def test_what_is_no_measurement(text: str) -> None:
    with pytest.raises(SystemExit):
        doctor.parse(text, rounds=2)


class Host:
    """A session in which every way takes 12 ms."""

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def run(self, command: str, *, timeout: float) -> Result:
        assert "quietport doctor --json" in command
        return Result(
            0, "".join(f"{name}\t0\t12000\n" for name in doctor.WAYS for _ in range(2)).encode(), b""
        )


def test_it_writes_down_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "open_session", lambda name: Host())
    output = tmp_path / "found.json"
    assert doctor.main(["vps1", "--rounds", "2", "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    assert (document["schema"], document["host"], document["ms"]["doctor"]["median"]) == (1, "vps1", 12)
    assert "| by hand | 12 ms | 12 ms |" in capsys.readouterr().out
