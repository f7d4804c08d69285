"""The lock of everything that changes how the host is reached: one at a time, and never on open ground."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quietport.errors import HostProgramError
from quietport.guardlock import hold


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quietport/guard.lock"


def test_one_at_a_time(path: Path) -> None:
    with hold(timeout=0, path=path):
        with pytest.raises(HostProgramError, match="is held after 0 s"), hold(timeout=0, path=path):
            pass
        assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    with hold(timeout=0, path=path):
        pass


def test_it_is_waited_for(path: Path) -> None:
    order = []
    began = threading.Event()

    def other() -> None:
        with hold(timeout=0, path=path):
            began.set()
            time.sleep(0.3)
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(10)
    with hold(timeout=10, path=path):
        order.append("this")
    thread.join()
    assert order == ["other", "this"]


def test_what_is_handed_on_still_holds_it(path: Path) -> None:
    """A step whose parent is gone: the rollback must not come in between."""
    with hold(timeout=0, path=path) as descriptor:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with pytest.raises(HostProgramError), hold(timeout=0, path=path):
        pass
    child.communicate()
    with hold(timeout=0, path=path):
        pass


def test_a_child_that_it_is_not_handed_to_does_not_hold_it(path: Path) -> None:
    with hold(timeout=0, path=path):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    with hold(timeout=0, path=path):
        pass
    child.communicate()


def test_a_killed_holder_holds_nothing(path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from quietport.guardlock import hold\n"
        "with hold(timeout=0, path=Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=root) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(HostProgramError), hold(timeout=0, path=path):
            pass
        holder.kill()
    with hold(timeout=1, path=path):
        pass


def test_only_the_holder_has_it_open(path: Path) -> None:
    """By that a rollback finds whom to kill."""

    def opened() -> list[str]:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [str(link) for link in links if os.path.realpath(link) == str(path)]

    with hold(timeout=0, path=path):
        assert len(opened()) == 1
        with pytest.raises(HostProgramError), hold(timeout=0.3, path=path):
            pass
        assert len(opened()) == 1
    assert opened() == []


def test_a_file_that_was_removed_is_not_the_lock(path: Path) -> None:
    with hold(timeout=0, path=path):
        path.unlink()
        with hold(timeout=0, path=path), pytest.raises(HostProgramError), hold(timeout=0, path=path):
            pass


@pytest.mark.parametrize("kind", ["open", "link", "file", "lock is a link"])
def test_ground_that_others_may_have_prepared_is_refused(path: Path, kind: str, tmp_path: Path) -> None:
    if kind == "open":
        path.parent.mkdir()
        path.parent.chmod(0o755)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.parent.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.parent.write_text("")
    else:
        path.parent.mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostProgramError), hold(timeout=0, path=path):
        pass
    assert not (tmp_path / "elsewhere").is_file()
