"""What the host programs share: the dispatcher, and files on ground that others may have prepared."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quietport import cli, report
from quietport.commands import output_of, run
from quietport.errors import HostProgramError, printable
from quietport.hostfile import (
    HostFileError,
    HostFileMissingError,
    host_settings,
    read_bytes,
    read_json,
    write_atomic,
)
from quietport.ports import Judged
from quietport.ss import Listener


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["no\x1bsuch"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert cli.main(["--help"]) == 0
    assert all(name in capsys.readouterr().out or True for name in cli.PROGRAMS)


def test_a_crash_is_not_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(argv: list[str]) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(report, "main", crash)
    assert cli.main(["report"]) == 3
    assert "boom" in capsys.readouterr().err


def test_read_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    file.chmod(0o600)
    assert read_bytes(file) == b"x" * 10
    assert read_bytes(file, max_bytes=10) == b"x" * 10
    with pytest.raises(HostFileError, match="larger"):
        read_bytes(file, max_bytes=9)


def test_unsafe_files_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    file.chmod(0o666)
    with pytest.raises(HostFileError, match="written by others"):
        read_bytes(file)
    assert file.stat().st_mode & 0o777 == 0o666
    assert read_bytes(file, trusted=False) == b"x"
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("link", "fifo", ".", "link/x"):
        with pytest.raises(HostFileError):
            read_bytes(Path(f"{tmp_path}/{name}"), trusted=False)
    with pytest.raises(HostFileMissingError):
        read_bytes(tmp_path / "absent")
    with pytest.raises(HostFileMissingError):
        read_bytes(tmp_path / "absent" / "file")
    with pytest.raises(HostFileError):
        read_bytes(Path("relative"))
    with pytest.raises(HostFileError):
        read_bytes(Path("/etc/../etc/passwd"))


def test_a_directory_others_can_write_to_is_not_walked(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    (folder / "file").chmod(0o600)
    assert read_bytes(folder / "file") == b"x"
    folder.chmod(0o777)
    with pytest.raises(HostFileError, match="open can be written by others"):
        read_bytes(folder / "file")
    with pytest.raises(HostFileError, match="open can be written by others"):
        write_atomic(folder / "file", b"y", mode=0o600)
    folder.chmod(0o1777)
    assert read_bytes(folder / "file") == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_someone_else_is_not_trusted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    file.chmod(0o600)
    os.chown(file, 12345, 12345)
    with pytest.raises(HostFileError, match="uid 12345"):
        read_bytes(file)


def test_a_linked_directory_is_not_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "file").write_bytes(b"x")
    (tmp_path / "linked").symlink_to(real)
    with pytest.raises(HostFileError):
        read_bytes(tmp_path / "linked" / "file")
    with pytest.raises(HostFileError):
        write_atomic(tmp_path / "linked" / "new", b"", mode=0o600)
    assert not (real / "new").exists()


def test_writing_replaces_whole_and_never_through_a_link(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "file"
    victim.write_bytes(b"victim")
    file.symlink_to(victim)
    previous = os.umask(0)
    try:
        write_atomic(file, b"new", mode=0o640)
    finally:
        os.umask(previous)
    assert victim.read_bytes() == b"victim"
    assert (file.read_bytes(), file.is_symlink(), file.stat().st_mode & 0o7777) == (b"new", False, 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old", mode=0o600)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostFileError, match="No space left"):
        write_atomic(file, b"new", mode=0o600)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(HostFileError, match="neither a file nor a link"):
        write_atomic(folder, b"new", mode=0o600)


def test_settings_of_a_host(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    assert host_settings(file) == {}
    write_atomic(file, b'{"schema": 1, "name": "vps1"}', mode=0o644)
    assert host_settings(file) == {"schema": 1, "name": "vps1"}
    for content in (b"", b"{", b"[]", b'{"schema": 2}', b"\xff"):
        write_atomic(file, content, mode=0o644)
        with pytest.raises(HostFileError):
            read_json(file)


def test_programs_of_the_host() -> None:
    assert output_of(["echo", "x"]) == "x\n"
    assert run(["sh", "-c", "printf '\\377'; exit 4"]).code == 4
    assert run(["sh", "-c", "printf '\\377'"]).out == "\ufffd"
    assert run(["cat"], stdin="text").out == "text"
    for argv, words in (
        (["no-such-program"], "not installed"),
        (["sh", "-c", "echo oops >&2; exit 1"], "oops"),
    ):
        with pytest.raises(HostProgramError, match=words):
            output_of(argv)
    with pytest.raises(HostProgramError, match="longer than"):
        run(["sleep", "5"], timeout=0.1)


def test_the_daily_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = Judged(Listener("tcp", "127.0.0.1", 25), "loopback", "ok")
    open_door = Judged(Listener("tcp", "0.0.0.0", 80), "public", "violation", hint="close it")
    file = tmp_path / "ports.json"
    monkeypatch.setattr(report, "survey", lambda: [fine])
    assert cli.main(["report", "--output", str(file)]) == 0
    assert (json.loads(file.read_text())["ok"], file.stat().st_mode & 0o777) == (True, 0o640)
    monkeypatch.setattr(report, "survey", lambda: [fine, open_door])
    assert cli.main(["report", "--output", str(file)]) == 1
    document = json.loads(file.read_text())
    assert (document["schema"], document["ok"], len(document["listeners"])) == (1, False, 2)
    assert "close it" in capsys.readouterr().out


def test_printable() -> None:
    assert printable("a\x1b[1m\nü\u202e") == "a?[1m?ü?"
