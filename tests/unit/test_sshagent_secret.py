"""The private key is nowhere but in ssh-agent: no argument, environment, file, output, memory or dump."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quietport.sshagent.key import checked
from quietport.sshagent.names import AgentAccessError
from tests.unit.sshagent_world import PATIENCE_S, VARIABLE, World, make_key, script, short_folder, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look into a process that hides itself")


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = short_folder(tmp_path_factory)
    return World(folder, make_key(folder / "canary-key"))


@pytest.fixture(name="canaries")
def _canaries(world: World) -> list[bytes]:
    """Pieces of the key, none of which may be found; the public half has none of them."""
    lines = world.key.read_bytes().splitlines()[1:-1]
    # The beginning of the format and the public key come first: what is secret is in the later lines.
    return [line[:40] for line in lines[2:]]


def holds(data: bytes, canaries: list[bytes]) -> bool:
    return any(canary in data for canary in canaries)


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def names_of(pid: int) -> list[str]:
    """The names of a process and all below it."""
    return [Path(f"/proc/{one}/comm").read_text().strip() for one in family(pid)]


def memory(pid: int) -> bytes:
    """All writable memory of a process. A kernel may refuse single areas."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", 0) as stream:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if match is None or line.endswith("[vvar]"):
                continue
            begin, end = int(match[1], 16), int(match[2], 16)
            with contextlib.suppress(OSError, OverflowError, ValueError):
                stream.seek(begin)
                found.append(stream.read(end - begin) or b"")
    return b"\0".join(found)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(place): place.read_bytes()
        for place in folder.rglob("*")
        if place.is_file() and "canary-key" not in place.name and not place.is_symlink()
    }


@AS_ROOT
def test_no_process_of_a_session_has_the_key(world: World, canaries: list[bytes]) -> None:
    process = world.start("--", "sh", "-c", "read go; ssh-add -l", stdin=subprocess.PIPE)
    control = subprocess.Popen(["sleep", "60"], env=world.env())
    try:
        wait_until(lambda: "key_loaded" in world.events())
        wait_until(lambda: "sh" in names_of(process.pid))
        pids = list(family(process.pid))
        names = names_of(process.pid)
        assert "ssh-agent" in names
        assert len(pids) >= 5  # wrapper, watch, keeper, agent, witness, command
        for pid in pids:
            folder = Path(f"/proc/{pid}")
            assert not holds((folder / "cmdline").read_bytes(), canaries)
            assert not holds((folder / "environ").read_bytes(), canaries)
            assert VARIABLE.encode() not in (folder / "environ").read_bytes()
            assert not holds(memory(pid), canaries), names
            limits = (folder / "limits").read_text()
            if "python" in (folder / "exe").readlink().name:
                assert re.search(r"Max core file size +[01] ", limits)
        # The same looks find it where it is.
        wait_until(lambda: b"sleep" in Path(f"/proc/{control.pid}/comm").read_bytes())
        assert holds(Path(f"/proc/{control.pid}/environ").read_bytes(), canaries)
        assert holds(memory(control.pid), canaries)
    finally:
        control.kill()
        control.wait()
        out, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert "canary (ED25519)" in out
    for place, data in files_in(world.root).items():
        assert not holds(data, canaries), place
    assert not holds((out + err).encode(), canaries)


SPY = """
{{ tr '\\0' '\\n' </proc/$$/environ; tr '\\0' ' ' </proc/$$/cmdline; cat /proc/$$/limits; }} >>{seen}
exec {real} "$@"
"""


def test_what_the_programs_of_openssh_are_given(world: World, canaries: list[bytes]) -> None:
    seen = world.folder / "seen"
    for name in ("ssh-agent", "ssh-add"):
        text = SPY.format(seen=seen, real=f"/usr/bin/{name}")
        world.path = [script(world.folder / "bin", name, text).parent]
    done = world.run("--", "env")
    assert done.returncode == 0
    assert VARIABLE not in done.stdout
    text = seen.read_text()
    assert VARIABLE not in text
    assert not holds(text.encode(), canaries)
    assert re.search(r"ssh-add -t 1800 -", text)
    assert text.count("Max core file size        1 ") + text.count("Max core file size        0 ") == 2
    assert "SSH_AUTH_SOCK=" in text  # the spy saw environments


LEAK = "cat > {folder}/leak; cat {folder}/leak; cat {folder}/leak >&2; rm {folder}/leak; {end}"


@pytest.mark.parametrize("end", ["exit 1", "exit 0", "kill -SEGV $$", "echo invalid format >&2; exit 1"])
def test_a_program_that_repeats_the_key_is_not_repeated(
    world: World, canaries: list[bytes], end: str
) -> None:
    place = script(world.folder / "bin", "ssh-add", LEAK.format(folder=world.folder, end=end))
    with world.key.open("rb") as stream:  # the positive control: this ssh-add does leak
        told = subprocess.run([str(place)], stdin=stream, capture_output=True, check=False)
    assert holds(told.stdout, canaries)
    assert holds(told.stderr, canaries)
    world.path.append(place.parent)
    done = world.run("--", "true")
    assert done.returncode == (0 if end == "exit 0" else 125)
    assert not holds((done.stdout + done.stderr).encode(), canaries)
    for file, data in files_in(world.root).items():
        assert not holds(data, canaries), file


def test_no_error_repeats_what_it_was_given(world: World, canaries: list[bytes]) -> None:
    text = world.key.read_text()
    lines = text.splitlines()
    locked = make_key(world.folder / "canary-key-locked", passphrase="x").read_text()
    bad = [text.replace("BEGIN", "BEGUN"), "\n".join(lines[:-1]), "\n".join([*lines[:2], *lines[3:]]), locked,
           text.replace("=", "%"), text + "trailing", text * 60]  # fmt: skip
    looked_for = [*canaries, *(line[:40].encode() for line in locked.splitlines()[3:-1])]
    for value in bad:
        done = world.run("--", "true", env=world.env(**{VARIABLE: value}))
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert not holds((done.stdout + done.stderr).encode(), looked_for)
    done = world.run("--", "true", env=world.env(**{VARIABLE: text}))
    assert done.returncode == 0
    # Given in the wrong place: an argument is not repeated either.
    for words in ((f"--key-env={text}", "--", "true"), ("--key-fd", text, "--", "true")):
        done = world.run(*words)
        assert done.returncode == 2
        assert not holds((done.stdout + done.stderr).encode(), looked_for)
    for file, data in files_in(world.root).items():
        assert not holds(data, looked_for), file


def test_the_key_variable_goes_also_when_the_key_came_otherwise(world: World) -> None:
    code = "tr '\\0' '\\n' </proc/$PPID/environ; env; echo; cd /proc/$$/fd; echo *"
    with world.key.open("rb") as stream:
        number = stream.fileno()
        done = world.run("--key-fd", str(number), "--", "sh", "-c", code, pass_fds=[number])
    assert done.returncode == 0
    assert "CODEX_OPENCLAW_SSH_AGENT_SESSION" in done.stdout
    assert VARIABLE not in done.stdout
    bare = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == bare.stdout.splitlines()[-1]


def test_the_command_and_its_arguments_are_in_no_file(world: World) -> None:
    words = ("canary-of-an-argument", "second-canary")
    process = world.start("--", "sh", "-c", "read go; exit 3", *words, stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    wait_until(lambda: "sh" in names_of(process.pid))
    shown = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(process.pid))
    while_it_runs = files_in(world.root)
    process.communicate("go\n", timeout=PATIENCE_S)
    assert world.run("--prune", "--dry-run").returncode == 0
    assert world.events() == ["created", "key_loaded", "stopped"]  # files were written
    for word in words:
        assert word.encode() in shown  # the positive control: it is an argument
        for found in (while_it_runs, files_in(world.root)):
            assert len(found) >= 3
            assert not any(word.encode() in data for data in found.values())


def test_no_core_is_dumped(world: World, canaries: list[bytes]) -> None:
    folder = world.folder / "cores"
    folder.mkdir()

    def unlimited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY and os.geteuid() != 0:
        pytest.skip("the hard limit of core dumps is not ours to raise")
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() not in ("core", "core.%p"):
        pytest.skip("core dumps go elsewhere here")
    control = subprocess.Popen(["sleep", "60"], env=world.env(), cwd=folder, preexec_fn=unlimited)
    wait_until(lambda: Path(f"/proc/{control.pid}/comm").read_text() == "sleep\n")
    control.send_signal(signal.SIGSEGV)
    control.wait()
    dumped = list(folder.iterdir())
    if not dumped:
        pytest.skip("this kernel dumps no core")
    assert holds(dumped[0].read_bytes(), canaries)
    dumped[0].unlink()
    process = world.start(
        "--", "sh", "-c", "ulimit -c; exec cat", cwd=folder, preexec_fn=unlimited, stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "unlimited\n"  # the command has its own limit
    process.send_signal(signal.SIGSEGV)
    process.wait(PATIENCE_S)
    assert not list(folder.iterdir())
    process.communicate("", timeout=PATIENCE_S)


def test_isolated_python_is_how_it_runs() -> None:
    """The second interpreter is started with the options of the first."""
    code = "import sys; print(sys.orig_argv[1:3])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['-I', '-c']\n"


@pytest.mark.parametrize(
    "kind", [("ed25519", "RFC4716"), ("ecdsa", "PEM"), ("ecdsa", "PKCS8"), ("rsa", "PEM")]
)
def test_kinds_of_keys(tmp_path: Path, kind: tuple[str, str]) -> None:
    for passphrase in ("", "secret"):
        place = tmp_path / f"k{passphrase}"
        # The size of RSA keys is of no matter here, and the time that a large one takes is.
        size = ["-b", "2048"] if kind[0] == "rsa" else []
        argv = ["ssh-keygen", "-q", "-t", kind[0], *size, "-m", kind[1], "-N", passphrase, "-f", str(place)]
        subprocess.run(argv, check=True)
        data = place.read_bytes()
        if passphrase:
            with pytest.raises(AgentAccessError, match="with a passphrase"):
                checked(data, "It")
        else:
            assert checked(data, "It") == data
            assert checked(b"\n" + data.strip().replace(b"\n", b"\r\n"), "It") == data


def test_what_is_no_private_key(world: World) -> None:
    public = world.key.with_suffix(".pub").read_bytes()
    text = world.key.read_bytes()
    for data in (b"", public, b"x" * 99999, text[:-20], text.replace(b"OPENSSH", b"OPENSSL", 1), text + text,
                 b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
                 b"-----BEGIN OPENSSH PRIVATE KEY-----\n!\n-----END OPENSSH PRIVATE KEY-----\n"):  # fmt: skip
        with pytest.raises(AgentAccessError, match="private key"):
            checked(data, "It")
