"""A hostile process of the same user, a full disk, a read-only one: nothing outside the root is touched."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from quietport.sshagent import sessions
from quietport.sshagent.names import AgentAccessError
from quietport.sshagent.process import Process
from quietport.sshagent.prune import prune
from quietport.sshagent.root import Root
from tests.unit.sshagent_world import PATIENCE_S, World, make_key, short_folder, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

# Swaps names as fast as it can: directories, links to a victim, copies of a session with other content.
SWAPPER = """
import os, random, sys
root, victim, lure, enough = sys.argv[1:5]
import time
end = time.monotonic() + 60
chance = random.Random(22)
sessions = root + "/sessions"
count = 0
print("ready", flush=True)
while time.monotonic() < end and not os.path.exists(enough):
    try:
        names = [n for n in os.listdir(sessions) if not n.startswith("x")]
    except OSError:
        names = []
    if not names:
        continue
    name = chance.choice(names)
    place = sessions + "/" + name
    kind = chance.randrange(7)
    try:
        if kind == 0:      # a link to the victim in its place, and back
            os.rename(place, sessions + "/x" + name); os.symlink(victim, place)
            os.unlink(place); os.rename(sessions + "/x" + name, place)
        elif kind == 1:    # the victim itself in its place, and back
            os.rename(place, sessions + "/x" + name); os.rename(victim, place)
            os.rename(place, victim); os.rename(sessions + "/x" + name, place)
        elif kind == 2:    # one of its files is a link to one of the victim's
            os.rename(place + "/agent.env", place + "/session.json.x"); os.symlink(victim + "/agent.env", place + "/agent.env")
            os.unlink(place + "/agent.env"); os.rename(place + "/session.json.x", place + "/agent.env")
        elif kind == 3:
            os.rename(sessions, root + "/xsessions"); os.symlink(lure, sessions)
            os.unlink(sessions); os.rename(root + "/xsessions", sessions)
        elif kind == 4:    # a second name for a file of the victim
            os.link(victim + "/precious", place + "/.session.json.new"); os.unlink(place + "/.session.json.new")
        elif kind == 5:
            os.rename(root + "/staging", root + "/xstaging"); os.symlink(lure, root + "/staging")
            os.unlink(root + "/staging"); os.rename(root + "/xstaging", root + "/staging")
        else:
            os.rename(root + "/audit.jsonl", root + "/xaudit"); os.symlink(victim + "/precious", root + "/audit.jsonl")
            os.unlink(root + "/audit.jsonl"); os.rename(root + "/xaudit", root + "/audit.jsonl")
        count += 1
    except OSError:
        # Whatever stands half way is put right, so that the game goes on.
        for a, b in ((sessions + "/x" + name, place), (root + "/xsessions", sessions), (root + "/xstaging", root + "/staging"),
                     (root + "/xaudit", root + "/audit.jsonl"), (place + "/session.json.x", place + "/agent.env")):
            if os.path.lexists(a):
                if os.path.islink(b):
                    os.unlink(b)
                try:
                    os.rename(a, b)
                except OSError:
                    pass
        if not os.path.lexists(victim):
            for n in os.listdir(sessions):
                if os.path.exists(sessions + "/" + n + "/precious"):
                    os.rename(sessions + "/" + n, victim)
print(count)
"""  # noqa: E501


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = short_folder(tmp_path_factory)
    return World(folder, folder / "k")


def picture(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    found = {}
    for place in [folder, *sorted(folder.rglob("*"))]:
        status = place.lstat()
        data = place.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(place.relative_to(folder))] = (status.st_mode, status.st_uid, data)
    return found


def test_a_hostile_process_of_the_same_user_that_swaps_names(world: World) -> None:
    # What looks most like a session and is none of ours: private, valid, with a file that is precious.
    template = world.fabricate(exit_reason="command-ended", status="stopped")
    victim, lure = world.folder / "victim", world.folder / "lure"
    shutil.copytree(world.directory(template), victim)
    victim.chmod(0o700)
    (victim / "precious").write_text("precious")
    (victim / "precious").chmod(0o600)
    lure.mkdir(mode=0o700)
    shutil.copytree(victim, lure / template.id)
    here = Process.of(os.getpid())
    running = {world.fabricate(wrapper=here, agent=here, keeper=here).id for _ in range(5)}
    before = picture(victim), picture(lure)
    enough = world.folder / "enough"
    argv = [sys.executable, "-c", SWAPPER, str(world.root), str(victim), str(lure), str(enough)]
    swapper = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert swapper.stdout is not None
    swapper.stdout.readline()
    began = time.monotonic()
    statuses: set[str] = set()
    pruned = 0
    while (passed := time.monotonic() - began) < 1.5 or (
        passed < 30 and not (pruned and "active" in statuses)
    ):
        # A refusal is an answer too; anything else would be a traceback.
        with suppress(AgentAccessError):
            over = world.fabricate().id
            with closing(world.opened()) as root:
                for session in sessions.everything(root)[0]:
                    if session.id in running:
                        statuses.add(session.status)
                        assert session.status in ("active", "unsafe", "unknown", "invalid")
                    elif session.id == over:
                        assert session.status in ("crashed", "unsafe", "unknown", "invalid")
                words = {verdict.id: verdict.word for verdict in prune(root, dry=False)}
                assert not any(words.get(name) == "PRUNED" for name in running)
                pruned += sum(word == "PRUNED" for word in words.values())
    enough.touch()
    swaps = int(swapper.communicate(timeout=PATIENCE_S)[0])
    assert (picture(victim), picture(lure)) == before
    # Positive controls: names were swapped, we did our work meanwhile, and were told lies.
    assert swaps > 100
    assert pruned > 0
    assert "active" in statuses


def test_a_directory_swapped_between_look_and_removal_is_not_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment that the swapper may miss, hit for certain."""
    record = world.fabricate()
    theirs = world.folder / "theirs"
    shutil.copytree(world.directory(record), theirs)
    theirs.chmod(0o700)
    real = sessions.remove
    before = picture(theirs)

    def swapped(root: Root, name: str, directory: int, place: int) -> bool:
        world.directory(record).rename(world.folder / "away")
        theirs.rename(world.directory(record))
        return real(root, name, directory, place)

    monkeypatch.setattr(sessions, "remove", swapped)
    with closing(world.opened()) as root:
        assert [verdict.word for verdict in prune(root, dry=False)] == ["SKIP_UNSAFE"]
    assert picture(world.directory(record)) == before
    assert not list((world.root / "staging").iterdir())
    monkeypatch.undo()
    with closing(world.opened()) as root:
        assert [verdict.word for verdict in prune(root, dry=False)] == ["PRUNED"]


def test_a_lock_that_is_never_released_is_one_sentence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    record = world.fabricate()
    other = os.open(world.root, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        monkeypatch.setattr("quietport.sshagent.root.locked.__wrapped__.__kwdefaults__", {"timeout": 0.05})
        with closing(world.opened()) as root:
            found, problem = sessions.everything(root)
        assert [session.status for session in found] == ["crashed"]
        assert "still locked" in problem
    finally:
        os.close(other)
    assert world.directory(record).is_dir()


def test_the_agent_does_not_wait_for_a_lock(world: World) -> None:
    """An agent ends, whoever holds the lock."""
    make_key(world.key)
    process = world.start("--", "sh", "-c", "read go; exit 3", stdin=subprocess.PIPE)
    wait_until(lambda: "key_loaded" in world.events())
    (place,) = (world.root / "sessions").glob("*/agent.env")
    other = os.open(world.root, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        _, err = process.communicate("go\n", timeout=PATIENCE_S)
    finally:
        os.close(other)
    assert (process.returncode, err.count("\n")) == (3, 1)
    assert "cannot be written down" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text().split("PID=")[1]), 0)
    assert world.only()["exit_reason"] == "wrapper-died"


def in_a_namespace(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python where mounts are nobody else's (unshare(1))."""
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", code, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


DISK = """
import os, subprocess, sys
folder, key, kind = sys.argv[1:4]
os.mkdir(folder)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "none", folder], check=True)
root = folder + "/r"
argv = [sys.executable, "-m", "quietport", "ssh-agent", "--runtime-root", root]
env = {**os.environ, "OPENCLAW_SSH_PRIVATE_KEY": open(key).read()}

def run(*words):
    done = subprocess.run([*argv, *words], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def fill():
    descriptor = os.open(folder + "/filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, b"x" * 4096)
    except OSError:
        os.close(descriptor)

if kind == "full":
    print(run("--", "true"))
    fill()
    before = sorted(os.listdir(root + "/sessions"))
    print(run("--", "echo", "never"))
    same = sorted(os.listdir(root + "/sessions")) == before
    print(same, os.listdir(root + "/sockets"), os.listdir(root + "/staging"))
    print(run("--list")[0])
    os.unlink(folder + "/filler")
    print(run("--", "echo", "again"))
    print(run("--prune")[1].count("PRUNED"))
elif kind == "fills":
    # Full while the command runs: its exit status is what it was, and the agent is gone.
    code, out, err = run("--", "sh", "-c", "dd if=/dev/zero of=%s/filler bs=4k 2>/dev/null; exit 5" % folder)
    print((code, out, err.count("\\n"), "cannot be written down" in err, os.listdir(root + "/sockets")))
    os.unlink(folder + "/filler")
    # Its event had room at the end of the audit, its record had none.
    print("stopped" in run("--list")[1])
    print(run("--prune")[1].count("PRUNED"))
else:
    print(run("--", "true"))
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    print(run("--", "echo", "never"))
    code, out, err = run("--list")
    print((code, "stopped" in out, err))
    print(run("--prune")[0])
    # There was never a root.
    root = folder + "/none"
    argv[-1] = root
    print(run("--", "echo", "never"), os.path.exists(root))
"""


@AS_ROOT
@pytest.mark.parametrize("kind", ["full", "fills", "read-only"])
def test_a_disk_that_cannot_be_written(world: World, kind: str) -> None:
    make_key(world.key)
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    done = in_a_namespace(DISK, str(world.folder / "disk"), str(world.key), kind)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if kind == "full":
        assert lines[0] == "(0, '', '')"
        assert lines[1].startswith("(125, '', 'codex-openclaw-ssh-agent: ")
        assert "No space left on device" in lines[1]
        assert lines[1].count("\\n") == 1
        assert lines[2] == "True [] []"
        assert lines[3:] == ["0", "(0, 'again\\n', '')", "2"]
    elif kind == "fills":
        assert lines == ["(5, '', 1, True, [])", "True", "1"]
    else:
        assert lines[1].startswith("(125, '', 'codex-openclaw-ssh-agent: ")
        assert "Read-only file system" in lines[1]
        assert lines[2:4] == ["(0, True, '')", "125"]
        assert lines[4].startswith("(125, '', 'codex-openclaw-ssh-agent: ")
        assert "none cannot be made: Read-only file system" in lines[4]
        assert lines[4].endswith(" False")


def test_a_root_others_prepared_is_refused_by_the_program(world: World) -> None:
    make_key(world.key)
    world.root.mkdir(mode=0o755)
    for words in (("--", "true"), ("--list",), ("--prune",), ("--stop", "20260101T000000Z-00000000")):
        done = world.run(*words)
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert "not used and not changed" in done.stderr
    assert stat.S_IMODE(world.root.stat().st_mode) == 0o755
    assert not list(world.root.iterdir())


def test_list_of_nothing(world: World) -> None:
    make_key(world.key)
    done = world.run("--list", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"schema": 1, "sessions": []})
    assert world.run("--prune").stdout == ""
    assert not world.root.exists()
