"""The host programs as one file: same source, same bytes, and it runs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import quietport
from control.zipapp import build

PACKAGE = Path(quietport.__file__).parent


def test_bytes_depend_on_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()
    copy = tmp_path / "elsewhere" / "quietport"
    copy.mkdir(parents=True)
    # Another order of creation, other times, modes and umask, leftovers of a run, another directory.
    previous = os.umask(0o077)
    try:
        for path in sorted(PACKAGE.rglob("*.py"), reverse=True):
            target = copy / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (1, 1))
            target.chmod(0o700)
        (copy / "__pycache__").mkdir()
        (copy / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"x")
        (copy / "notes.txt").write_text("not a program")
        monkeypatch.chdir(tmp_path)
        assert build(copy) == first
    finally:
        os.umask(previous)


def test_bytes_change_with_the_source(tmp_path: Path) -> None:
    copy = tmp_path / "quietport"
    shutil.copytree(PACKAGE, copy)
    with (copy / "errors.py").open("a") as stream:
        stream.write("\n")
    assert build(copy) != build()


def test_bytes_are_the_same_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    assert build() == first


def test_it_holds_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(build())) as archive:
        names = archive.namelist()
    assert names[0] == "__main__.py"
    assert {name.partition("/")[0] for name in names[1:]} == {"quietport"}
    assert all(name.endswith(".py") for name in names)


def test_a_directory_that_is_not_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build(tmp_path)


@pytest.mark.parametrize(
    "program", ["ports", "doctor", "report", "sshd-wait", "sshd-apply", "sshd-follow", "guard", "docker-user"]
)
def test_every_program_runs_from_it_in_isolation(program: str, tmp_path: Path) -> None:
    """`python3 -I` in an empty directory: a module outside the standard library would not be found."""
    file = tmp_path / "quietport.pyz"
    file.write_bytes(build())
    python = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [python, "-I", str(file), program, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode in (0, 2)
    assert f"usage: quietport {program}" in done.stdout + done.stderr


def test_it_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "quietport.pyz"
    file.write_bytes(build())
    done = subprocess.run(
        [sys.executable, "-I", str(file), "--version"], capture_output=True, text=True, check=True
    )
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert done.stdout == f"quietport {project['version']}\n"
