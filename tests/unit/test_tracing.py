"""The tracer of the end-to-end tests: strace's lines are read right, and every kind of leak is seen."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.lab.spies import FINE, Spy, turned
from tests.lab.tracing import (
    Call,
    Canary,
    Leak,
    argv_and_environment,
    around,
    calls,
    carried,
    descriptors,
    execs,
    inside,
    leaks,
    paths,
    search_files,
    search_text,
    search_trace,
    strings,
    unescaped,
    untraced,
)

CORE = "0123456789abcdefghijklmnopqrstuv"
KEY = Canary("key", CORE)
NEEDS_STRACE = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("strace") is None, reason="needs root and strace"
)


def call(line: str) -> Call:
    """The one call of a line without process and time."""
    (found,) = calls([f"7 1.5 {line}\n"])
    return found


def of(*lines: str, canaries: tuple[Canary, ...] = (KEY,), folders: tuple[str, ...] = ()) -> list[Leak]:
    """What these lines of one process give away."""
    return leaks(calls(f"7 1.5 {line}\n" for line in lines), canaries, folders=folders)


# What is searched for


@pytest.mark.parametrize("before", ["", "x", "xy", "xyz"])
@pytest.mark.parametrize("after", ["", "/", '"\\'])
def test_no_encoding_hides_a_canary(before: str, after: str) -> None:
    text = before + CORE + after
    data = text.encode()
    for shown in (
        text,
        json.dumps(text),
        shlex.quote(text),
        repr(text),
        urllib.parse.quote(text),
        "".join(f"%{byte:02X}" for byte in data),
        base64.b64encode(data).decode(),
        base64.urlsafe_b64encode(data).decode(),
        data.hex(),
        data.hex().upper(),
    ):
        assert KEY.is_in(shown), shown
        assert KEY.is_in(shown.encode())


def test_a_part_of_it_is_enough_and_another_text_is_not() -> None:
    assert KEY.is_in(f"key {CORE[:16]}... refused")
    assert KEY.is_in(f"ending with {CORE[16:]}")
    assert not KEY.is_in(CORE[::-1])
    assert not Canary("other", secrets.token_hex(16)).is_in(CORE)


def test_a_canary_shows_its_name_alone() -> None:
    assert repr(KEY) == "<key>"
    with pytest.raises(ValueError, match="key"):
        Canary("key", "too-short")


# strace's lines


def test_a_call_that_was_cut_in_two_is_one() -> None:
    lines = [
        '10 1.1 write(3</a>, "one", 3 <unfinished ...>',
        '11 1.2 mkdir("/b", 0700) = 0',
        "10 1.3 <... write resumed>) = 3",
        "12 1.4 <... read resumed>) = 3",
        '13 1.5 execve("/bin/true", ["true"], [] <unfinished ...>',
        "13 1.6 +++ killed by SIGKILL +++",
    ]
    found = list(calls(lines))
    assert [(call.pid, call.name, call.result) for call in found] == [
        (11, "mkdir", "0"),
        (10, "write", "3"),
        (13, "execve", None),
    ]
    assert found[1] == Call(10, 1.1, "write", '3</a>, "one", 3', "3")


def test_strings_are_read_back() -> None:
    assert unescaped(r"a\nb\"c\\d\0e\1234") == 'a\nb"c\\d\0eS4'
    assert unescaped(r"\x63\x61\x6e") == "can"
    assert strings(r'3</p>, "a\"b", [{iov_base="c) = 1", iov_len=2}]') == ['a"b', "c) = 1"]


def test_a_string_in_hex_is_searched_too() -> None:
    hexed = "".join(f"\\x{byte:02x}" for byte in CORE.encode())
    assert of(f'write(1</tmp/x>, "{hexed}", 32) = 32') == [Leak("key", "written", "/tmp/x")]


def test_a_result_is_not_looked_for_in_a_string() -> None:
    found = call(r'openat(AT_FDCWD</root>, "a) = 4", O_RDONLY) = -1 ENOENT (No such file)')
    assert not found.succeeded
    assert paths(found) == ["/root/a) = 4"]


def test_arguments_and_environment_are_told_apart() -> None:
    argv, environment = argv_and_environment(r'"/bin/[", ["[", "a]\"b", "]"], ["A=[1]", "B=\"]"]')
    assert argv == ["[", 'a]"b', "]"]
    assert environment == ["A=[1]", 'B="]']
    assert argv_and_environment('"/bin/x", 0x7ffd, 0x0') == ([], [])


def test_descriptors_have_names() -> None:
    assert descriptors('1</a b\\76c>(deleted), "2</no>", 3<pipe:[9]>, AT_FDCWD</d>') == [
        "/a b>c",
        "pipe:[9]",
        "/d",
    ]
    assert descriptors("4</tmp/x (deleted)>, 1") == ["/tmp/x"]


def test_paths_are_made_whole() -> None:
    assert paths(call('renameat2(AT_FDCWD</w>, "a", 5</v>, "/b/c", 0) = 0')) == ["/w/a", "/b/c"]
    assert paths(call('rename("/a", "b") = 0')) == ["/a", "b"]


# Deciding


def test_where_a_canary_may_be_in_an_exec() -> None:
    assert of(f'execve("/bin/x", ["x", "--key={CORE}"], ["A=b"]) = 0') == [Leak("key", "argv", "/bin/x")]
    assert of(f'execve("/bin/x", ["x"], ["KEY={CORE}"]) = 0') == [Leak("key", "environment", "KEY of /bin/x")]
    assert of('execve("/bin/x", ["x"], ["KEY=b"]) = 0') == []
    # Also one that failed: its arguments were in memory, and of a process that was killed in it.
    assert len(of(f'execve("/bin/x", ["{CORE}"], []) = -1 ENOENT (No such file)')) == 1
    assert len(of(f'execve("/bin/x", ["{CORE}"], [] <unfinished ...>')) == 1


def test_the_operators_own_environment_is_the_first_exec_alone() -> None:
    line = f'7 1.5 execve("/venv/bin/pyinfra", ["pyinfra"], ["KEY={CORE}"]) = 0'
    assert leaks(calls([line]), [KEY], launched="bin/pyinfra") == []
    assert len(leaks(calls([line, line]), [KEY], launched="bin/pyinfra")) == 1
    argument = line.replace('["pyinfra"]', f'["pyinfra", "{CORE}"]')
    assert len(leaks(calls([argument]), [KEY], launched="bin/pyinfra")) == 1


@pytest.mark.parametrize("place", ["pipe:[5]", "socket:[6]", "/dev/null", "/memfd:x"])
def test_what_is_no_file_may_get_it(place: str) -> None:
    assert of(f'write(1<{place}>, "{CORE}", 32) = 32') == []


@pytest.mark.parametrize("place", ["/tmp/x", "/dev/pts/0", "/run/x/key", "/dev/shm/y", "/root/.bash_history"])
def test_a_file_may_not(place: str) -> None:
    assert of(f'write(1<{place}>, "{CORE}", 32) = 32') == [Leak("key", "written", place)]
    assert of(f'writev(1<{place}>, [{{iov_base="a", iov_len=1}}, {{iov_base="{CORE}", iov_len=32}}], 2) = 33')


def test_a_directory_that_was_made_private_protects_what_is_in_it() -> None:
    write = f'write(1</run/join.x/key>, "{CORE}", 32) = 32'
    assert of('mkdir("/run/join.x", 0700) = 0', write) == []
    assert of('mkdirat(AT_FDCWD</run>, "join.x", 0700) = 0', write) == []
    assert of('mkdir("/run/join.x", 0755) = 0', write)
    assert of('mkdir("/run/join.x", 0700) = -1 EEXIST (File exists)', write)
    assert of('mkdir("/run/join.xy", 0700) = 0', write)
    assert of('mkdir("/run/join.x", 0700) = 0', 'chmod("/run/join.x", 0755) = 0', write)
    assert of('mkdir("/run/join.x", 0700) = 0', "fchmod(4</run/join.x>, 01777) = 0", write)
    # A directory of the same name that was made anew.
    assert of('mkdir("/run/join.x", 0700) = 0', 'mkdir("/run/join.x", 0750) = 0', write)


def test_a_relative_name_counts_for_the_folder_that_is_expected() -> None:
    write = f'write(1</etc/app/secrets/.quietport.x>, "{CORE}", 32) = 32'
    made = 'mkdir("secrets", 0700) = 0'
    assert of(made, write, folders=("/etc/app/secrets",)) == []
    assert of(made, write)
    assert of('mkdir("secrets", 0755) = 0', write, folders=("/etc/app/secrets",))
    assert of(write, folders=("/etc/app/secrets",))


def test_what_holds_it_stays_in_there() -> None:
    inside_ = ['mkdir("/p", 0700) = 0', f'write(1</p/key>, "{CORE}", 32) = 32']
    copy = "copy_file_range(3</p/key>, NULL, 4<{}>, NULL, 9, 0) = 9"
    assert of(*inside_, copy.format("/tmp/y")) == [Leak("key", "copied", "/tmp/y")]
    assert of(*inside_, copy.format("/p/other")) == []
    assert of(*inside_, copy.format("/p/o"), "sendfile(1</tmp/z>, 3</p/o>, NULL, 9) = 9") == [
        Leak("key", "copied", "/tmp/z")
    ]
    assert of(*inside_, 'rename("/p/key", "/tmp/y") = 0') == [Leak("key", "moved", "/tmp/y")]
    assert of(*inside_, 'linkat(AT_FDCWD</>, "/p/key", AT_FDCWD</>, "/tmp/y", 0) = 0')
    assert of(*inside_, 'rename("/p", "/tmp/q") = 0') == [Leak("key", "moved", "/tmp/q/key")]
    assert of(*inside_, 'rename("/p/key", "/tmp/y") = -1 EACCES (Permission denied)') == []
    assert of(*inside_, 'rename("/p/else", "/tmp/y") = 0') == []


def test_a_file_may_not_have_its_name() -> None:
    assert of(f'openat(AT_FDCWD</>, "/tmp/{CORE}", O_RDONLY) = -1 ENOENT (No such file)')[0].how == "named"
    assert of(f'symlink("{CORE}", "/p") = 0')[0].how == "named"


# The real thing


def test_a_spy_says_nothing_of_what_it_leaks() -> None:
    spy = Spy.in_folder("/tmp/x", who="spy")
    assert turned(turned("abc-129")) == "abc-129"
    assert "@" not in spy.text
    assert search_text("its text", spy.text, spy.canaries) == []
    assert search_text("its text", turned(spy.text), spy.canaries), "the positive control"


@NEEDS_STRACE
def test_around_a_command_every_kind_of_leak_is_seen(tmp_path: Path) -> None:
    spy = Spy.in_folder(f"{tmp_path}/spy", who="spy")
    trace = tmp_path / "trace"
    argv = [*around(trace), "sh", "-c", f"{spy.text}\necho $$; exit 3"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    found = search_trace([trace], spy.canaries)
    assert spy.unseen(found) == []
    assert spy.leaks[FINE].name not in {leak.canary for leak in found}
    assert carried([trace], spy.canaries) == {canary.name for canary in spy.canaries}
    assert carried([trace], [KEY]) == set()
    assert execs([trace]) > 10
    assert not (tmp_path / "spy").exists()


@NEEDS_STRACE
def test_what_is_killed_is_traced_until_then(tmp_path: Path) -> None:
    spy = Spy.in_folder(f"{tmp_path}/spy", who="spy")
    argv = [*around(tmp_path / "trace"), "sh", "-c", f"{spy.text}\necho ready; exec sleep 300"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # The command itself is our child, and not strace.
    process.kill()
    assert process.wait(10) == -9
    assert process.stdout.read() == "", "it ends when the trace is whole"
    assert spy.unseen(search_trace([tmp_path / "trace"], spy.canaries)) == []


@contextmanager
def namespace(*argv: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A command that is the first process of a PID namespace, and its process id out here."""
    unshare = ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--"]
    process = subprocess.Popen([*unshare, *argv], stdin=PIPE, stdout=PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, int(children[0])
    finally:
        process.kill()
        process.communicate()


# A process with a second thread, which is the one that starts programs, and one beside it.
THREADS = """
import subprocess, sys, threading
beside = subprocess.Popen(["sleep", "300"])
def work():
    for line in sys.stdin:
        print(subprocess.run(["sh", "-c", sys.argv[1]]).returncode, flush=True)
thread = threading.Thread(target=work)
thread.start()
print("ready", flush=True)
thread.join()
"""


@NEEDS_STRACE
def test_inside_a_namespace_every_kind_of_leak_is_seen(tmp_path: Path) -> None:
    spy = Spy.in_folder(f"{tmp_path}/spy", who="spy")
    with namespace(sys.executable, "-c", THREADS, spy.text) as (process, init):
        assert process.stdin is not None
        assert process.stdout is not None
        with inside(init, tmp_path / "trace") as files:
            assert untraced(init) == set()
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"
        assert len(untraced(init)) == 2, "strace has let go"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n", "and all goes on"
    found = search_trace(files, spy.canaries)
    assert spy.unseen(found) == []
    assert spy.leaks[FINE].name not in {leak.canary for leak in found}


def test_files_that_were_left_behind(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name, data in {
        "log/plain": CORE.encode(),
        "binary": b"\0\xff" + CORE.encode() + b"\0",
        "encoded": base64.b64encode(b"xx" + CORE.encode()),
        "half": CORE[:16].encode(),
        "else": b"nothing",
        "allowed": CORE.encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = search_files([tmp_path], [KEY, Canary("other", "x" * 24)], allowed=[tmp_path / "allowed"])
    names = {leak.where.removeprefix(f"{tmp_path}/") for leak in found}
    assert names == {"log/plain", "binary", "encoded", "half"}
    assert {(leak.canary, leak.how) for leak in found} == {("key", "kept")}
    with pytest.raises(ValueError, match="nothing to search"):
        search_files([tmp_path / "absent"], [KEY])


def test_what_was_said() -> None:
    assert search_text("the plan", f"x {CORE} y", [KEY]) == [Leak("key", "said", "the plan")]
    assert search_text("the plan", "x", [KEY]) == []
