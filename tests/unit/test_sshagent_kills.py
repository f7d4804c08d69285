"""kill -9 at every step, provoked from outside: what is listed is true, what is over goes, no agent stays."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quietport.sshagent.names import now, stamp
from quietport.sshagent.prune import prune
from quietport.sshagent.record import Record
from quietport.sshagent.root import Root, locked
from quietport.sshagent.sessions import end, everything
from tests.unit.sshagent_world import (
    PATIENCE_S,
    SHORT_TTL_S,
    World,
    alive,
    make_key,
    script,
    short_folder,
    wait_until,
)

CLOCK = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module", name="key")
def _key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "k")


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[World]:
    world = World(short_folder(tmp_path_factory), key)
    yield world
    # Nothing that a test left may outlive it: agents, keepers and stalled programs name our directory.
    for pid in processes_of(world):
        os.kill(pid, signal.SIGKILL)


def processes_of(world: World) -> list[int]:
    """All processes whose working directory or arguments are in the directory of this test."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            where, words = str((place / "cwd").readlink()), (place / "cmdline").read_bytes()
        except OSError:
            continue
        if str(world.folder) in where or str(world.folder).encode() in words:
            found.append(int(place.name))
    return [pid for pid in found if pid != os.getpid() and alive(pid)]


def agent_of(world: World) -> int:
    (environment,) = (world.root / "sessions").glob("*/agent.env")
    return int(environment.read_text().split("SSH_AGENT_PID=")[1])


def there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_over(world: World, *, reason: str) -> None:
    """One crashed session, told once, and gone after a prune."""
    for _ in (1, 2):
        session = world.only()
        assert (session["status"], session["exit_reason"]) == ("crashed", reason)
    # A zombie is there for kill(2), until whoever got the orphan waits for it.
    agent = agent_of(world)
    wait_until(lambda: agent == os.getpid() or not there(agent))
    assert world.events().count("crashed") == 1
    assert world.run("--prune").stdout == f"PRUNED {session['id']}\n"
    assert world.listed() == []


def test_wrapper_killed_while_ssh_agent_does_not_come(world: World) -> None:
    mark = world.folder / "mark"
    world.path.append(script(world.folder / "bin", "ssh-agent", f"echo $$ > {mark}; exec sleep 300").parent)
    process = world.start("--", "true")
    wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    stalled = int(mark.read_text())
    assert alive(stalled)
    process.kill()
    process.communicate()
    wait_until(lambda: not alive(stalled))
    wait_until(lambda: not processes_of(world))
    assert world.listed() == []
    assert world.events() == []


def test_wrapper_killed_while_ssh_add_does_not_end(world: World) -> None:
    mark = world.folder / "mark"
    world.path.append(script(world.folder / "bin", "ssh-add", f"echo $$ > {mark}; exec sleep 300").parent)
    process = world.start("--", "true")
    wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    assert world.only()["status"] == "active"
    agent = agent_of(world)
    assert alive(agent)
    assert world.run("--prune").stdout == f"SKIP_ACTIVE {world.only()['id']}\n"
    process.kill()
    process.communicate()
    wait_until(lambda: not alive(agent))
    wait_until(lambda: not processes_of(world))
    is_over(world, reason="wrapper-died")
    assert world.events() == ["created", "crashed", "pruned"]


def test_an_interrupt_while_the_key_is_loaded_leaves_nothing(world: World) -> None:
    mark = world.folder / "mark"
    world.path.append(script(world.folder / "bin", "ssh-add", f"touch {mark}; exec sleep 300").parent)
    process = world.start("--", "true")
    wait_until(mark.exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, "", "")
    assert not processes_of(world)
    assert world.listed() == []
    assert world.events() == ["created", "stopped"]


def start_and_wait(world: World, *words: str) -> subprocess.Popen[str]:
    process = world.start(*words, "--", "sh", "-c", "read go; ssh-add -l", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    return process


def test_wrapper_killed_while_the_command_runs(world: World) -> None:
    process = start_and_wait(world)
    agent = agent_of(world)
    process.kill()
    process.wait()
    wait_until(lambda: not alive(agent))
    out, _ = process.communicate("go\n", timeout=PATIENCE_S)  # the command's: it went on, without a key
    assert out == ""
    is_over(world, reason="wrapper-died")
    assert not list((world.root / "sockets").iterdir())


def test_the_watch_killed_while_the_command_runs(world: World) -> None:
    process = start_and_wait(world)
    agent = agent_of(world)
    (watch,) = [pid for pid in children_of(process.pid) if os.getsid(pid) == pid]
    os.kill(watch, signal.SIGKILL)
    wait_until(lambda: "crashed" in world.events())
    assert not alive(agent)
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert "lost the process that watches its agent: its keys and its agent are gone" in err
    is_over(world, reason="watch-died")


def test_wrapper_and_watch_killed_the_agent_ends_by_itself(world: World) -> None:
    process = start_and_wait(world)
    agent = agent_of(world)
    (watch,) = [pid for pid in children_of(process.pid) if os.getsid(pid) == pid]
    for pid in (process.pid, watch):
        os.kill(pid, signal.SIGSTOP)
    for pid in (process.pid, watch):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    session = world.only()
    assert session["status"] == "crashed"
    # ssh-agent looks for its parent every 10 seconds; until then a prune keeps its hands off.
    if alive(agent):
        assert world.run("--prune").stdout == f"SKIP_AGENT_ALIVE {session['id']}\n"
        assert alive(agent)
    wait_until(lambda: not alive(agent))
    process.communicate("go\n", timeout=PATIENCE_S)
    is_over(world, reason="wrapper-died")
    assert not list((world.root / "sockets").iterdir())


def test_a_stopped_wrapper_does_not_keep_its_agent_over_the_ttl(world: World) -> None:
    process = start_and_wait(world, "--ttl", str(SHORT_TTL_S))
    agent = agent_of(world)
    process.send_signal(signal.SIGSTOP)
    assert alive(agent)
    wait_until(lambda: not alive(agent))
    session = world.only()
    assert (session["status"], session["exit_reason"]) == ("expired", "ttl")
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate("go\n", timeout=PATIENCE_S)
    assert "has reached its TTL" in err
    assert world.events().count("expired") == 1
    assert world.only()["exit_status"] == process.returncode == 2


def test_another_boot_is_a_crash_with_that_reason(world: World) -> None:
    record = world.fabricate()
    place = world.directory(record) / "session.json"
    document = json.loads(place.read_text())
    for who in ("wrapper", "keeper", "agent"):
        # PID 1 is there: it is not believed, because the boot is another.
        document[who] = {"pid": os.getpid(), "start": None, "boot": "00000000-0000-0000-0000-000000000000"}
    place.write_text(json.dumps(document))
    environment = world.directory(record) / "agent.env"
    environment.write_text(environment.read_text().split("PID=")[0] + f"PID={os.getpid()}\n")
    is_over(world, reason="host-rebooted")


def test_killed_at_any_moment(world: World) -> None:
    chance = random.Random(6)  # noqa: S311 - moments, no secrets
    began = time.monotonic()
    world.start("--", "true").communicate(timeout=PATIENCE_S)
    takes = time.monotonic() - began
    assert world.run("--prune").stdout.startswith("PRUNED ")
    running = []
    for _ in range(9):
        process = world.start("--", "sleep", "20", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Whenever in its life, on a machine that is as busy as this one.
        time.sleep(takes * chance.uniform(0.2, 1.1))
        process.kill()
        running.append(process)
    for process in running:
        process.wait()
    wait_until(lambda: not [p for p in processes_of(world) if b"ssh-agent" in cmdline(p)])
    found = world.listed()
    assert {session["status"] for session in found} <= {"crashed"}
    lines = world.run("--prune").stdout.splitlines()
    assert sorted(lines) == sorted(f"PRUNED {session['id']}" for session in found)
    assert world.listed() == []
    assert not list((world.root / "staging").glob("*"))
    events = [(one.event, one.id) for one in world.trail().events]
    assert len(events) == len(set(events))
    begun = {name for event, name in events if event == "created"}
    assert begun == {name for event, name in events if event in ("crashed", "stopped")}
    assert sum(event == "stopped" for event, _ in events) == 1


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# What is on the disk changes with these alone.
CALLS = ("open", "write", "rename", "mkdir", "unlink", "rmdir", "fsync", "fdatasync")


def killed_at(call: int, do: Callable[[], object]) -> bool:
    """Do it in a child that is killed just before the `call`th call of CALLS; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            left = [call]

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def one(*words: Any, **more: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*words, **more)

                return one

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            do()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def is_whole(world: World) -> None:
    """What a kill left can be listed, is told once, and is gone after a prune."""
    found = world.opened()
    try:
        sessions, problem = everything(found)
        assert problem == ""
        assert {one.status for one in sessions} <= {"crashed", "stopped"}
        assert [verdict.word for verdict in prune(found, dry=False)] == ["PRUNED"] * len(sessions)
    finally:
        found.close()
    assert not list((world.root / "sessions").iterdir())
    assert not list((world.root / "staging").iterdir())
    told = [(one.event, one.id) for one in world.trail().events]
    assert len(told) == len(set(told))
    ids = {name for event, name in told if event == "created"}
    ends = [name for event, name in told if event in ("crashed", "stopped")]
    assert sorted(ends) == sorted(ids)  # one end each


@pytest.mark.parametrize("step", ["publish", "end", "list", "prune"])
def test_killed_before_every_call_that_touches_files(world: World, step: str) -> None:
    call = 0
    while True:
        over = {"status": "stopped", "exit_reason": "command-ended", "ended_at": stamp(now())}
        record = None if step == "publish" else world.fabricate()
        root = world.opened()

        def do(root: Root = root, record: Record | None = record, over: dict[str, str] = over) -> None:
            if record is None:
                world.fabricate()
            elif step == "end":
                with locked(root):
                    end(root, replace(record, **over))  # type: ignore[arg-type]
            elif step == "list":
                everything(root)
            else:
                list(prune(root, dry=False))

        killed = killed_at(call, do)
        root.close()
        is_whole(world)
        if not killed:
            break
        call += 1
    assert call > 10  # the positive control: it was killed, at one call after the other


def test_sixty_four_starts_at_once(world: World) -> None:
    count = 64
    env = world.env()
    gate, opener = os.pipe()
    running = [
        subprocess.Popen(
            world.argv("--", "sh", "-c", "ssh-add -l; read gate"), env=env, stdin=gate, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(count)
    ]  # fmt: skip
    os.close(gate)
    for _ in range(3):  # while they start
        done = world.run("--prune")
        assert (done.returncode, done.stderr) == (0, "")
        assert {line.split()[0] for line in done.stdout.splitlines()} <= {"SKIP_ACTIVE"}
    wait_until(lambda: (world.root / "audit.jsonl").read_bytes().count(b"key_loaded") == count, seconds=300)
    sessions = world.listed()
    assert [session["status"] for session in sessions] == ["active"] * count
    agents = {int(p.read_text().split("PID=")[1]) for p in (world.root / "sessions").glob("*/agent.env")}
    assert len(agents) == count
    os.close(opener)
    for process in running:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (1, "")  # of `read`, at the end of what it reads
        assert "canary" in out
    for place in (world.root / "sessions").iterdir():
        assert place.stat().st_mode & 0o7777 == 0o700
        assert {file.stat().st_mode & 0o7777 for file in place.iterdir()} == {0o600}
    assert [session["status"] for session in world.listed()] == ["stopped"] * count
    assert not any(alive(agent) for agent in agents)
    assert not list((world.root / "sockets").iterdir())
    trail = world.trail()
    assert trail.damaged == 0
    for event in ("created", "key_loaded", "stopped"):
        assert len({one.id for one in trail.events if one.event == event}) == count
    assert world.run("--prune").stdout.count("PRUNED ") == count
