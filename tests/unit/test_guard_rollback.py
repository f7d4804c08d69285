"""The guard on a played host: armed, changed, undone, killed at every point; the old state, complete."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quietport import opened, sshd, sshd_follow
from quietport.guard import arming, cli, files, firewall, rollback, scope, state
from quietport.guard.machine import GuardError, Log
from quietport.opened import Opened
from tests.unit.guard_world import OLD_MAIN, SSH_RULE, TAILNET, UFW_CONF, USER_RULES, Killed, World, left_in


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietport.guard.machine.syslog.syslog", lambda *_: None)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def undo(world: World, why: str = "timeout") -> tuple[bool | None, list[str]]:
    log = Log(aloud=False)
    return rollback.roll_back(world.machine, None, why=why, log=log), log.lines


def seen(world: World) -> scope.Observed:
    return scope.look(world.machine)


def public(world: World) -> None:
    """A blank host."""


def public_with_ufw(world: World) -> None:
    world.switch_ufw_on(SSH_RULE)


def by_socket(world: World) -> None:
    world.link("/etc/systemd/system/sockets.target.wants/ssh.socket", "/lib/systemd/system/ssh.socket")
    world.active.add("ssh.socket")
    world.active.discard(sshd.UNIT)
    world.reload()
    world.stop_sshd()


def converged(world: World) -> None:
    world.converge()


def open_to_all(world: World) -> None:
    """What an undo does to a converged host: another way round."""
    for path in (sshd.DROP_IN, sshd.UNIT_DROP_IN, "/etc/systemd/system/ssh.socket"):
        world.path(path).unlink()
    world.path(sshd.UNIT_DROP_IN).parent.rmdir()
    world.write(sshd.MAIN, OLD_MAIN)
    world._ufw(on=False)
    world.reload()
    world.start_sshd()


def deny_everything(world: World) -> None:
    world.converge()
    world.switch_ufw_on("-A ufw-user-input -j DROP")


def preferences(world: World) -> None:
    world.prefs = {"RunSSH": True, "ShieldsUp": True, "Hostname": "other"}


STARTS: tuple[Callable[[World], None], ...] = (public, public_with_ufw, by_socket, converged)
CHANGES: tuple[Callable[[World], None], ...] = (converged, deny_everything, preferences)


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("start", STARTS, ids=lambda one: one.__name__)
def test_the_old_state_is_back(
    world: World, start: Callable[[World], None], change: Callable[[World], None]
) -> None:
    start(world)
    before = seen(world)
    world.arm()
    change(world)
    done, said = undo(world)
    assert done, said
    assert scope.compare(before, seen(world)) == []
    assert seen(world).listeners == before.listeners
    assert left_in(world) == []
    assert said[-1] == "the old state is back"


def test_from_the_tailnet_back_to_the_tailnet(world: World) -> None:
    world.converge()
    before = seen(world)
    world.arm()
    open_to_all(world)
    assert scope.compare(before, seen(world)) != [], "the control: it is another state"
    done, said = undo(world)
    assert done, said
    assert scope.compare(before, seen(world)) == []
    assert seen(world).listeners == {(TAILNET, 22)}


def test_what_nobody_touched_is_not_touched(world: World) -> None:
    """No restart of sshd, no rule loaded: undoing nothing changes nothing."""
    world.converge()
    world.arm()
    world.ran.clear()
    done, said = undo(world)
    assert done, said
    lines = [" ".join(words) for words in world.ran]
    assert [
        line for line in lines if "restart" in line.split() or line.startswith(("ufw", "iptables-restore"))
    ] == []


@pytest.mark.parametrize("start", [public_with_ufw, converged])
def test_an_active_ufw_is_never_switched_off(world: World, start: Callable[[World], None]) -> None:
    start(world)
    world.arm()
    deny_everything(world)
    world.ran.clear()
    done, said = undo(world)
    assert done, said
    assert [words for words in world.ran if words[0] == "ufw" or "ufw.service" in words[2:3]] == []
    assert [words for words in world.ran if words[0] == "iptables-restore"], "the control: rules were loaded"


def test_opened_before_sshd_and_closed_after_it(world: World) -> None:
    public(world)
    world.arm()
    world.converge()
    world.ran.clear()
    undo(world)
    assert order(world, "ufw --force disable") < order(world, "systemctl --no-block restart ssh.service")
    world.switch_ufw_on(SSH_RULE)
    world.arm()
    world.write(sshd.DROP_IN, "ListenAddress 127.0.0.1\n")
    world.start_sshd()
    world._ufw(on=False)
    world.ran.clear()
    done, said = undo(world)
    assert done, said
    assert order(world, "systemctl --no-block restart ssh.service") < order(world, "ufw --force enable")


def order(world: World, line: str) -> int:
    return [" ".join(words) for words in world.ran].index(line)


def test_the_address_of_now_is_taken_not_that_of_then(world: World) -> None:
    world.converge()
    world.arm()
    world.addresses["tailscale0"] = ["100.64.0.9"]
    open_to_all(world)
    done, said = undo(world)
    assert done, said
    assert sshd.listen_addresses(world.path(sshd.DROP_IN).read_text()) == ["100.64.0.9"]
    assert seen(world).listeners == {("100.64.0.9", 22)}


def test_what_the_follower_wrote_is_left(world: World) -> None:
    world.converge()
    world.arm()
    world.addresses["tailscale0"] = ["100.64.0.9"]
    moved = sshd.with_addresses(world.path(sshd.DROP_IN).read_text(), ["100.64.0.9"])
    world.write(sshd.DROP_IN, moved)
    world.start_sshd()
    done, said = undo(world)
    assert done, said
    assert world.path(sshd.DROP_IN).read_text() == moved


def test_without_the_tailnet_it_does_not_claim_to_listen(world: World) -> None:
    world.converge()
    world.arm()
    world.addresses["tailscale0"] = []
    open_to_all(world)
    done, said = undo(world)
    assert done, said
    assert "no address of the tailnet is there now: sshd takes it up when it comes" in said
    assert "sshd listens on nothing" in said


@pytest.mark.parametrize(
    ("fails", "named"),
    [
        ("systemctl --no-block restart", "sshd"),
        ("ufw", "ufw"),
        ("systemctl daemon-reload", "masked"),
        ("systemctl show --property=Id", "systemctl show"),
        ("tailscale set", "tailscale"),
    ],
)
def test_it_never_reports_a_success_it_did_not_have(world: World, fails: str, named: str) -> None:
    before = seen(world)
    armed = world.arm()
    world.converge()
    preferences(world)
    world.fails[fails] = "told to fail"
    if fails == "ufw":
        world.fails["/lib/ufw/ufw-init"] = "told to fail too"
    done, said = undo(world)
    assert done is False
    assert said[-1] == "not everything could be undone; it is tried again"
    assert any(line.startswith("not as before: ") and named in line for line in said), said
    assert state.read_armed(world.machine) == armed
    assert state.history(world.machine)[0]["how"] == "incomplete"
    world.fails.clear()
    done, said = undo(world)
    assert done, said
    assert scope.compare(before, seen(world)) == []
    (entry,) = state.history(world.machine)
    assert entry["how"] == "rolled back"
    assert "not everything could be undone; it is tried again" in entry["log"]


def test_a_way_that_fails_does_not_matter_when_the_end_is_right(world: World) -> None:
    world.arm()
    world.converge()
    world.fails["ufw"] = "ufw trips over its files"
    world.hooks["/lib/ufw/ufw-init force-stop"] = lambda: world._ufw(on=False)
    done, said = undo(world)
    assert done, said
    assert ["/lib/ufw/ufw-init", "force-stop"] in world.ran


def test_sshd_that_refuses_the_old_files_is_left_as_it_runs(world: World) -> None:
    world.arm()
    world.converge()
    pid = world.pid
    world.fails["/usr/sbin/sshd -t"] = "line 3: Bad configuration option"
    done, said = undo(world)
    assert done is False
    assert world.pid == pid
    assert any("sshd refuses the old files, and is left as it runs" in line for line in said)


def test_tailscaled_that_is_down_keeps_nothing_from_being_undone(world: World) -> None:
    world.arm()
    world.converge()
    world.fails["tailscale"] = "failed to connect to local tailscaled"
    done, said = undo(world)
    assert done, said
    assert "tailscaled does not answer: its preferences were not looked at" in said


def test_killed_at_any_command_it_is_begun_again_and_ends_the_same(tmp_path: Path) -> None:
    """Every command of a rollback in turn is its last; then it is run once more."""
    ends = []
    for at in range(100):
        world = World(tmp_path / str(at))
        public_with_ufw(world)
        before = seen(world)
        world.arm()
        open_and_tailnet(world)
        world.dies_at = len(world.ran) + at
        try:
            undo(world)
            break
        except Killed:
            world.dies_at = None
        done, said = undo(world)
        # None: it was killed when armed.json was gone, and only the timer was left to be stopped.
        ends.append(done)
        assert done is not False, (at, said)
        assert scope.compare(before, seen(world)) == [], at
        assert world.arm(), "and what it left is in nobody's way"
        shutil.rmtree(world.root)
    assert len(ends) > 20, "the control: there was something to be killed at"
    assert ends.count(None) == 1


def open_and_tailnet(world: World) -> None:
    deny_everything(world)
    world._ufw(on=False)
    preferences(world)


def test_killed_between_any_two_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen(world)
    world.arm()
    world.converge()
    world.write("/etc/ufw/more.rules", "x")
    world.path("/etc/default/ufw").unlink()
    kills = 0
    for _ in killed_between_files(world, monkeypatch):
        kills += 1
        # What refuses to start a public sshd is never there beside public files.
        public_files = world.path(sshd.MAIN).read_text() == OLD_MAIN
        assert not (public_files and world.path(sshd.UNIT_DROP_IN).exists())
    assert kills > 3, "the control"
    assert scope.compare(before, seen(world)) == []


def killed_between_files(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo, killed before every second file and begun again until it is done; yields at each kill."""
    original = files.Restorer._try
    steps: list[str] = []

    def mortal(self: files.Restorer, path: str, action: Any) -> None:
        if steps:
            raise Killed
        steps.append(path)
        original(self, path, action)

    with monkeypatch.context() as patched:
        patched.setattr(files.Restorer, "_try", mortal)
        while True:
            steps.clear()
            try:
                done, said = undo(world)
                break
            except Killed:
                yield
    assert done, said


def opened_by_hand(world: World) -> None:
    world.path("/etc/quietport").mkdir(exist_ok=True)
    opened.write(Opened(until=2e9), world.path)
    world.write(sshd.DROP_IN, sshd.render((), public=[("0.0.0.0", 22)]))
    world.start_sshd()


def closed_again(world: World) -> None:
    world.write(sshd.DROP_IN, sshd.render([TAILNET]))
    opened.forget(world.path)
    world.start_sshd()


@pytest.mark.parametrize("open_before", [True, False])
def test_killed_between_any_two_files_of_a_host_opened_by_hand(
    world: World, monkeypatch: pytest.MonkeyPatch, *, open_before: bool
) -> None:
    world.converge()
    if open_before:
        opened_by_hand(world)
    before = seen(world)
    armed = world.arm()
    (closed_again if open_before else opened_by_hand)(world)
    assert len(scope.compare(before, seen(world))) > 3, "the control: note, pause, sshd's file and listener"
    kills = 0
    for _ in killed_between_files(world, monkeypatch):
        kills += 1
        # Else sshd's start would not believe its own file.
        is_public = "0.0.0.0" in world.path(sshd.DROP_IN).read_text()
        assert not is_public or opened.read(world.path) is not None
    assert kills > 1, "the control"
    assert scope.compare(before, seen(world)) == []
    assert (opened.read(world.path) is not None) == open_before
    assert world.path(str(sshd_follow.PAUSED)).exists() == open_before
    assert state.history(world.machine)[0]["token"] == armed.token


def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on no file can be written; names can be made and renamed."""
    refused: list[str] = []

    def write(place: Path, *_: Any, **__: Any) -> None:
        refused.append(place.name)
        raise OSError(errno.ENOSPC, "No space left on device", str(place))

    monkeypatch.setattr(files, "write", write)
    return refused


def test_a_full_disk_at_the_rollback(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    public_with_ufw(world)
    before = seen(world)
    world.arm()
    deny_everything(world)
    refused = full_disk(monkeypatch)
    done, said = undo(world)
    assert done, said
    assert refused, "the control: it tried to write"
    assert scope.compare(before, seen(world)) == []


def test_on_a_disk_with_room_the_copies_share_nothing_with_what_is_put_back(world: World) -> None:
    """ufw rewrites its files in place: a shared one would change the copy a second attempt needs."""
    public_with_ufw(world)
    armed = world.arm()
    world.write(USER_RULES, "*filter\nCOMMIT\n")
    old = arming.load(world.machine, armed.token)
    rollback.restore_files(world.machine, armed.token, old, lambda line: None)
    assert world.path(USER_RULES).stat().st_nlink == 1
    with world.path(USER_RULES).open("r+") as stream:
        stream.truncate()
    rollback.restore_files(world.machine, armed.token, old, lambda line: None)
    assert SSH_RULE in world.path(USER_RULES).read_text()


def test_a_damaged_copy_is_no_old_state(world: World) -> None:
    armed = world.arm()
    world.write(sshd.MAIN, "Port 2222\n")
    for place in world.path(state.snapshot_folder(armed.token)).glob("0*"):
        place.write_text("something else\n")
    done, said = undo(world)
    assert done is False
    assert any("is damaged" in line for line in said)
    assert world.path(sshd.MAIN).read_text() == "Port 2222\n"


def test_a_failed_restart_is_not_forgotten_when_the_files_are_in_order(world: World) -> None:
    """Which files sshd runs with shows nowhere: same listeners, same files, and passwords taken."""
    world.arm()
    world.write("/etc/ssh/sshd_config.d/50-new.conf", "PasswordAuthentication yes\n")
    world.fails["systemctl --no-block restart"] = "told to fail"
    done, said = undo(world)
    assert done is False
    assert any("restart" in line for line in said if line.startswith("not as before: sshd")), said
    world.fails.clear()
    pid = world.pid
    done, said = undo(world)
    assert done, said
    assert world.pid == pid + 1
    assert not list(world.path("/run/quietport").glob("*restart*"))


def test_a_file_system_that_turned_read_only_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = world.arm()
    deny_everything(world)

    def refuse(machine: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(state, "remove_armed", refuse)
    done, said = undo(world)
    assert done is False
    assert said[-1] == f"it stays armed, {state.ARMED} cannot be removed: Read-only file system"
    assert world.policies["ipv4"]["INPUT"] == "ACCEPT", "what is in the kernel was undone"
    assert state.read_armed(world.machine) == armed


# As iptables-nft 1.8.9 saved it, of an active ufw beside Docker and tailscaled.
SAVED = """\
# Generated by iptables-save v1.8.9 (nf_tables)
*filter
:INPUT DROP [12:34]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [5:6]
:DOCKER-USER - [0:0]
:ts-input - [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ts-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A DOCKER-USER -j RETURN
-A ts-input -i tailscale0 -j ACCEPT
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-user-input -p tcp -m tcp --dport 80 -m recent --set --name DEFAULT --mask 255.255.255.255 --rsource
-A ufw-user-input -m limit --limit 3/min -j LOG --log-prefix "[UFW LIMIT BLOCK] "
COMMIT
# Completed on Sat
"""


def test_of_the_firewall_only_what_is_ufws_is_put_back() -> None:
    old = firewall.parse(SAVED)
    assert old.policies == {"INPUT": "DROP", "FORWARD": "DROP", "OUTPUT": "ACCEPT"}
    assert old.jumps == {"INPUT": ("-j ufw-before-input", "-j ufw-after-input")}
    text = firewall.restore_text(old, old)
    assert "DOCKER" not in text
    assert "ts-input" not in text
    assert '--log-prefix "[UFW LIMIT BLOCK] "\n' in text
    assert "-A INPUT" not in text, "the jumps are there"
    lines = text.splitlines()
    assert lines.index(":ufw-user-input - [0:0]") < lines.index("-A ufw-before-input -j ufw-user-input")
    now = firewall.parse(SAVED.replace("-A INPUT -j ufw-before-input\n", ""))
    anew = firewall.restore_text(old, now).splitlines()
    assert [line for line in anew if " INPUT " in line and line[0] == "-"] == [
        "-D INPUT -j ufw-after-input",
        "-A INPUT -j ufw-before-input",
        "-A INPUT -j ufw-after-input",
    ]


# Arming.


def no_systemd(world: World) -> None:
    shutil.rmtree(world.path("/run/systemd"))


def no_boot_unit(world: World) -> None:
    world.boot_unit = "disabled"


def timer_gone(world: World) -> None:
    world.hooks["systemctl show --property=ActiveState"] = world.timers.clear


def failing(prefix: str) -> Callable[[World], None]:
    return lambda world: world.fails.update({prefix: "it was told to fail"})


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (no_systemd, "systemd does not run this host"),
        (no_boot_unit, "quietport-guard-boot.service is not enabled"),
        (timer_gone, "does not wait for its time"),
        (failing("systemd-run"), "the rollback cannot be scheduled: it was told to fail"),
        (failing("/usr/sbin/sshd -t"), "sshd refuses its files"),
        (failing("/usr/bin/python3"), "the copy of the program does not run"),
        (failing("ip "), "ip addr: it was told to fail"),
    ],
)
def test_arm_refuses_and_leaves_nothing(world: World, prepare: Callable[[World], None], why: str) -> None:
    prepare(world)
    with pytest.raises(GuardError, match=why) as refusal:
        world.arm()
    assert refusal.value.code == 1
    assert left_in(world) == []
    assert state.read_armed(world.machine) is None
    assert world.timers == set()


@pytest.mark.parametrize("writes", range(5))
def test_arm_on_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Ballast, program, copies: whichever write is the one too many."""
    room = [writes]
    really = files.write

    def write(place: Path, data: bytes, **options: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(place))
        really(place, data, **options)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(GuardError, match="No space left on device"):
        world.arm()
    assert left_in(world) == []
    monkeypatch.setattr(files, "write", really)
    assert world.arm(), "the control: with room it arms"


def test_armed_once(world: World) -> None:
    armed = world.arm(by="alice\x1b[1m")
    world.seconds += 20
    with pytest.raises(GuardError, match=r"armed by alice\?\[1m since .* \(100 s left, token") as refusal:
        world.arm()
    assert "It must be confirmed or rolled back first" in str(refusal.value)
    assert state.read_armed(world.machine) == armed


def test_what_a_killed_arm_left_is_cleared_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(state, "clear", lambda machine: None)
    monkeypatch.setattr(state, "write_armed", killed)
    with pytest.raises(Killed):
        world.arm()
    assert "ballast" in left_in(world), "the control"
    monkeypatch.undo()
    monkeypatch.setattr("quietport.guard.machine.syslog.syslog", lambda *_: None)
    assert undo(world)[0] is None, "its timer finds nothing to do"
    armed = world.arm()
    assert left_in(world) == sorted(["armed.json", "ballast", "quietport.pyz", f"snapshot-{armed.token}"])


def test_what_arming_leaves_is_for_root_alone(world: World) -> None:
    armed = world.arm()
    folder = world.path(state.FOLDER)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / f"snapshot-{armed.token}").stat().st_mode & 0o777 == 0o700
    for name in ("armed.json", "ballast", "quietport.pyz", f"snapshot-{armed.token}/manifest.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert (folder / "ballast").stat().st_size == 1 << 20


def test_the_rollback_is_scheduled_outside_the_session_and_runs_the_copy(world: World) -> None:
    """Counted from systemd's start: OnActiveSec begins anew with each daemon-reload on systemd 252."""
    armed = world.arm(timeout=20)
    (words,) = [words for words in world.ran if words[0] == "systemd-run"]
    assert f"--unit=quietport-guard-{armed.token}" in words
    assert any(word.startswith("--on-startup=") for word in words)
    assert not any(word.startswith("--on-active") for word in words)
    assert {"--property=Type=oneshot", "--property=Restart=on-failure", "--property=StartLimitBurst=5"} <= {
        *words
    }
    ran = words[words.index("--") + 1 :]
    assert ran == [
        "/usr/bin/python3",
        "-I",
        state.PROGRAM,
        "guard",
        "rollback",
        armed.token,
        "--why",
        "timeout",
    ]


def test_the_wall_clock_decides_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = world.arm()
    for wall in ("2001-01-01T00:00:00+00:00", "2101-01-01T00:00:00+00:00"):
        monkeypatch.setattr(state, "wall_clock", lambda wall=wall: wall)
        assert armed.seconds_left(world.machine) == 120
    world.seconds += 121
    assert armed.seconds_left(world.machine) == 0


# A boot.


def boot(world: World) -> tuple[int, list[str]]:
    log = Log(aloud=False)
    return cli.boot(world.machine, log=log), log.lines


def test_a_boot_undoes_before_sshd_and_ufw_start(world: World) -> None:
    before = seen(world)
    armed = world.arm()
    world.converge()
    world.reboot()
    world.ran.clear()
    code, said = boot(world)
    assert code == 0, said
    assert world.path(sshd.MAIN).read_text() == OLD_MAIN
    assert not world.path(sshd.DROP_IN).exists()
    assert world.path(UFW_CONF).read_text() == "ENABLED=no\n"
    verbs = {words[1] for words in world.ran if words[0] == "systemctl"}
    assert "daemon-reload" in verbs
    assert not verbs & {"start", "stop", "restart", "enable", "mask"}, "these would wait for the boot itself"
    (scheduled,) = [words for words in world.ran if words[0] == "systemd-run"]
    assert "--no-block" in scheduled
    assert any("After=ssh.service" in word and "ufw.service" in word for word in scheduled)
    assert order(world, " ".join(scheduled)) < order(world, "systemctl daemon-reload")
    assert state.read_armed(world.machine) == armed
    # What the boot starts then; ufw is not enabled, so its unit lets everything in.
    world.chains = {"ipv4": {}, "ipv6": {}}
    for policies in world.policies.values():
        policies["INPUT"] = "ACCEPT"
    world.active |= {sshd.UNIT, "ufw.service"}
    world.start_sshd()
    pid = world.pid
    done, lines = undo(world, why="boot")
    assert done, lines
    assert world.pid == pid, "sshd began with the right files: no second restart"
    assert scope.compare(before, seen(world)) == []
    assert state.history(world.machine)[0]["why"] == "boot"


def test_a_boot_of_a_host_whose_sockets_were_masked_meanwhile(world: World) -> None:
    """The boot's own jobs were made with the masks: the rollback after it starts what they left out."""
    by_socket(world)
    before = seen(world)
    world.arm()
    world.converge()
    world.reboot()
    assert boot(world)[0] == 0
    world._ufw(on=False)
    world.active |= {sshd.UNIT, "ufw.service"}
    world.start_sshd()
    done, said = undo(world, why="boot")
    assert done, said
    assert "ssh.socket" in world.active
    assert scope.compare(before, seen(world)) == []


def test_a_container_has_booted_although_the_kernel_has_not(world: World) -> None:
    world.arm()
    world.converge()
    world.timers.clear()
    world.write("/proc/1/stat", "1 (systemd) S 0 1 1 " + "0 " * 15 + "99999 0 0\n")
    assert world.machine.boot() != state.read_armed(world.machine).boot  # type: ignore[union-attr]
    code, _ = boot(world)
    assert code == 0
    assert world.path(sshd.MAIN).read_text() == OLD_MAIN


def test_the_boot_unit_started_by_hand_undoes_nothing(world: World) -> None:
    world.arm()
    world.converge()
    code, said = boot(world)
    assert code == 0
    assert "left alone" in said[-1]
    assert world.path(sshd.DROP_IN).exists()
    world.timers.clear()
    boot(world)
    assert not world.path(sshd.DROP_IN).exists(), "the control: without its timer it is not left to itself"


def test_a_boot_that_can_schedule_nothing_still_puts_the_files_back(world: World) -> None:
    world.arm()
    world.converge()
    world.reboot()
    world.fails["systemd-run"] = "no bus"
    code, said = boot(world)
    assert code == 1
    assert any("no bus" in line for line in said)
    assert world.path(sshd.MAIN).read_text() == OLD_MAIN


# The files, by chance.


NAMES = st.sampled_from(
    ["sshd_config.d/a.conf", "sshd_config.d/b.conf", "sshd_config", "sshd_config.d/deep/c"]
)
KINDS = st.sampled_from(["write", "delete", "mode", "link", "dir", "same"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.lists(
        st.tuples(NAMES, st.sampled_from(["write", "link", "dir"]), st.binary(max_size=20)), max_size=5
    ),
    damage=st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=20)), max_size=8),
)
def test_snapshot_damage_restore_compare(
    tmp_path_factory: pytest.TempPathFactory, start: list[Any], damage: list[Any]
) -> None:
    world = World(tmp_path_factory.mktemp("host"))
    for name, kind, data in start:
        harm(world, name, kind, data)
    armed = world.arm()
    old = arming.load(world.machine, armed.token)
    contents = picture(world)
    for name, kind, data in damage:
        harm(world, name, kind, data)
    different = picture(world) != contents
    problems = rollback.restore_files(world.machine, armed.token, old, lambda line: None)
    assert problems.problems == []
    assert picture(world) == contents
    assert bool(problems.changed) == different
    again = rollback.restore_files(world.machine, armed.token, old, lambda line: None)
    assert (again.changed, again.problems) == ([], [])
    shutil.rmtree(world.root)


def harm(world: World, name: str, kind: str, data: bytes) -> None:
    place = world.path(f"/etc/ssh/{name}")
    if kind != "same" and not (kind == "mode" and place.is_file()):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            try:
                place.unlink(missing_ok=True)
            except NotADirectoryError:
                return
    if not place.parent.is_dir():
        try:
            place.parent.mkdir(parents=True)
        except (FileExistsError, NotADirectoryError):
            return
    if kind == "write":
        place.write_bytes(data)
    elif kind == "mode" and place.is_file():
        place.chmod(0o640)
    elif kind == "link":
        place.symlink_to("/nowhere/" + data.hex())
    elif kind == "dir":
        place.mkdir()
        (place / "in it").write_bytes(data)


def picture(world: World) -> dict[str, tuple[Any, ...]]:
    """What is in the scope, by other means than the guard's own."""
    found: dict[str, tuple[Any, ...]] = {}
    for place in sorted(world.path("/etc/ssh").rglob("*")):
        status = place.lstat()
        content = (
            str(place.readlink()) if place.is_symlink() else place.read_bytes() if place.is_file() else b""
        )
        found[str(place)] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def test_the_manifest_comes_back_as_it_was_written(world: World) -> None:
    world.converge()
    here = seen(world)
    assert scope.from_json(json.loads(json.dumps(here.to_json()))) == here


def test_history_keeps_the_newest_twenty(world: World) -> None:
    for number in range(1, 24):
        entry = {"token": f"t{number}", "number": number, "how": "confirmed", "log": []}
        state.write_history(world.machine, entry)
    assert [one["number"] for one in state.history(world.machine)] == list(range(23, 3, -1))
    assert state.next_number(world.machine) == 24


def test_no_file_content_reaches_the_log(world: World) -> None:
    world.write("/etc/ssh/sshd_config.d/50-cloud.conf", "# a canary in the old state\n")
    world.arm()
    world.write("/etc/ssh/sshd_config.d/50-cloud.conf", "# a canary in the new state\n")
    done, said = undo(world)
    assert done
    assert any("50-cloud.conf" in line for line in said), "the control"
    assert "canary" not in "\n".join(said)
    assert "canary" not in json.dumps(state.history(world.machine))


def test_to_undo_what_has_just_undone_itself_is_no_failure(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    armed = world.arm()
    world.converge()
    assert undo(world)[0] is True
    assert cli._roll_back(world.machine, armed.token, why="asked") == 0
    assert "rolled back (timeout)" in capsys.readouterr().out
    # A token that nobody ever had, and one that was confirmed, are.
    assert cli._roll_back(world.machine, "ab12", why="asked") == 1
    other = world.arm()
    entry = rollback.entry(other, why="from a login", how="confirmed", log=Log(aloud=False))
    state.write_history(world.machine, entry)
    state.remove_armed(world.machine)
    assert cli._roll_back(world.machine, other.token, why="asked") == 1


def test_killed_while_ufw_switched_off_one_family_of_two(world: World) -> None:
    """`ufw disable` stops IPv4 first: the next attempt finds ufw gone, and IPv6 still shut."""
    world.arm()
    world.converge()
    world.switch_ufw_on()
    world.chains["ipv4"] = {}
    world.policies["ipv4"]["INPUT"] = "ACCEPT"
    done, lines = undo(world)
    assert done is True, lines
    assert world.policies["ipv6"]["INPUT"] == "ACCEPT"
