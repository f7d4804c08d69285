"""The root, the records and the audit of agent access: what is made, what is believed, what is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quietport.sshagent import audit, cli, sessions
from quietport.sshagent.names import AgentAccessError, duration, moment_of, now, seconds_of, stamp
from quietport.sshagent.process import Process, boot_id, start_of
from quietport.sshagent.prune import prune
from quietport.sshagent.record import InvalidError, Record, parse_agent_env, parse_record
from quietport.sshagent.root import MissingError, UnsafeError, locked, open_root, root_path
from quietport.sshagent.stop import stop
from tests.unit.sshagent_world import World, gone_pid, short_folder

HERE = Process.of(os.getpid())
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = short_folder(tmp_path_factory)
    return World(folder, folder / "no-key")


def words(world: World, *, dry: bool = False) -> dict[str, str]:
    with closing(world.opened()) as root:
        return {verdict.id: verdict.word for verdict in prune(root, dry=dry)}


def status(world: World, name: str) -> str:
    with closing(world.opened()) as root:
        return sessions.look(root, name).status


def test_the_root_is_private_whatever_the_umask(world: World) -> None:
    for mask in (0o000, 0o022, 0o077):
        folder = world.folder / f"r{mask}"
        previous = os.umask(mask)
        try:
            open_root(str(folder), create=True, sockets=True).close()
        finally:
            os.umask(previous)
        for place in (folder, folder / "sessions", folder / "sockets"):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "sessions", "sockets"])
@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o600, 0o1700, 0o500, 0o777])
def test_a_directory_of_another_mode_is_refused_and_left(world: World, name: str, mode: int) -> None:
    world.opened().close()
    place = world.root / name
    place.chmod(mode)
    with pytest.raises(UnsafeError, match="not used and not changed"):
        world.opened()
    assert stat.S_IMODE(place.stat().st_mode) == mode
    place.chmod(0o700)
    world.opened().close()


@pytest.mark.parametrize("name", ["", "sessions", "sockets"])
def test_a_link_is_refused_and_not_followed(world: World, name: str) -> None:
    world.opened().close()
    place = world.root / name
    elsewhere = world.folder / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    with pytest.raises(UnsafeError, match="not followed"):
        world.opened()
    assert sorted(elsewhere.iterdir()) == before
    place.unlink()
    place.write_text("a file")
    with pytest.raises(UnsafeError):
        world.opened()


@AS_ROOT
@pytest.mark.parametrize("name", ["", "sessions"])
def test_another_owner_is_refused(world: World, name: str) -> None:
    world.opened().close()
    os.chown(world.root / name, 12345, 12345)
    with pytest.raises(UnsafeError, match="uid 12345"):
        world.opened()


def test_a_parent_others_can_change_is_refused(world: World) -> None:
    shared = world.folder / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UnsafeError, match="changed by others"):
        open_root(str(shared / "r"), create=True, sockets=False)
    assert not list(shared.iterdir())
    shared.chmod(0o1777)
    open_root(str(shared / "r"), create=True, sockets=False).close()


def test_nothing_is_made_to_look_at(world: World) -> None:
    with pytest.raises(MissingError):
        world.opened(create=False)
    assert not world.root.exists()
    for name in ("", "/", "..", "a/..", "x/../y", "\0"):
        with pytest.raises(AgentAccessError):
            root_path(name)


def test_the_root_is_the_user_s_by_uid(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    import pwd

    entry = pwd.struct_passwd(("u", "x", os.geteuid(), 0, "", str(world.folder), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("XDG_STATE_HOME", "/nowhere")
    root = open_root(None, create=True, sockets=False)
    assert root.path == world.folder / ".local/state/codex-openclaw-ssh-agent"
    assert root.sockets_path == Path(f"/run/user/{os.geteuid()}/codex-openclaw-ssh-agent")
    root.close()
    assert stat.S_IMODE((world.folder / ".local").stat().st_mode) == 0o700


def test_the_lock_keeps_others_out_for_a_while(world: World) -> None:
    with closing(world.opened()) as first, closing(world.opened()) as second:
        with (
            locked(first),
            pytest.raises(AgentAccessError, match="still locked"),
            locked(second, timeout=0.05),
        ):
            pass
        with locked(second, timeout=0.05):
            pass


def test_durations() -> None:
    assert [seconds_of(text) for text in ("90", "90s", "30m", "2h", "7d")] == [90, 90, 1800, 7200, 604800]
    assert [duration(s) for s in (1, 60, 90, 1800, 86400, 604800)] == ["1s", "1m", "90s", "30m", "24h", "7d"]
    for text in ("", "-1", "1.5", "1w", "s", " 1", "1 ", "٣"):
        with pytest.raises(ValueError, match="duration"):
            seconds_of(text)


def test_pid_reuse_is_told_apart() -> None:
    assert not HERE.gone()
    assert HERE.proved()
    # The same PID, of a process that began at another time or in another boot.
    assert replace(HERE, start=(HERE.start or 0) - 1).gone()
    assert replace(HERE, boot="0").gone()
    assert Process(gone_pid(), 1, boot_id()).gone()
    # Unknown start: only kill(2) counts.
    unknown = replace(HERE, start=None)
    assert not unknown.gone()
    assert not unknown.proved()


def test_what_proc_does_not_show_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietport.sshagent.process.start_of", lambda pid: None)
    assert not HERE.gone()
    assert not HERE.proved()
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError))
    assert not HERE.gone()


def test_status_from_what_can_be_proved(world: World) -> None:
    nobody = Process(gone_pid(), 1, boot_id())
    reused = replace(HERE, start=1)
    cases = [
        ({"wrapper": HERE, "agent": HERE}, "active", None),
        ({"wrapper": nobody, "agent": HERE}, "crashed", "wrapper-died"),
        ({"wrapper": reused, "agent": HERE}, "crashed", "wrapper-died"),
        ({"wrapper": HERE, "agent": nobody}, "crashed", "agent-died"),
        ({"wrapper": HERE, "agent": reused}, "crashed", "agent-died"),
        ({"wrapper": replace(HERE, boot="0"), "agent": HERE}, "crashed", "host-rebooted"),
        ({"wrapper": HERE, "agent": HERE, "ttl_s": 1, "at": now() - timedelta(seconds=2)}, "expired", "ttl"),
        ({"wrapper": nobody, "agent": nobody, "ttl_s": 1, "at": now() - timedelta(seconds=2)}, "crashed",
         "wrapper-died"),
        ({"status": "stopped", "exit_reason": "command-ended", "ended_at": stamp(now())}, "stopped",
         "command-ended"),
    ]  # fmt: skip
    made = [(world.fabricate(**changes), expected, reason) for changes, expected, reason in cases]
    for _ in (1, 2):  # a second look finds it written down, and says the same
        with closing(world.opened()) as root:
            found, problem = sessions.everything(root)
        assert problem == ""
        by_id = {session.id: session.to_json() for session in found}
        for record, expected, reason in made:
            entry = by_id[record.id]
            assert (entry["status"], entry["exit_reason"]) == (expected, reason)
    events = world.events()
    assert events.count("crashed") == 6
    assert events.count("expired") == 1
    words_of = words(world)
    alive = [record.id for record, _, _ in made if not record.agent.gone()]
    assert {words_of[name] for name in alive} == {"SKIP_ACTIVE", "SKIP_AGENT_ALIVE"}
    assert sum(word == "PRUNED" for word in words_of.values()) == len(made) - len(alive)
    assert words(world) == {name: words_of[name] for name in alive}


def test_the_event_of_a_crash_is_written_once_also_when_its_writer_was_killed_in_between(
    world: World,
) -> None:
    record = world.fabricate()
    with closing(world.opened()) as root, locked(root):
        audit.append(root, "crashed", record.id, reason="wrapper-died", duration_s=None, exit_status=None)
    with closing(world.opened()) as root:
        sessions.everything(root)
    assert world.events() == ["created", "crashed"]
    assert json.loads((world.directory(record) / "session.json").read_text())["status"] == "crashed"


def test_an_end_that_is_in_the_audit_alone_is_believed(world: World) -> None:
    """Its writer was killed between the event and the record."""
    record, odd = world.fabricate(), world.fabricate()
    with closing(world.opened()) as root, locked(root):
        told = {"reason": "command-ended", "duration_s": 12.5, "exit_status": 4}
        audit.append(root, "stopped", record.id, **told)
        audit.append(root, "stopped", odd.id, reason=["no"], duration_s="x", exit_status=999)
    for _ in (1, 2):
        with closing(world.opened()) as root:
            entries = {session.id: session.to_json() for session in sessions.everything(root)[0]}
        entry = entries[record.id]
        assert (entry["status"], entry["exit_reason"]) == ("stopped", "command-ended")
        assert (entry["duration_s"], entry["exit_status"]) == (12.5, 4)
        assert entry["ended_at"] is not None
        assert entries[odd.id]["status"] == "crashed"
    assert world.events() == ["created", "created", "stopped", "stopped"]


def test_what_is_wrong_with_a_session_has_a_name(world: World) -> None:
    world.opened().close()
    names = {}
    for kind in ("unknown", "invalid", "mode", "file-mode", "linked-file", "two-names", "no-env", "open-env",
                 "linked-env", "bad-env", "other-env", "more", "directory-env", "fine"):  # fmt: skip
        record = world.fabricate()
        place = world.directory(record)
        names[kind] = record.id
        environment, document = place / "agent.env", place / "session.json"
        if kind == "unknown":
            document.unlink()
        elif kind == "invalid":
            document.write_text("{")
        elif kind == "mode":
            place.chmod(0o755)
        elif kind == "file-mode":
            document.chmod(0o640)
        elif kind == "linked-file":
            document.rename(world.folder / "moved")
            document.symlink_to(world.folder / "moved")
        elif kind == "two-names":
            (world.folder / "second").hardlink_to(document)
        elif kind == "no-env":
            environment.unlink()
        elif kind == "open-env":
            environment.chmod(0o644)
        elif kind == "linked-env":
            environment.rename(world.folder / "env")
            environment.symlink_to(world.folder / "env")
        elif kind == "bad-env":
            environment.write_text("SSH_AUTH_SOCK=/x\nSSH_AGENT_PID=1\n")
        elif kind == "other-env":
            environment.write_text(f"SSH_AUTH_SOCK=/x\nSSH_AGENT_PID={os.getpid()}\n")
        elif kind == "more":
            (place / "precious").write_text("x")
        elif kind == "directory-env":
            environment.unlink()
            environment.mkdir()
    sessions_of = world.root / "sessions"
    (sessions_of / "link").symlink_to(world.folder)
    (sessions_of / "file").write_text("x")
    (sessions_of / "other-name").mkdir(mode=0o700)
    (sessions_of / "\udcff").mkdir(mode=0o700)
    expected = {
        "unknown": "SKIP_UNKNOWN", "invalid": "SKIP_INVALID", "mode": "SKIP_UNSAFE",
        "file-mode": "SKIP_UNSAFE", "linked-file": "SKIP_UNSAFE",
        "two-names": "SKIP_UNSAFE", "no-env": "SKIP_NO_AGENT_ENV",
        "open-env": "SKIP_AGENT_ENV_NOT_PRIVATE", "linked-env": "SKIP_AGENT_ENV_NOT_PRIVATE",
        "directory-env": "SKIP_AGENT_ENV_NOT_PRIVATE", "bad-env": "SKIP_NO_AGENT_ENV",
        "other-env": "SKIP_INVALID", "more": "SKIP_INVALID", "fine": "PRUNED",
    }  # fmt: skip
    before = snapshot(world.folder)
    dry = words(world, dry=True)
    assert snapshot(world.folder) == before  # a dry run writes nothing
    found = words(world)
    for kind, word in expected.items():
        assert found[names[kind]] == word, kind
        assert dry[names[kind]] == word.replace("PRUNED", "WOULD_PRUNE"), kind
    assert (found["link"], found["file"], found["other-name"], found["\udcff"]) == (
        "SKIP_UNSAFE", "SKIP_UNSAFE", "SKIP_UNKNOWN", "SKIP_UNKNOWN",
    )  # fmt: skip
    assert not (sessions_of / names["fine"]).exists()
    gone = {f"r/sessions/{names['fine']}", *(f"r/sessions/{names['fine']}/{n}" for n in FILES)}
    kept = set(before) - gone
    assert kept <= set(snapshot(world.folder))
    assert cli.main(["--list", "--json", "--runtime-root", str(world.root)]) == 0
    # Exit code 0 though everything is skipped.
    assert set(words(world).values()) <= {one for one in expected.values() if one.startswith("SKIP_")}
    assert cli.main(["--prune", "--runtime-root", str(world.root)]) == 0


FILES = ("agent.env", "session.json")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for place in sorted(folder.rglob("*")):
        status_of = place.lstat()
        data = place.read_bytes() if stat.S_ISREG(status_of.st_mode) else b""
        found[str(place.relative_to(folder))] = (status_of.st_mode, data)
    return found


def test_a_dry_run_does_not_write_down_a_crash(world: World) -> None:
    record = world.fabricate()
    assert words(world, dry=True) == {record.id: "WOULD_PRUNE"}
    assert world.events() == ["created"]
    assert words(world) == {record.id: "PRUNED"}
    assert world.events() == ["created", "crashed", "pruned"]


def valid(name: str) -> bytes:
    moment = now()
    record = Record(
        id=name, created_at=stamp(moment), expires_at=stamp(moment + timedelta(seconds=60)), ttl_s=60,
        deadline_s=1.5, hosts=(), wrapper=HERE, keeper=HERE, agent=HERE,
    )  # fmt: skip
    return record.to_bytes()


NAME = "20260102T030405Z-0123abcd"
ANY = settings(max_examples=70, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@ANY
@given(data=st.binary(max_size=400))
def test_any_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(InvalidError):
        parse_record(data, name=NAME)


@ANY
@given(key=st.sampled_from(sorted(json.loads(valid(NAME)))), value=JSON)
def test_any_value_in_a_record_is_refused_or_understood(key: str, value: object) -> None:
    document = {**json.loads(valid(NAME)), key: value}
    data = json.dumps(document).encode(errors="surrogatepass")
    try:
        record = parse_record(data, name=NAME)
    except InvalidError:
        return
    assert parse_record(record.to_bytes(), name=NAME) == record


def test_records_that_contradict_themselves() -> None:
    fine = json.loads(valid(NAME))
    assert parse_record(json.dumps({**fine, "later": 1}).encode(), name=NAME).id == NAME
    for changes in (
        {"id": "x"}, {"schema": 2}, {"ttl_s": 0}, {"ttl_s": 61}, {"ttl_s": True}, {"ttl_s": 60.0},
        {"status": "stopped"}, {"exit_reason": "ttl"}, {"created_at": "2026-13-01T00:00:00.000Z"},
        {"agent": {"pid": 1, "start": 1, "boot": "0"}}, {"agent": {"pid": 1 << 30, "start": 1, "boot": "0"}},
        {"agent": {"pid": -1, "start": 1, "boot": "0"}}, {"duration_s": -1},
        {"deadline_s": None}, {"deadline_s": "1"}, {"exit_status": 256},
    ):  # fmt: skip
        with pytest.raises(InvalidError):
            parse_record(json.dumps({**fine, **changes}).encode(), name=NAME)
    for data in (b"[" * 5000, b'{"a":' * 3000, b"\xff", b"NaN", b"1" * 5000, b" " * 20000 + b"{}"):
        with pytest.raises(InvalidError):
            parse_record(data, name=NAME)


@ANY
@given(
    data=st.binary(max_size=80)
    | st.from_regex(rb"SSH_AUTH_SOCK=/[a-z]*\nSSH_AGENT_PID=[0-9]*\n?", fullmatch=True)
)
def test_any_bytes_in_agent_env(data: bytes) -> None:
    try:
        pid = parse_agent_env(data)
    except InvalidError:
        return
    assert pid > 1
    assert f"SSH_AGENT_PID={pid}\n".encode() in data


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.binary(max_size=60) | st.just(None), environment=st.binary(max_size=60) | st.just(None))
def test_no_bytes_in_a_session_make_prune_delete_it(
    tmp_path_factory: pytest.TempPathFactory, document: bytes | None, environment: bytes | None
) -> None:
    if document is None and environment is None:
        return  # that one is whole, and may go
    world = World(tmp_path_factory.mktemp("w"), Path("/none"))
    record, whole = world.fabricate(), world.fabricate()
    for name, data in (("session.json", document), ("agent.env", environment)):
        if data is not None:
            (world.directory(record) / name).write_bytes(data)
    before = snapshot(world.directory(record))
    found = words(world)
    assert found[record.id].startswith("SKIP_")
    assert found[whole.id] == "PRUNED"  # the positive control
    after = snapshot(world.directory(record))
    if document is not None:
        assert after == before
    assert set(after) == set(before)
    assert status(world, record.id) in sessions.STATUSES


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(("session.json", "agent.env")),
    at=st.integers(0, 900),
    cut=st.integers(0, 30),
    put=st.binary(max_size=6) | st.sampled_from((b"1", b"-1", b"null", b'"', b"}", b"stopped", b"\n")),
)
def test_no_change_of_bytes_makes_prune_delete_what_is_not_valid(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: int, cut: int, put: bytes
) -> None:
    """Nearer to what is valid than any bytes are."""
    world = World(tmp_path_factory.mktemp("w"), Path("/none"))
    record, other = world.fabricate(), world.fabricate(wrapper=HERE, agent=HERE, keeper=HERE)
    place = world.directory(record) / name
    whole = place.read_bytes()
    at = min(at, len(whole))
    place.write_bytes(whole[:at] + put + whole[at + cut :])
    kept = snapshot(world.directory(other))
    data = {file: (world.directory(record) / file).read_bytes() for file in FILES}
    word = words(world)[record.id]
    assert snapshot(world.directory(other)) == kept
    try:
        found = parse_record(data["session.json"], name=record.id)
        pid = parse_agent_env(data["agent.env"])
    except InvalidError:
        assert word.startswith("SKIP_")
    else:
        assert word != "PRUNED" or (pid == found.agent.pid and found.agent.gone())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_in_the_audit(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    world = World(tmp_path_factory.mktemp("w"), Path("/none"))
    with closing(world.opened()) as root:
        place = world.root / "audit.jsonl"
        place.write_bytes(data)
        place.chmod(0o600)
        with locked(root):
            audit.append(root, "created", NAME, ttl_s=1)
        trail = audit.read(root)
        assert trail.events[-1].id == NAME
        assert place.read_bytes().startswith(data)
        assert trail.damaged == sum(1 for line in data.split(b"\n") if line)


def test_a_torn_line_costs_only_itself(world: World) -> None:
    record = world.fabricate()
    place = world.root / "audit.jsonl"
    whole = place.read_bytes()
    for size in range(1, len(whole) - 1, 7):
        place.write_bytes(whole + whole[:size])
        with closing(world.opened()) as root:
            with locked(root):
                audit.append(root, "pruned", record.id)
            trail = audit.read(root)
        assert [one.event for one in trail.events] == ["created", "pruned"]
        assert trail.damaged == 1


def test_a_line_that_does_not_fit_is_taken_back(world: World) -> None:
    record = world.fabricate()
    place = world.root / "audit.jsonl"
    before = place.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(world.opened()) as root, locked(root):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(AgentAccessError, match=r"audit\.jsonl cannot be written"):
                audit.append(root, "pruned", record.id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert place.read_bytes() == before
        audit.append(root, "pruned", record.id)
    assert world.events() == ["created", "pruned"]


@pytest.mark.parametrize("kind", ["mode", "link", "fifo", "second-name", "directory"])
def test_an_audit_that_is_not_private_is_not_written_to(world: World, kind: str) -> None:
    record = world.fabricate()
    place, other = world.root / "audit.jsonl", world.folder / "other"
    if kind == "mode":
        place.chmod(0o644)
    elif kind == "second-name":
        other.hardlink_to(place)
    else:
        place.rename(other)
        if kind == "link":
            place.symlink_to(other)
        elif kind == "fifo":
            os.mkfifo(place, 0o600)
        else:
            place.mkdir(mode=0o600)
    before = snapshot(world.folder)
    with closing(world.opened()) as root, locked(root), pytest.raises(AgentAccessError):
        audit.append(root, "pruned", record.id)
    assert snapshot(world.folder) == before
    # What is listed is true, though it cannot be written down.
    with closing(world.opened()) as root:
        (session,), problem = sessions.everything(root)
    assert (session.status, bool(problem)) == ("crashed", True)


def test_rotation_keeps_ninety_days_and_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    record = world.fabricate()
    moment = now()
    day = timedelta(days=1)
    most = 0
    # Four lines a day, the size limit small enough to matter.
    monkeypatch.setattr(audit, "ROTATE_BYTES", 2000)
    with closing(world.opened()) as root, locked(root):
        for hours in range(0, 24 * 300, 6):
            later = moment + timedelta(hours=hours)
            monkeypatch.setattr(audit, "now", lambda later=later: later)
            audit.append(root, "pruned", record.id)
            if hours % 240 == 0:
                most = max(most, len(audit.read(root).events))
        trail = audit.read(root)
    oldest, newest = trail.events[0].at, trail.events[-1].at
    assert newest - oldest >= 90 * day
    assert newest - oldest <= 125 * day
    assert most < 4 * 130
    # By age alone, too: a first line of 30 days.
    monkeypatch.setattr(audit, "ROTATE_BYTES", 1 << 20)
    with closing(world.opened()) as root, locked(root):
        count = len(list(world.root.glob("audit-*.jsonl")))
        monkeypatch.setattr(audit, "now", lambda: newest + 31 * day)
        audit.append(root, "pruned", record.id)
        assert len(list(world.root.glob("audit-*.jsonl"))) != count
    assert all(stat.S_IMODE(place.stat().st_mode) == 0o600 for place in world.root.glob("audit*"))


def test_every_event_goes_to_the_journal_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda priority, line: said.append(line))
    world.fabricate()
    words(world)
    assert said == (world.root / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in said] == ["created", "crashed", "pruned"]


def asleep() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(name="sleeper")
def _sleeper() -> Iterator[subprocess.Popen[bytes]]:
    yield from asleep()


@pytest.fixture(name="keeper")
def _keeper() -> Iterator[subprocess.Popen[bytes]]:
    yield from asleep()


def asked_to_stop(world: World, record: Record) -> str:
    with closing(world.opened()) as root:
        return stop(root, record.id)


def test_stop_signals_only_what_is_certainly_the_agent(
    world: World, sleeper: subprocess.Popen[bytes], keeper: subprocess.Popen[bytes]
) -> None:
    there, parent = Process.of(sleeper.pid), Process.of(keeper.pid)
    reused = world.fabricate(agent=replace(there, start=1), wrapper=HERE)
    assert asked_to_stop(world, reused) == "ALREADY_ENDED"
    another_boot = world.fabricate(agent=replace(there, boot="0"), wrapper=replace(HERE, boot="0"))
    assert asked_to_stop(world, another_boot) == "ALREADY_ENDED"
    # As with hidepid, where ssh-agent is not shown.
    hidden = replace(there, start=None)
    for other in (replace(parent, start=1), replace(parent, start=None), Process(gone_pid(), 1, boot_id())):
        with pytest.raises(AgentAccessError, match="cannot be proved"):
            asked_to_stop(world, world.fabricate(agent=hidden, keeper=other, wrapper=HERE))
    assert sleeper.poll() is None
    # A reaper, as the watch is one for the agent.
    reaper = threading.Thread(target=sleeper.wait)
    reaper.start()
    running = world.fabricate(agent=hidden, keeper=parent, wrapper=HERE)
    assert asked_to_stop(world, running) == "STOPPED"
    reaper.join()
    assert (sleeper.returncode, keeper.poll()) == (-signal.SIGTERM, None)
    assert world.trail().has("stopped", running.id)


def test_stop_ends_the_agent_of_a_session_that_crashed(
    world: World, sleeper: subprocess.Popen[bytes]
) -> None:
    record = world.fabricate(agent=Process.of(sleeper.pid))
    assert words(world) == {record.id: "SKIP_AGENT_ALIVE"}
    reaper = threading.Thread(target=sleeper.wait)
    reaper.start()
    assert asked_to_stop(world, record) == "STOPPED"
    reaper.join()
    assert world.events() == ["created", "crashed"]
    assert words(world) == {record.id: "PRUNED"}


def test_stop_of_what_is_no_session(world: World) -> None:
    record = world.fabricate()
    (world.directory(record) / "session.json").write_text("{")
    with pytest.raises(AgentAccessError, match="is invalid"):
        asked_to_stop(world, record)
    with closing(world.opened()) as root:
        for name in ("", "..", "x", f"{record.id}/"):
            with pytest.raises(AgentAccessError, match="not the id"):
                stop(root, name)


def test_staged_leftovers_of_a_killed_process_go(world: World) -> None:
    record = world.fabricate()
    started, published = "20260102T030405Z-00000001", "20260102T030405Z-00000002"
    with closing(world.opened()) as root, locked(root):
        audit.append(root, "created", published, ttl_s=5)
    staging = world.root / "staging"
    for name in (f"new-{started}", f"new-{published}", "new-x", "other"):
        (staging / name).mkdir(mode=0o700)
        file = staging / name / "agent.env"
        file.write_text(f"SSH_AUTH_SOCK=/x/{name[4:]}")
        file.chmod(0o600)
    # It has the name of one of ours, and holds something else.
    theirs = staging / "new-20260102T030405Z-00000003"
    theirs.mkdir(mode=0o700)
    (theirs / "session.json").write_text("{}")
    (theirs / "session.json").chmod(0o600)
    # Killed between the rename and the event of a prune.
    with closing(world.opened()) as root:
        sessions.everything(root)
    world.directory(record).rename(staging / f"pruned-{record.id}")
    assert words(world) == {}
    assert sorted(place.name for place in staging.iterdir()) == [theirs.name, "new-x", "other"]
    assert (theirs / "session.json").read_text() == "{}"
    found = [(one.event, one.id) for one in world.trail().events]
    assert ("pruned", record.id) in found
    assert found.count(("crashed", published)) == 1
    assert started not in [one[1] for one in found]


def test_sockets_that_nobody_listens_on_go_after_a_while(world: World) -> None:
    import socket

    record = world.fabricate()
    world.fabricate()
    sockets = world.root / "sockets"
    listening, dead, new = (sockets / f"20260102T030405Z-0000000{n}" for n in range(3))
    keep = []
    for place in (listening, dead, new, sockets / record.id):
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(place))
        if place == listening:
            server.listen()
            keep.append(server)
        else:
            server.close()
        if place != new:
            os.utime(place, (time.time() - 120,) * 2)
    (sockets / "20260102T030405Z-0000000f").write_text("no socket")
    words(world)
    assert sorted(place.name for place in sockets.iterdir()) == sorted(
        [listening.name, new.name, "20260102T030405Z-0000000f"]
    )
    keep[0].close()


def test_times() -> None:
    moment = now()
    assert abs(moment_of(stamp(moment)) - moment) < timedelta(milliseconds=1)
    for text in ("", "2026-01-01", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000+00:00", 5, None,
                 "0000-01-01T00:00:00.000Z"):  # fmt: skip
        with pytest.raises(ValueError):
            moment_of(text)
    assert start_of(gone_pid()) is None
