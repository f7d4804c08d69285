"""The command that writes a file, run by a real shell."""

from __future__ import annotations

import getpass
import grp
import os
import subprocess
from pathlib import Path

from operations.files import write

OLD = "the old content\n"


def put(path: Path, content: str, *, sent: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = write(
        str(path), content, mode="0640", user=getpass.getuser(), group=grp.getgrgid(os.getgid()).gr_name
    )
    data = content.encode() if sent is None else sent
    return subprocess.run(["sh", "-c", command.get_raw_value()], input=data, capture_output=True, check=False)


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text(OLD)
    assert put(file, "new\n").returncode == 0
    assert (file.read_text(), file.stat().st_mode & 0o7777) == ("new\n", 0o640)
    assert list(tmp_path.iterdir()) == [file]


def test_an_upload_that_was_cut_off_changes_nothing(tmp_path: Path) -> None:
    """A link that is cut looks to the host like the end of the input."""
    file = tmp_path / "file"
    file.write_text(OLD)
    done = put(file, "all of it\n", sent=b"all o")
    assert done.returncode == 1
    assert b"cut off" in done.stderr
    assert file.read_text() == OLD
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_reboot_left_behind_goes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    left, other = tmp_path / ".quietport.AbCdEf0123", tmp_path / ".quietport.conf"
    left.write_text("half a sec")
    other.write_text("not a temporary file of ours")
    assert put(file, "new\n").returncode == 0
    assert sorted(tmp_path.iterdir()) == sorted([file, other])
