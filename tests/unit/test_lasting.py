"""Work that goes on to its end: Ctrl-C is told so, and shows no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietport import cli, lasting

WORK = """
import sys, time
from pathlib import Path
from quietport import cli, lasting

place = Path(sys.argv[1])

def work():
    (place / "begun").touch()
    while not (place / "go").exists():
        time.sleep(0.01)
    (place / "done").touch()
    return 7

class Program:
    @staticmethod
    def main(argv):
        return lasting.to_the_end(work, crashed=print)

cli.importlib.import_module = lambda name: Program
sys.exit(cli.main(["open"]))
"""


def begun(place: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(place)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for(place / "begun")
    return process


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def interrupt(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGINT)


def test_an_interrupt_waits_for_the_end_and_says_so(tmp_path: Path) -> None:
    with begun(tmp_path) as process:
        interrupt(process)
        assert process.stderr is not None
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("What was begun goes on to its end.")
        (tmp_path / "go").touch()
        assert process.wait(30) == 7
        assert process.stderr.read() == ""
    assert (tmp_path / "done").exists()


def test_the_second_one_does_not_wait_and_the_work_goes_on(tmp_path: Path) -> None:
    with begun(tmp_path) as process:
        interrupt(process)
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.readline()
        interrupt(process)
        assert process.wait(30) == 130
        (tmp_path / "go").touch()
        assert process.stderr.read() == "quietport open: interrupted.\n"
    wait_for(tmp_path / "done")


def test_without_an_interrupt_it_is_the_works_own_code(tmp_path: Path) -> None:
    assert lasting.to_the_end(lambda: 7, crashed=print) == 7


def test_an_interrupted_program_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Program:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr("quietport.cli.importlib.import_module", lambda name: Program)
    assert cli.main(["guard"]) == 130
    assert capsys.readouterr().err == "quietport guard: interrupted.\n"
