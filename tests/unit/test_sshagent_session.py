"""Sessions with the real ssh-agent and ssh-add, started as a user starts them."""

from __future__ import annotations

import fcntl
import os
import pty
import pwd
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from control.zipapp import build
from quietport.sshagent.job import Job, Witness
from tests.unit.sshagent_world import (
    PATIENCE_S,
    SHORT_TTL_S,
    VARIABLE,
    World,
    alive,
    make_key,
    script,
    short_folder,
    wait_until,
)


@pytest.fixture(scope="module", name="key")
def _key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "k")


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory, key: Path) -> World:
    return World(short_folder(tmp_path_factory), key)


def left_behind(world: World) -> list[str]:
    """Sessions, staged ones and sockets."""
    return [
        str(path.relative_to(world.root))
        for name in ("sessions", "staging", "sockets")
        for path in (world.root / name).glob("*")
    ]


def test_a_session_from_its_start_to_its_end(world: World) -> None:
    code = "echo $SSH_AGENT_PID; stat -c %a-%F $SSH_AUTH_SOCK; umask; ulimit -Sc; exec ssh-add -l"
    done = world.run("--", "sh", "-c", code, preexec_fn=lambda: os.umask(0o027) and None)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["", "600-socket", "0027"]
    assert (
        lines[3]
        == subprocess.run(
            ["sh", "-c", "ulimit -Sc"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    assert "canary (ED25519)" in lines[4]
    assert (done.returncode, done.stderr) == (0, "")
    session = world.only()
    assert (session["status"], session["exit_reason"], session["exit_status"]) == (
        "stopped",
        "command-ended",
        0,
    )
    assert set(session) == {
        "id", "status", "created_at", "expires_at", "ended_at", "duration_s", "exit_reason", "exit_status",
    }  # fmt: skip
    assert world.events() == ["created", "key_loaded", "stopped"]
    folder = world.root / "sessions" / session["id"]
    environment = (folder / "agent.env").read_text()
    pattern = r"SSH_AUTH_SOCK=/.+/sockets/\d{8}T\d{6}Z-[0-9a-f]{8}\nSSH_AGENT_PID=(\d+)\n"
    match = re.fullmatch(pattern, environment)
    assert match
    with pytest.raises(ProcessLookupError):
        os.kill(int(match[1]), 0)
    for place, mode in ((world.root, 0o700), (folder, 0o700), (folder / "session.json", 0o600),
                        (folder / "agent.env", 0o600), (world.root / "audit.jsonl", 0o600)):  # fmt: skip
        assert place.stat().st_mode & 0o7777 == mode
    assert not list((world.root / "sockets").iterdir())
    # None of these needs the key.
    bare = {name: value for name, value in world.env().items() if name != VARIABLE}
    assert session["id"] in world.run("--list", env=bare).stdout
    assert world.run("--stop", session["id"], env=bare).stdout == f"ALREADY_ENDED {session['id']}\n"
    dry = world.run("--prune", "--dry-run", env=bare)
    assert (dry.returncode, dry.stdout) == (0, f"WOULD_PRUNE {session['id']}\n")
    assert folder.is_dir()
    assert world.run("--prune", env=bare).stdout == f"PRUNED {session['id']}\n"
    assert left_behind(world) == []
    assert world.events()[-1] == "pruned"


@pytest.mark.parametrize(("code", "expected"), [("exit 0", 0), ("exit 41", 41), ("kill -TERM $$", 143),
                                                ("kill -KILL $$", 137)])  # fmt: skip
def test_the_exit_status_is_the_command_s(world: World, code: str, expected: int) -> None:
    assert world.run("--", "sh", "-c", code).returncode == expected
    assert world.only()["exit_status"] == expected


def test_the_key_may_come_on_a_descriptor_and_under_another_name(world: World) -> None:
    bare = {name: value for name, value in world.env().items() if name != VARIABLE}
    with world.key.open("rb") as stream:
        done = world.run(
            "--key-fd", str(stream.fileno()), "--", "ssh-add", "-l", env=bare, pass_fds=[stream.fileno()]
        )
    assert (done.returncode, "canary" in done.stdout) == (0, True)
    with world.key.open("rb") as stream:
        done = world.run("--key-fd", "0", "--", "ssh-add", "-l", env=bare, stdin=stream)
    assert (done.returncode, "canary" in done.stdout) == (0, True)
    # A shell takes the last line feed away, a web form puts carriage returns in.
    text = world.key.read_text().strip().replace("\n", "\r\n")
    both = {**world.env(), "OTHER": text}
    done = world.run(
        "--key-env", "OTHER", "--", "sh", "-c", "ssh-add -l; env; cat /proc/$PPID/environ", env=both
    )
    assert (done.returncode, "canary" in done.stdout) == (0, True)
    assert "OTHER=" not in done.stdout
    assert VARIABLE not in done.stdout


def test_the_ttl_ends_the_agent_and_not_the_command(world: World) -> None:
    over = f"until grep -q expired {world.root}/audit.jsonl; do sleep 0.2; done"
    code = f"ssh-add -l >/dev/null || exit 9; {over}; ssh-add -l 2>&1; exit 5"
    done = world.run("--ttl", str(SHORT_TTL_S), "--", "sh", "-c", code)
    assert (done.returncode, "No such file" in done.stdout) == (5, True)
    assert done.stderr.count("\n") == 1
    assert f"has reached its TTL of {SHORT_TTL_S}s: its keys and its agent are gone" in done.stderr
    session = world.only()
    assert (session["status"], session["exit_reason"], session["exit_status"]) == ("expired", "ttl", 5)
    assert session["duration_s"] == pytest.approx(SHORT_TTL_S, abs=0.01)
    assert world.events() == ["created", "key_loaded", "expired"]


def test_stop_ends_the_agent_and_not_the_command(world: World) -> None:
    process = world.start("--", "sh", "-c", "read go; ssh-add -l; exit 6", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    session = world.only()
    assert session["status"] == "active"
    done = world.run("--stop", session["id"])
    assert (done.returncode, done.stdout) == (0, f"STOPPED {session['id']}\n")
    assert world.run("--stop", session["id"]).stdout == f"ALREADY_ENDED {session['id']}\n"
    assert world.only()["exit_reason"] == "stop-requested"
    out, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert (process.returncode, out) == (6, "")
    assert "was stopped: its keys and its agent are gone; the command goes on." in err
    assert world.only()["exit_status"] == 6
    assert world.events() == ["created", "key_loaded", "stopped"]
    assert world.run("--stop", "../..").returncode == 125
    assert world.run("--stop", "20200101T000000Z-00000000").returncode == 125


TTLS = ("0", "-0", "-5", "-1m", "abc", "", "25h", "86401", "1e3", "\u0663")


def test_usage_errors_are_one_sentence_and_touch_nothing(world: World) -> None:
    cases: list[list[str]] = [
        *(["--ttl", ttl, "--", "true"] for ttl in TTLS),
        ["--no-such"], ["word"], ["--list", "--prune"], ["--list", "--ttl", "5"], ["--dry-run"],
        ["--json"], ["--key-env", "A", "--key-fd", "0", "--", "true"], ["--key-fd", "999", "--", "true"],
        ["--key-fd", "x", "--", "true"], ["--key-env", "a=b", "--", "true"], ["--stop"],
        ["--allow-host", "-oProxyCommand=x", "--", "true"], ["--allow-host", "a b", "--", "true"],
        ["--known-hosts", "relative", "--", "true"], ["--list", "--", "true"], ["--ttl", "5", "--ttl", "6"],
    ]  # fmt: skip
    from quietport.sshagent import cli

    for words in cases:
        # In this process: forty interpreters would take their time.
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("quietport.sshagent.cli.complain", said.append)
            code = cli.main(["--runtime-root", str(world.root), *words])
        assert (code, len(said)) == (2, 1), (words, said)
        assert said[0].endswith((".", "<file.")), said
    done = world.run("--ttl", "0", "--", "true")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert not world.root.exists()


def test_a_start_that_cannot_be_is_one_sentence_and_leaves_nothing(world: World) -> None:
    locked = make_key(world.folder / "locked", passphrase="secret")
    broken = world.key.read_text().splitlines()
    broken[2] = broken[2][::-1]
    inside = {"CODEX_OPENCLAW_SSH_AGENT_SESSION": "20260101T000000Z-00000000"}
    empty = world.folder / "empty"
    empty.mkdir()
    cases = [
        (world.env(**{VARIABLE: locked.read_text()}), (), "passphrase", 125),
        (world.env(**{VARIABLE: "\n".join(broken)}), (), "cannot read the private key", 125),
        (world.env(**{VARIABLE: "nonsense"}), (), "not a private key", 125),
        (world.env(**{VARIABLE: ""}), (), "is not set", 125),
        (world.env(**{VARIABLE: "x" * 20000}), (), "larger than", 125),
        (world.env(**inside), (), "already inside", 125),
        ({**world.env(), "PATH": str(empty)}, (), "install openssh-client", 125),
        (world.env(), ("--", "no-such-command"), "can be found", 127),
        (world.env(), ("--", str(empty)), "can be found", 127),
        (world.env(), ("--allow-host", "x", "--known-hosts", "/no/such", "--", "true"), "no/such", 125),
    ]
    for env, words, sentence, code in cases:
        done = world.run(*(words or ("--", "true")), env=env)
        assert (done.returncode, done.stdout) == (code, ""), (sentence, done)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert sentence in done.stderr
        assert left_behind(world) == []
    # The one that got as far as ssh-add is in the audit.
    assert world.events() == ["created", "stopped"]


def test_a_command_that_is_no_program_is_126(world: World) -> None:
    place = world.folder / "noformat"
    place.write_bytes(b"\x7fELF nonsense")
    place.chmod(0o755)
    done = world.run("--", str(place))
    assert done.returncode == 126
    assert left_behind(world) == []
    assert world.events() == ["created", "key_loaded", "stopped"]


def test_no_ssh_agent_that_works(world: World) -> None:
    world.path.append(script(world.folder / "bin", "ssh-agent", "echo no agent today >&2; exit 1").parent)
    done = world.run("--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert "no agent today" in done.stderr
    assert left_behind(world) == []


def test_an_ssh_add_that_never_stops_talking(world: World) -> None:
    world.path.append(script(world.folder / "bin", "ssh-add", "exec yes nonsense").parent)
    done = world.run("--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert "could not load the key" in done.stderr
    assert left_behind(world) == []


def test_signals_that_the_caller_blocks_stay_blocked(world: World) -> None:
    blocked = {signal.SIGUSR2, signal.SIGRTMIN + 3}
    done = world.run(
        "--", "grep", "SigBlk", "/proc/self/status",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, blocked) and None,
    )  # fmt: skip
    assert int(done.stdout.split()[1], 16) == sum(1 << (number - 1) for number in blocked)


def test_a_runtime_root_too_long_for_a_socket(world: World) -> None:
    long = world.folder / ("x" * 100)
    done = world.run("--runtime-root", str(long), "--", "true")
    assert done.returncode == 2  # given twice
    argv = [sys.executable, "-m", "quietport", "ssh-agent", "--runtime-root", str(long), "--", "true"]
    done = subprocess.run(argv, env=world.env(), capture_output=True, text=True, check=False)
    assert (done.returncode, "too long for a socket" in done.stderr) == (125, True)


COUNT = """
import os, signal
wanted = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH,
          signal.SIGRTMIN + 5}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
print("ready", os.getpid(), os.getpgid(0), flush=True)
number = 0
while number != signal.SIGRTMIN + 5:
    number = signal.sigwaitinfo(wanted).si_signo
    print(number, flush=True)
"""


def test_a_signal_reaches_the_command_once_however_it_was_sent(world: World) -> None:
    process = world.start("--", sys.executable, "-c", COUNT, start_new_session=True)
    assert process.stdout is not None
    _, pid, group = process.stdout.readline().split()
    assert int(group) == process.pid  # the group of its caller
    to_wrapper, to_command, to_all = process.pid, int(pid), -process.pid
    sent = [
        (to_wrapper, signal.SIGTERM), (to_wrapper, signal.SIGUSR1), (to_all, signal.SIGINT),
        (to_command, signal.SIGQUIT), (to_wrapper, signal.SIGHUP), *[(to_all, signal.SIGWINCH)] * 8,
    ]  # fmt: skip
    for receiver, number in sent:
        os.kill(receiver, number)
        # One that comes twice is read as the next.
        assert int(process.stdout.readline()) == number
    # The wrapper takes what is waiting by number, the least first (signal(7)): this is the last it passes on.
    last = signal.SIGRTMIN + 5
    os.kill(to_wrapper, last)
    assert process.stdout.read().split() == [str(int(last))]
    assert process.wait(PATIENCE_S) == 0


class Unseen(Witness):
    """Of a signal that was not for the whole group."""

    def saw(self, number: int, sender: int) -> bool:
        return False


@pytest.mark.parametrize(
    ("sender", "passed"), [(0, True), (1, True), (os.getpid(), False)], ids=["outside", "another", "itself"]
)
def test_a_signal_from_outside_of_a_container_is_passed_on(sender: int, passed: bool) -> None:
    """Its sender is 0 (pid_namespaces(7)); what the wrapper sends itself is not passed on."""
    job = Job(2, Unseen(2, -1), lambda pid, status: None)
    info = signal.struct_siginfo((signal.SIGTERM, 0, 0, sender, 0, 0, 0))
    assert job._is_for_the_command(info) is passed


def test_signals_that_the_caller_ignores_stay_ignored(world: World) -> None:
    code = "trap; grep SigIgn /proc/self/status"

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def value(text: str) -> int:
        return int(text.split("SigIgn:")[1], 16)

    wrapped = value(world.run("--", "sh", "-c", code, preexec_fn=ignore).stdout)
    bare = value(subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True).stdout)
    assert wrapped & ~bare == 1 << (signal.SIGHUP - 1)


STOPS = """
import os, signal, sys
print(os.getpid(), flush=True)
for line in sys.stdin:
    os.kill(os.getpid(), signal.SIGSTOP)
    print("on", flush=True)
"""


def state_of(pid: int) -> str:
    """T is stopped (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("who", ["group", "wrapper", "command"])
def test_a_command_that_stops_and_its_wrapper_go_on_together(world: World, who: str) -> None:
    """Whomever the SIGCONT is for, and also when it comes while the wrapper is about to stop."""
    process = world.start("--", sys.executable, "-c", STOPS, start_new_session=True, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    command = int(process.stdout.readline())
    receiver = {"group": -process.pid, "wrapper": process.pid, "command": command}[who]
    for number in range(8):
        process.stdin.write("stop\n")
        process.stdin.flush()
        wait_until(lambda: state_of(command) == "T")
        # The others at once. One for the wrapper alone would be lost in the moment when that stops.
        if who == "wrapper" or number % 2:
            wait_until(lambda: state_of(process.pid) == "T")
        os.kill(receiver, signal.SIGCONT)
        assert process.stdout.readline() == "on\n"
        wait_until(lambda: state_of(process.pid) != "T")
    process.communicate("", timeout=PATIENCE_S)
    assert process.returncode == 0
    assert world.only()["exit_reason"] == "command-ended"


def test_a_command_that_is_killed_while_it_is_stopped(world: World) -> None:
    process = world.start("--", sys.executable, "-c", STOPS, start_new_session=True, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    command = int(process.stdout.readline())
    process.stdin.write("stop\n")
    process.stdin.flush()
    wait_until(lambda: state_of(process.pid) == "T")
    os.kill(command, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 137
    assert world.only()["exit_reason"] == "command-killed"


class Terminal:
    """A terminal with an interactive shell, as a person has one."""

    def __init__(self, world: World) -> None:
        self.master, terminal = pty.openpty()
        env = {**world.env(), "PS1": "$ ", "ENV": "", "HISTFILE": ""}
        self.shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )  # fmt: skip
        os.close(terminal)
        os.set_blocking(self.master, False)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, word: str) -> None:
        """Wait for `word`, and forget everything up to it."""

        def there() -> bool:
            with suppress(OSError):
                self.text += os.read(self.master, 4096).decode(errors="replace")
            return word in self.text

        try:
            wait_until(there)
        except AssertionError:
            raise AssertionError(f"no {word!r} in {self.text!r}") from None
        self.text = self.text.split(word, 1)[1]

    def close(self) -> None:
        os.close(self.master)
        self.shell.kill()
        self.shell.wait()


def test_job_control_as_without_a_wrapper(world: World) -> None:
    terminal = Terminal(world)
    try:
        job = world.folder / "job.py"
        job.write_text(JOB)
        program = " ".join(world.argv("--", sys.executable, str(job)))
        terminal.type("stty -echo\n")
        terminal.expect("$ ")
        terminal.type(f"{program}; echo rc=$((0+$?))\n")
        terminal.expect("ready")
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.type("fg\n")
        terminal.expect("continued")
        terminal.type("a line\n")  # the command has the terminal again
        terminal.expect("got a line")
        terminal.type("\x03")
        terminal.expect("interrupts=1")
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.type("bg\n")
        terminal.expect("continued")
        terminal.type("kill %1; wait %1; echo rc=$((0+$?))\n")
        terminal.expect("rc=143")
    finally:
        terminal.close()
    session = world.only()
    assert (session["status"], session["exit_status"]) == ("stopped", 143)


JOB = """
import os, select, signal, sys, time
interrupts = []
signal.signal(signal.SIGINT, lambda n, f: interrupts.append(n))
signal.signal(signal.SIGCONT, lambda n, f: print("continued", flush=True))
print("ready", flush=True)
while True:
    time.sleep(0.05)
    foreground = os.tcgetpgrp(0) == os.getpgid(0)
    if foreground and select.select([0], [], [], 0)[0]:
        print("got", sys.stdin.readline().strip(), flush=True)
    if interrupts:
        print("interrupts=%d" % len(interrupts), flush=True)
        interrupts.clear()
"""


def test_a_pipeline_keeps_its_terminal(world: World) -> None:
    terminal = Terminal(world)
    try:
        # `read` in the other half of the pipeline would be stopped were the terminal given to the command.
        go = world.folder / "go"
        program = " ".join(world.argv("--", "sh", "-c", f"'echo up; until test -e {go}; do sleep 0.1; done'"))
        terminal.type("stty -echo\n")
        terminal.expect("$ ")
        terminal.type(f"{program} | (read up; echo $up; read x </dev/tty; echo read=$x)\n")
        terminal.expect("up")
        terminal.type("word\n")
        terminal.expect("read=word")
        go.touch()
        terminal.expect("$ ")
    finally:
        terminal.close()


def test_the_end_of_a_terminal_reaches_the_command(world: World) -> None:
    """As with `ssh -t host codex-openclaw-ssh-agent ...`: the wrapper leads the session of the terminal."""
    told = world.folder / "told"
    code = f"trap 'echo hangup > {told}; exit 9' HUP; echo up; while :; do sleep 0.1; done"
    argv = world.argv("--", "sh", "-c", code)
    env = world.env()
    child, master = pty.fork()
    if child == 0:
        try:
            os.execve(argv[0], argv, env)  # noqa: S606 - no shell on purpose
        finally:
            os._exit(1)
    seen = b""
    while b"up" not in seen:
        seen += os.read(master, 1024)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert told.read_text() == "hangup\n"
    assert world.only()["exit_status"] == 9


def test_without_a_command_it_is_the_user_s_shell(world: World) -> None:
    for words in ((), ("--",)):
        done = world.run(*words, input="ssh-add -l; echo $0; exit 3\n")
        assert done.returncode == 3
        assert "canary" in done.stdout
        assert done.stdout.splitlines()[-1] == pwd.getpwuid(os.getuid()).pw_shell


@pytest.mark.parametrize("way", ["ttl", "command", "stop", "killed agent"])
def test_an_upgrade_does_not_disturb_a_session_that_runs(world: World, way: str) -> None:
    program = world.folder / "quietport.pyz"
    program.write_bytes(build())
    argv = [sys.executable, "-I", str(program), "ssh-agent", "--runtime-root", str(world.root)]
    ttl = str(SHORT_TTL_S if way == "ttl" else 600)
    process = subprocess.Popen(
        [*argv, "--ttl", ttl, "--", "sh", "-c", "read go; exit 4"], env=world.env(), stdin=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: "key_loaded" in world.events())
    # In place, and as a converge does it, by a rename.
    program.write_bytes(b"nothing Python could read")
    (world.folder / "new").write_bytes(b"nor this")
    (world.folder / "new").rename(program)
    name = world.only()["id"]
    if way == "stop":  # by the new version
        assert world.run("--stop", name).stdout == f"STOPPED {name}\n"
    elif way == "killed agent":
        (environment,) = (world.root / "sessions").glob("*/agent.env")
        os.kill(int(environment.read_text().split("PID=")[1]), signal.SIGKILL)
    events, reason, sentence = {
        "ttl": ("expired", "ttl", "has reached its TTL"),
        "command": ("stopped", "command-ended", ""),
        "stop": ("stopped", "stop-requested", "was stopped"),
        "killed agent": ("crashed", "agent-died", "lost its agent"),
    }[way]
    if way != "command":
        wait_until(lambda: events in world.events())
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert (process.returncode, err.count("\n")) == (4, 1 if sentence else 0)
    assert sentence in err
    session = world.only()
    assert (session["status"], session["exit_reason"], session["exit_status"]) == (events, reason, 4)
    assert world.run("--prune").stdout == f"PRUNED {name}\n"


def test_a_session_that_was_pruned_while_its_command_goes_on(world: World) -> None:
    process = world.start("--", "sh", "-c", "read go; exit 7", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    name = world.only()["id"]
    assert world.run("--stop", name).stdout == f"STOPPED {name}\n"
    assert world.run("--prune").stdout == f"PRUNED {name}\n"
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert (process.returncode, err.count("\n")) == (7, 1)
    assert world.listed() == []
    assert world.events() == ["created", "key_loaded", "stopped", "pruned"]


def test_a_session_whose_files_somebody_took(world: World) -> None:
    process = world.start("--", "sh", "-c", "read go; exit 7", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    (place,) = (world.root / "sessions").iterdir()
    agent = int((place / "agent.env").read_text().split("PID=")[1])
    place.rename(world.folder / "taken")
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert (process.returncode, err.count("\n")) == (7, 1)
    assert "is not as this program left it" in err
    assert not alive(agent)
    assert world.events() == ["created", "key_loaded", "stopped"]


def test_an_interrupt_while_the_key_is_awaited(world: World) -> None:
    process = world.start("--key-fd", "0", "--", "true", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("-----BEGIN")
    process.stdin.flush()
    # Once that is gone from the pipe, it waits for more.
    pipe = process.stdin.fileno()
    wait_until(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, "", "")
    assert not world.root.exists()


DEFAULT = """
import os, pwd, subprocess, sys
program, key = sys.argv[1:3]
home = pwd.getpwuid(os.getuid()).pw_dir
for place in ("/run/user", home):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", place], check=True)
env = {**os.environ, "HOME": "/nowhere", "XDG_RUNTIME_DIR": "/nowhere", "OPENCLAW_SSH_PRIVATE_KEY": key}
argv = [sys.executable, "-I", program, "ssh-agent"]
print(subprocess.run([*argv, "--", "true"], env=env, capture_output=True, text=True).stderr, end="")
os.mkdir(f"/run/user/{os.getuid()}", 0o700)
done = subprocess.run([*argv, "--", "sh", "-c", "echo $SSH_AUTH_SOCK; ssh-add -l"], env=env, capture_output=True, text=True)
print(done.stdout + done.stderr, end="")
os.rmdir(f"/run/user/{os.getuid()}/codex-openclaw-ssh-agent")
os.rmdir(f"/run/user/{os.getuid()}")
print(subprocess.run([*argv, "--prune"], capture_output=True, text=True).stdout, end="")
for folder, _, names in os.walk(home + "/.local"):
    print(oct(os.stat(folder).st_mode & 0o7777)[2:], folder[len(home):], *names)
"""  # noqa: E501


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_the_state_directory_and_the_runtime_directory(world: World) -> None:
    """Where things are without --runtime-root, in mounts of our own."""
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("the Python of the distribution is not installed")
    program = world.folder / "quietport.pyz"
    program.write_bytes(build())
    argv = ["unshare", "--mount", "--propagation", "private", python, "-c", DEFAULT, str(program)]
    done = subprocess.run([*argv, world.key.read_text()], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert f"/run/user/{os.getuid()} does not exist" in lines[0]
    assert "enable-linger" in lines[0]
    socket = lines[1].rsplit("/", 1)
    assert socket[0] == f"/run/user/{os.getuid()}/codex-openclaw-ssh-agent"
    assert "canary" in lines[2]
    # The sockets are gone, as after the last logout; what else there is can be pruned.
    assert lines[3] == f"PRUNED {socket[1]}"
    assert "700 /.local/state/codex-openclaw-ssh-agent audit.jsonl" in lines
    assert "700 /.local/state/codex-openclaw-ssh-agent/sessions" in lines


def test_versions_are_told_apart(world: World) -> None:
    program = world.folder / "quietport.pyz"
    program.write_bytes(build())

    def said(*argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    here = world.run("--version").stdout
    assert re.fullmatch(r"codex-openclaw-ssh-agent \d+\.\d+\.\d+\+[0-9a-f]{12}\n", here)
    assert said(sys.executable, "-I", str(program), "ssh-agent", "--version") == here
    evidence = said(sys.executable, "-I", str(program), "ttl-evidence", "--version")
    assert evidence.split()[1] == here.split()[1]
    copy = world.folder / "src" / "quietport"
    subprocess.run(
        ["cp", "-r", str(Path(__file__).parents[2] / "quietport"), str(copy.parent) + "/"], check=False
    )
    copy.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-r", str(Path(__file__).parents[2] / "quietport"), str(copy)], check=True)
    with (copy / "net.py").open("a") as stream:
        stream.write("\n")
    program.write_bytes(build(copy))
    assert said(sys.executable, "-I", str(program), "ssh-agent", "--version") != here


def test_an_agent_that_dies_is_a_crash(world: World) -> None:
    process = world.start("--", "sh", "-c", "read go", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    (environment,) = (world.root / "sessions").glob("*/agent.env")
    agent = int(environment.read_text().split("SSH_AGENT_PID=")[1])
    assert alive(agent)
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: "crashed" in world.events())
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert (process.returncode, "lost its agent" in err) == (0, True)
    assert world.only()["exit_reason"] == "agent-died"
    assert world.events() == ["created", "key_loaded", "crashed"]
