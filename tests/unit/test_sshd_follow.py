"""sshd stays on the addresses that tailscale0 has: what is decided, what is done, and a real sshd."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operations import sshd as operations
from quietport import sshd, sshd_follow
from quietport.errors import HostProgramError
from quietport.net import TAILNET_RANGES
from quietport.sshd_apply import Host
from quietport.sshd_follow import ABSENT_S, LOOK_S, SETTLE_S, Follower, Steadiness, decide, once, paused

ROOT = Path(__file__).parents[2]
OLD = ("100.64.0.7", "fd7a:115c:a1e0::7")
NEW = ("100.64.0.9", "fd7a:115c:a1e0::9")
DROP_IN = sshd.render(OLD)


def listeners(*addresses: str) -> frozenset[sshd.Listener]:
    return frozenset((address, 22) for address in addresses)


# --- what is decided ---------------------------------------------------------------------------------


@pytest.mark.parametrize("penalties", [False, True])
@pytest.mark.parametrize("root", ["prohibit-password", "no", "forced-commands-only"])
@pytest.mark.parametrize("now", [NEW, NEW[:1], NEW[1:], OLD[::-1], (*OLD, *NEW), ()])
def test_the_follower_writes_what_the_converge_writes(
    now: tuple[str, ...], root: str, *, penalties: bool
) -> None:
    """Byte for byte: otherwise each would undo the other's work for ever."""
    before = sshd.render(OLD, permit_root_login=root, penalties=penalties)
    after = sshd.render(now, permit_root_login=root, penalties=penalties)
    decision = decide(before, now)
    assert (before if decision.text is None else decision.text) == after
    assert (decision.text is None) == (set(now) == set(OLD))
    assert decision.listeners == frozenset(sshd.wanted_listeners(now))
    # And the converge finds nothing to do on what the follower left.
    seen = operations.Seen(
        files={sshd.MAIN: "Include /etc/ssh/sshd_config.d/*.conf\n", sshd.DROP_IN: after}
        | ({f"{sshd.FOLDER}/50-x.conf": f"PermitRootLogin {root}\n"}),
        unit_drop_in=operations.UNIT_DROP_IN_TEXT,
        addresses=now,
        service={"enabled": "enabled", "need_reload": False},
        sockets={},
        listeners=frozenset(sshd.wanted_listeners(now)),
        stray_sockets=(),
        stale=False,
        effective=({"persourcepenalties": ["x"]} if penalties else {},),
    )
    found = operations.differences(seen, operations.wanted(seen, login_user="admin"))
    assert not [phrase for phrase in found if "differs" in phrase or "listens" in phrase]


@pytest.mark.parametrize(
    ("drop_in", "paused", "why"),
    [
        (None, "", "nothing to follow"),
        ("", "", "not written by quietport"),
        ("ListenAddress 100.64.0.7\n", "", "not written by quietport"),
        (f"# by me\n{DROP_IN}", "", "not written by quietport"),
        (DROP_IN, "the door is open", "the door is open"),
        (f"{DROP_IN}ListenAddress ::\n", "", "break-glass"),
        (f"{DROP_IN}ListenAddress [::]:22\n", "", "break-glass"),
        (f"{DROP_IN}  listenaddress=0.0.0.0\n", "", "break-glass"),
        (f"{DROP_IN}ListenAddress ::ffff:0.0.0.0\n", "", "break-glass"),
        (f'{DROP_IN}ListenAddress "0.0.0.0:22"\n', "", "break-glass"),
        (f"{DROP_IN}ListenAddress 0\n", "", "none of ours"),
        (f"{DROP_IN}ListenAddress host.example\n", "", "none of ours"),
        (f"{DROP_IN}ListenAddress\n", "", "none of ours"),
    ],
)
@pytest.mark.parametrize("now", [(), NEW, OLD])
def test_what_is_left_alone(drop_in: str | None, paused: str, why: str, now: tuple[str, ...]) -> None:
    decision = decide(drop_in, now, paused=paused)
    assert (decision.text, decision.listeners) == (None, None)
    assert why in decision.sentence
    assert decide(DROP_IN, NEW).text  # the positive control


def test_without_any_address_it_is_loopback() -> None:
    decision = decide(DROP_IN, ())
    assert decision.text == sshd.render([])
    assert decision.listeners == listeners("127.0.0.1")


def test_a_drop_in_that_lost_its_lines_gets_them_back() -> None:
    without = "".join(line for line in DROP_IN.splitlines(True) if not line.startswith("ListenAddress"))
    assert decide(without, OLD).text == DROP_IN


_LINES = st.lists(
    st.sampled_from(
        [
            "ListenAddress 100.64.0.7:22",
            "  listenaddress\t[fd7a:115c:a1e0::7]:22",
            "ListenAddress=127.0.0.1",
            "# ListenAddress 0.0.0.0",
            "ListenAddress 0.0.0.0",
            "ListenAddress [::]",
            "Port 22",
            "Match User bob",
            "",
            "X11Forwarding no",
        ]
    ),
    max_size=8,
)
_ADDRESSES = st.lists(
    st.one_of(
        *(st.ip_addresses(v=network.version, network=str(network)).map(str) for network in TAILNET_RANGES),
        st.sampled_from(["0.0.0.0", "::"]),
    ),
    max_size=4,
    unique=True,
)


@given(_LINES, _ADDRESSES, st.booleans())
def test_never_without_a_line_and_never_on_every_address(
    lines: list[str], now: list[str], newline: bool
) -> None:
    text = "\n".join([f"{sshd.OURS}.", *lines]) + "\n" * newline
    decision = decide(text, now)
    broken_glass = any(line.startswith(("ListenAddress 0", "ListenAddress [::]")) for line in lines)
    assert (decision.listeners is None) == broken_glass
    if decision.listeners is None:
        assert decision.text is None
        return
    after = text if decision.text is None else decision.text
    named = sshd.listen_addresses(after)
    assert named
    assert not any(ipaddress.ip_address(address).is_unspecified for address in named)
    assert {(address, 22) for address in named} == decision.listeners
    usable = {address for address in now if not ipaddress.ip_address(address).is_unspecified}
    assert set(named) == (usable or {"127.0.0.1"})

    def others(text: str) -> list[str]:
        listen = {line.index for line in sshd.parse(sshd.DROP_IN, text) if line.keyword == "listenaddress"}
        return [line for index, line in enumerate(text.split("\n")) if index not in listen]

    assert others(after) == others(text)
    assert decide(after, now).text is None


@pytest.mark.parametrize(
    ("content", "now", "why"),
    [
        (None, 0, ""),
        ({"schema": 1, "why": "open", "until": None}, 0, "open"),
        ({"schema": 1, "why": "open", "until": 100}, 99, "open"),
        ({"schema": 1, "why": "open", "until": 100}, 100, ""),
        ({"until": None}, 0, "no reason given"),
        ({"why": "a\x1b[31m", "until": None}, 0, "a?[31m"),
        ({"why": "open", "until": "tomorrow"}, 0, "cannot be read"),
        ([], 0, "cannot be read"),
        ("{", 0, "cannot be read"),
    ],
)
def test_the_pause(content: object, now: float, why: str, tmp_path: Path) -> None:
    file = tmp_path / "follow-paused"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        file.chmod(0o600)
    said = paused(file, clock=lambda: now)
    assert why in said
    assert bool(said) == bool(why)


def test_a_pause_that_is_no_file_pauses_too(tmp_path: Path) -> None:
    (tmp_path / "follow-paused").mkdir()
    assert paused(tmp_path / "follow-paused")


def test_addresses_are_believed_when_they_stay() -> None:
    steady = Steadiness()
    assert steady.wait(NEW, 100) == SETTLE_S
    assert steady.wait(NEW, 101) == SETTLE_S - 1
    assert steady.wait((), 102) == ABSENT_S
    assert steady.wait(NEW, 110) == SETTLE_S
    assert steady.wait(NEW, 110 + SETTLE_S) == 0
    assert steady.wait((), 200) == ABSENT_S
    assert steady.wait((), 200 + ABSENT_S) == 0


# --- what is done ------------------------------------------------------------------------------------


class Machine:
    """systemctl and sshd as they would answer, with every command that was run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.state = "active"
        self.listening = listeners(*OLD)
        self.broken = ""
        self.deaf_to: set[str] = set()
        self.reads_drop_in = True
        self.foreign: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return self.root / sshd.DROP_IN.lstrip("/")

    def named(self, text: str) -> frozenset[sshd.Listener]:
        return listeners(*sshd.listen_addresses(text), *self.foreign)

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.ran.append(line)
        code, out = self._systemctl(argv) if argv[0] == "systemctl" else self._sshd(argv)
        return subprocess.CompletedProcess(list(argv), code, out, self.broken if code else "")

    def _sshd(self, argv: Sequence[str]) -> tuple[int, str]:
        if self.broken:
            return 255, ""
        candidate = Path(argv[argv.index("-f") + 1]).parent / "sshd_config.d" if "-f" in argv else None
        text = ((candidate or self.file.parent) / self.file.name).read_text()
        told = self.named(text) if self.reads_drop_in else listeners("0.0.0.0")
        return 0, "".join(f"listenaddress {sshd.endpoint(each)}\n" for each in told) if "-T" in argv else ""

    def _systemctl(self, argv: Sequence[str]) -> tuple[int, str]:
        if argv[1] == "show":
            return 0, f"ActiveState={self.state}\nMainPID={77 if self.state == 'active' else 0}\n"
        if self.broken:
            return 1, ""
        if argv[1] not in self.deaf_to:
            self.state = "active"
            self.listening = self.named(self.file.read_text())
        return 0, ""

    @property
    def did(self) -> list[str]:
        """What was asked of systemd but to tell."""
        return [line.split()[1] for line in self.ran if line.startswith("systemctl") and " show " not in line]


class FakeHost(Host):
    def __init__(self, machine: Machine) -> None:
        super().__init__(root=machine.root, run=machine)
        self.machine = machine

    def listeners(self, pids: Sequence[int]) -> frozenset[sshd.Listener]:
        return self.machine.listening if pids else frozenset()


class World:
    """A machine, a follower on it, and time that passes only when somebody waits."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.now = 1000.0
        self.addresses: tuple[str, ...] = OLD
        self.said: list[str] = []
        self.held = 0
        self.when_held: list[tuple[str, ...]] = []
        self.busy = False
        self.follower = Follower(
            FakeHost(machine),
            say=self.said.append,
            addresses=lambda: self.addresses,
            hold=self.hold,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    @contextlib.contextmanager
    def hold(self, timeout: float) -> Iterator[None]:
        if self.busy:
            self.now += timeout
            raise HostProgramError("another one is at it")
        self.held += 1
        if self.when_held:
            self.addresses = self.when_held.pop()
        yield

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, seconds: float) -> list[str]:
        """Follow for that long; what was said."""
        del self.said[:]
        end = self.now + seconds
        while self.now < end:
            pause = self.follower.look()
            assert 0 < pause <= LOOK_S
            self.now += pause
        return list(self.said)

    @property
    def text(self) -> str:
        return self.machine.file.read_text()


@pytest.fixture
def world(tmp_path: Path) -> World:
    machine = Machine(tmp_path)
    machine.file.parent.mkdir(parents=True)
    machine.file.write_text(DROP_IN)
    machine.file.chmod(0o644)
    (tmp_path / sshd.MAIN.lstrip("/")).write_text("Include /etc/ssh/sshd_config.d/*.conf\n")
    return World(machine)


def test_nothing_is_done_while_nothing_changes(world: World) -> None:
    said = world.run(600)
    assert (world.machine.did, world.held, world.text) == ([], 0, DROP_IN)
    assert len(said) == 1
    assert not any("/usr/sbin/sshd" in line for line in world.machine.ran)


def test_a_new_address_is_followed_and_sshd_reloads(world: World) -> None:
    world.run(60)
    world.addresses = NEW
    said = world.run(60)
    assert world.text == sshd.render(NEW)
    assert world.machine.file.stat().st_mode & 0o777 == 0o644
    assert world.machine.did == ["reload"]
    assert world.machine.listening == listeners(*NEW)
    assert len(said) == 2
    assert "100.64.0.9" in said[0]
    assert "told to reload" in said[1]
    checked = next(at for at, line in enumerate(world.machine.ran) if "sshd -t -f" in line)
    assert checked < next(at for at, line in enumerate(world.machine.ran) if "reload" in line)
    assert not list(world.machine.file.parent.glob(".*"))
    assert world.run(600) == []


def test_a_short_outage_changes_nothing(world: World) -> None:
    """tailscaled restarted or upgraded: sshd's sockets wait for the addresses, and work again."""
    for away in (5, 30, ABSENT_S - 1):
        world.addresses = ()
        end = world.now + away
        while world.now < end:
            world.now += min(world.follower.look(), end - world.now)
        world.addresses = OLD
        world.run(60)
    assert (world.machine.did, world.text) == ([], DROP_IN)


def test_a_long_outage_ends_on_loopback_and_the_return_is_followed(world: World) -> None:
    world.addresses = ()
    world.run(ABSENT_S + 5)
    assert world.text == sshd.render([])
    assert world.machine.listening == listeners("127.0.0.1")
    world.addresses = OLD
    world.run(10)
    assert world.text == DROP_IN
    assert world.machine.listening == listeners(*OLD)
    assert world.machine.did == ["reload", "reload"]


def test_addresses_that_come_one_after_the_other_are_one_change(world: World) -> None:
    world.addresses = NEW[:1]
    assert world.follower.look() == SETTLE_S
    world.now += 1
    world.addresses = NEW
    world.run(10)
    assert world.machine.did == ["reload"]
    assert world.text == sshd.render(NEW)


def test_what_changed_while_the_lock_was_waited_for_is_looked_at_again(world: World) -> None:
    world.addresses = NEW
    world.when_held = [OLD]
    world.run(60)
    assert (world.text, world.machine.did) == (DROP_IN, [])
    assert world.held == 1


def test_a_busy_lock_is_tried_again(world: World) -> None:
    world.addresses = NEW
    world.busy = True
    assert any("another one is at it" in line for line in world.run(400))
    assert (world.text, world.machine.did) == (DROP_IN, [])
    world.busy = False
    world.run(60)
    assert world.text == sshd.render(NEW)


def test_a_configuration_that_sshd_refuses_leaves_the_one_that_runs(world: World) -> None:
    world.machine.broken = "line 3: Bad configuration option\nterminating"
    world.addresses = NEW
    said = world.run(3600)
    assert len(said) == 1
    assert "Bad configuration option" in said[0]
    assert (world.text, world.machine.did) == (DROP_IN, [])
    assert world.machine.listening == listeners(*OLD)
    # Not every few seconds for an hour, nor never again.
    assert 5 < sum("sshd -t -f" in line for line in world.machine.ran) < 25
    world.machine.broken = ""
    world.run(700)
    assert world.text == sshd.render(NEW)


def test_a_drop_in_that_nobody_reads_is_not_followed_by_a_reload(world: World) -> None:
    """The main file lost its Include: a reload would open sshd to everybody."""
    world.machine.reads_drop_in = False
    world.addresses = NEW
    said = world.run(60)
    assert "does not read" in said[0]
    assert (world.text, world.machine.did) == (DROP_IN, [])


def test_a_reload_that_was_lost_is_made_up_for(world: World) -> None:
    """Killed between the file and the reload, by a rollback for one."""
    world.machine.file.write_text(sshd.render(NEW))
    world.addresses = NEW
    said = world.run(60)
    assert world.machine.did == ["reload"]
    assert world.machine.listening == listeners(*NEW)
    assert "told to reload" in said[1]


def test_what_came_right_while_the_lock_was_waited_for_is_left_alone(world: World) -> None:
    """Whoever held it was restarting sshd: a reload would close the listeners once more."""
    world.machine.file.write_text(sshd.render(NEW))
    world.addresses = NEW

    @contextlib.contextmanager
    def hold(timeout: float) -> Iterator[None]:
        world.machine.listening = listeners(*NEW)
        yield

    world.follower._hold = hold
    world.run(60)
    assert world.machine.did == []


def test_a_reload_that_does_not_do_becomes_a_restart(world: World) -> None:
    world.machine.deaf_to = {"reload"}
    world.addresses = NEW
    world.run(60)
    assert world.machine.did == ["reload", "restart"]
    assert world.machine.listening == listeners(*NEW)


def test_an_sshd_that_answers_on_one_address_is_not_restarted_for_the_other(world: World) -> None:
    world.machine.deaf_to = {"reload", "restart"}
    world.machine.listening = listeners(OLD[0])
    said = world.run(900)
    assert set(world.machine.did) == {"reload"}
    assert len(world.machine.did) < 20
    assert any("sshd listens on 100.64.0.7:22, not on" in line for line in said)
    assert len(said) == 2
    world.machine.deaf_to = set()
    world.run(700)
    assert world.machine.listening == listeners(*OLD)


def test_an_sshd_that_failed_is_started(world: World) -> None:
    world.machine.state = "failed"
    world.machine.listening = frozenset()
    world.addresses = NEW
    world.run(60)
    assert world.machine.did == ["restart"]
    assert world.machine.listening == listeners(*NEW)


def test_an_sshd_that_failed_with_the_right_addresses_is_started_too(world: World) -> None:
    world.machine.state = "failed"
    world.machine.listening = frozenset()
    world.run(60)
    assert world.machine.did == ["restart"]


@pytest.mark.parametrize("state", ["inactive", "activating", "deactivating"])
def test_an_sshd_that_was_stopped_or_just_starts_is_left_to_it(world: World, state: str) -> None:
    world.machine.state = state
    world.addresses = NEW
    world.run(60)
    assert world.text == sshd.render(NEW)
    assert world.machine.did == []


def test_what_others_made_it_listen_on_is_none_of_our_business(world: World) -> None:
    world.machine.foreign = ("203.0.113.9",)
    world.machine.listening = listeners(*OLD, "203.0.113.9")
    world.run(600)
    assert world.machine.did == []
    # Once it is in no file any more, sshd runs with an old configuration.
    world.machine.foreign = ()
    world.run(60)
    assert world.machine.did == ["reload"]


@pytest.mark.parametrize(
    "kind", ["absent", "foreign", "link", "writable by others", "paused", "break-glass", "not text"]
)
def test_what_is_not_ours_to_change_is_not_changed(world: World, kind: str, tmp_path: Path) -> None:
    file = world.machine.file
    if kind == "absent":
        file.unlink()
    elif kind == "foreign":
        file.write_text("Port 22\n")
    elif kind == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "writable by others":
        file.chmod(0o666)
    elif kind == "paused":
        pause = tmp_path / str(sshd_follow.PAUSED).lstrip("/")
        pause.parent.mkdir(parents=True)
        pause.write_text('{"schema": 1, "why": "opened from the console", "until": null}')
        pause.chmod(0o600)
    elif kind == "break-glass":
        file.write_text(f"{DROP_IN}ListenAddress 0.0.0.0\n")
    else:
        file.write_bytes(DROP_IN.encode() + b"\xff")
    before = file.read_bytes() if file.exists() else None
    world.machine.listening = frozenset()
    for addresses in (NEW, (), OLD):
        world.addresses = addresses
        world.run(120)
    assert (file.read_bytes() if file.exists() else None) == before
    assert file.is_symlink() == (kind == "link")
    assert (world.machine.did, world.held) == ([], 0)


def test_once_ends_when_nothing_is_left_to_do(world: World) -> None:
    world.addresses = NEW
    assert once(world.follower, clock=lambda: world.now, sleep=world.sleep) == 0
    assert world.now < 1000 + 10
    assert world.text == sshd.render(NEW)
    world.addresses = ()
    assert once(world.follower, clock=lambda: world.now, sleep=world.sleep) == 0
    assert world.text == sshd.render([])


def test_once_says_when_sshd_does_not_follow(world: World) -> None:
    world.addresses = NEW
    world.machine.broken = "bad"
    assert once(world.follower, clock=lambda: world.now, sleep=world.sleep) == 1
    assert world.text == DROP_IN


def test_a_kernel_that_does_not_answer_changes_nothing(world: World) -> None:
    def fail() -> tuple[str, ...]:
        raise HostProgramError("no netlink")

    follower = Follower(
        FakeHost(world.machine),
        say=world.said.append,
        addresses=fail,
        hold=world.hold,
        clock=lambda: world.now,
    )
    for _ in range(10):
        world.now += follower.look()
    assert world.said == ["no netlink"]
    assert (world.text, world.machine.did) == (DROP_IN, [])


# --- a real sshd, and a real kernel's addresses ---------------------------------------------------------

_NEEDED = ("ip", "unshare", "nsenter", "/usr/sbin/sshd", "ssh", "ssh-keygen")
_MISSING = [name for name in _NEEDED if shutil.which(name) is None]
needs_namespaces = pytest.mark.skipif(
    (os.geteuid() != 0 or bool(_MISSING)) and os.environ.get("CI") != "true",
    reason=f"needs root, iproute2, util-linux and openssh (missing: {_MISSING or 'root'})",
)
# What systemd does for ssh.service, as far as the follower asks for it; sshd is the machine's own.
_SYSTEMCTL = """#!/bin/sh
pid=$(cat /run/sshd.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null || pid=
state=${pid:+active}
echo "$*" >>/run/systemctl.log
case $1 in
show) printf 'ActiveState=%s\\nMainPID=%s\\n' "${state:-failed}" "${pid:-0}" ;;
reload) /usr/sbin/sshd -t && kill -HUP "$pid" ;;
restart) [ -n "$pid" ] && kill "$pid"; sleep 0.2; /usr/sbin/sshd ;;
esac
"""
_MACHINE = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /etc/ssh
mkdir /run/sshd /run/bin /etc/ssh/sshd_config.d
cat >/run/bin/systemctl
chmod 755 /run/bin/systemctl
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
ssh-keygen -q -t ed25519 -N '' -f /run/key
cp /run/key.pub /run/authorized_keys
cat >/etc/ssh/sshd_config <<END
Include /etc/ssh/sshd_config.d/*.conf
AuthorizedKeysFile /run/authorized_keys
StrictModes no
PidFile /run/sshd.pid
END
ip link set lo up
ip link add tailscale0 type bridge
ip link set tailscale0 up
"""


class Real:
    """A machine in namespaces of its own, with sshd and addresses."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def argv(self, *argv: str) -> list[str]:
        path = f"PATH=/run/bin:{os.environ['PATH']}"
        return ["nsenter", "-t", str(self.process.pid), "-n", "-m", "--", "env", path, *argv]

    def run(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*argv), input=stdin, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
        )

    def quietport(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "quietport", *arguments)

    def addresses(self, *addresses: str) -> None:
        """tailscale0 has these and no others."""
        lines = [f"addr add {address} dev tailscale0 {'nodad' * (':' in address)}" for address in addresses]
        batch = "\n".join(["addr flush dev tailscale0", *lines]) + "\n"
        assert self.run("ip", "-batch", "-", stdin=batch).returncode == 0

    def write(self, path: str, text: str) -> None:
        assert self.run("sh", "-c", 'cat >"$1"; chmod 644 "$1"', "sh", path, stdin=text).returncode == 0

    def drop_in(self) -> str:
        return self.run("cat", sshd.DROP_IN).stdout

    def listens(self) -> set[str]:
        rows = self.run("ss", "-Hlntp").stdout.splitlines()
        return {row.split()[3] for row in rows if '"sshd"' in row}

    def login(self, address: str, *command: str) -> list[str]:
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "BatchMode=yes",
            "LogLevel=ERROR",
        )
        words = [word for option in options for word in ("-o", option)]
        return self.argv("ssh", "-F", "none", "-i", "/run/key", *words, f"root@{address}", *command)

    def until(self, listens: set[str], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.listens()) != listens:
            assert time.monotonic() < deadline, f"sshd listens on {found}, not on {listens}"
            time.sleep(0.1)


@pytest.fixture
def real() -> Iterator[Real]:
    with subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", "echo ready; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        made = Real(shell)
        try:
            built = made.run("sh", "-c", _MACHINE, stdin=_SYSTEMCTL)
            assert built.returncode == 0, built.stderr
            made.addresses(*OLD)
            made.write(sshd.DROP_IN, DROP_IN)
            started = made.run("/usr/sbin/sshd")
            assert started.returncode == 0, started.stderr
            made.until(ENDS_OLD, seconds=10)
            yield made
        finally:
            made.run("sh", "-c", "kill $(cat /run/sshd.pid)")
            if shell.stdin is not None:
                shell.stdin.close()


ENDS_OLD = {sshd.endpoint((address, 22)) for address in OLD}
ENDS_NEW = {sshd.endpoint((address, 22)) for address in NEW}


@needs_namespaces
def test_watching_follows_within_seconds_and_ends_no_session(real: Real) -> None:
    """IPv4 and IPv6 anew, IPv6 alone, and back; a login over each, and one from before that lives on."""
    # The control: without the follower sshd stays where nobody is any more.
    real.addresses(*NEW)
    time.sleep(3)
    assert real.listens() == ENDS_OLD
    assert subprocess.run(real.login(NEW[0], "true"), check=False, capture_output=True).returncode == 255
    real.addresses(*OLD)
    with (
        subprocess.Popen(
            real.login(OLD[0], "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as session,
        subprocess.Popen(
            real.argv(sys.executable, "-m", "quietport", "sshd-follow", "--watch"),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as follower,
    ):
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write("one\n")
        session.stdin.flush()
        assert session.stdout.readline() == "one\n"
        assert follower.stdout is not None
        assert "sshd's drop-in says so" in follower.stdout.readline()
        real.addresses(*OLD, *NEW)
        real.until(ENDS_OLD | ENDS_NEW, seconds=15)
        for address in NEW:
            assert subprocess.run(real.login(address, "true"), check=False).returncode == 0
        real.addresses(OLD[0], NEW[1])
        real.until({f"{OLD[0]}:22", f"[{NEW[1]}]:22"}, seconds=15)
        assert real.drop_in() == sshd.render([OLD[0], NEW[1]])
        session.stdin.write("two\n")
        session.stdin.flush()
        assert session.stdout.readline() == "two\n"
        session.stdin.close()
        assert session.wait(10) == 0
        real.addresses(NEW[1])
        real.until({f"[{NEW[1]}]:22"}, seconds=15)
        assert subprocess.run(real.login(NEW[1], "true"), check=False).returncode == 0
        follower.kill()
        said = follower.stdout.read()
    assert len(said.splitlines()) == 6, said
    verbs = [line for line in real.run("cat", "/run/systemctl.log").stdout.splitlines() if "show" not in line]
    assert verbs == ["reload ssh.service"] * 3


@needs_namespaces
def test_sockets_of_a_vanished_address_work_again_when_it_returns(real: Real) -> None:
    """Why a short outage is no reason to move."""
    real.addresses()
    assert real.listens() == ENDS_OLD
    real.addresses(*OLD)
    for address in OLD:
        assert subprocess.run(real.login(address, "true"), check=False).returncode == 0


@needs_namespaces
def test_once_with_sshd_dead_and_another_address(real: Real) -> None:
    real.run("sh", "-c", "kill $(cat /run/sshd.pid)")
    real.addresses(*NEW)
    # The control: as it is, sshd does not start for good.
    assert real.run("timeout", "10", "/usr/sbin/sshd", "-D").returncode == 255
    done = real.quietport("sshd-follow", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert real.listens() == ENDS_NEW
    again = real.quietport("sshd-follow", "--once")
    assert (again.returncode, again.stdout) == (0, "")


@needs_namespaces
@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        (f"{sshd.FOLDER}/50-broken.conf", "NoSuchOption yes\n", "NoSuchOption"),
        (sshd.MAIN, "PidFile /run/sshd.pid\n", "does not read"),
    ],
)
def test_the_real_sshd_is_asked_before_anything_changes(real: Real, path: str, text: str, why: str) -> None:
    good = real.run("cat", path).stdout
    real.write(path, text)
    real.addresses(*NEW)
    code = (
        "from quietport import sshd_follow as f; from quietport.sshd_apply import Host\n"
        "f.place(Host(), f.look(Host()).decision)"
    )
    done = real.run(sys.executable, "-c", code)
    assert done.returncode == 1
    assert why in done.stderr
    assert real.drop_in() == DROP_IN
    assert real.listens() == ENDS_OLD
    # The control: nothing but that file kept it from being written.
    real.write(path, good)
    assert real.run(sys.executable, "-c", code).returncode == 0
    assert real.drop_in() == sshd.render(NEW)


@needs_namespaces
@pytest.mark.parametrize("now", [NEW, NEW[1:], (*OLD, *NEW)])
def test_every_start_of_sshd_is_one_on_todays_addresses(real: Real, now: tuple[str, ...]) -> None:
    """sshd-wait alone, the follower dead: another address, IPv6 only, one more."""
    real.run("sh", "-c", "kill $(cat /run/sshd.pid)")
    real.addresses(*now)
    began = time.monotonic()
    done = real.quietport("sshd-wait", "--timeout", "60")
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began < 15
    assert real.drop_in() == sshd.render(now)
    assert real.run("/usr/sbin/sshd").returncode == 0
    real.until({sshd.endpoint((address, 22)) for address in now}, seconds=10)


@needs_namespaces
def test_a_start_without_any_address_waits_and_then_takes_loopback(real: Real) -> None:
    real.addresses()
    began = time.monotonic()
    assert real.quietport("sshd-wait", "--timeout", "3").returncode == 0
    assert time.monotonic() - began >= 3
    assert real.drop_in() == sshd.render([])


@needs_namespaces
@pytest.mark.parametrize("late", [NEW, OLD])
def test_a_start_before_the_tailnet_takes_the_addresses_that_come(real: Real, late: tuple[str, ...]) -> None:
    real.addresses()
    argv = real.argv(sys.executable, "-m", "quietport", "sshd-wait", "--timeout", "60")
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as waiting:
        time.sleep(3)
        assert waiting.poll() is None
        real.addresses(*late)
        assert waiting.wait(15) == 0
    assert real.drop_in() == sshd.render(late)


@needs_namespaces
def test_a_start_under_somebody_elses_lock_does_not_wait_for_it(real: Real) -> None:
    """sshd-apply holds it, and waits for this very start."""
    real.addresses(*OLD, *NEW)
    code = (
        "import subprocess, sys; from quietport.guardlock import hold\n"
        "with hold(timeout=0):\n"
        "    sys.exit(subprocess.run([sys.executable, '-m', 'quietport', 'sshd-wait']).returncode)"
    )
    began = time.monotonic()
    done = real.run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 15
    assert real.drop_in() == DROP_IN


@needs_namespaces
def test_the_rights_of_the_unit_are_enough(real: Real) -> None:
    """Its capabilities and no new privileges; its other limits need systemd."""
    unit = (ROOT / "templates/ssh/quietport-sshd-follow.service").read_text()
    line = next(line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet="))
    caps = ",".join(f"+{name.lower().removeprefix('cap_')}" for name in line.partition("=")[2].split())
    real.addresses(*NEW)
    python = (sys.executable, "-m", "quietport", "sshd-follow", "--once")
    less = ("setpriv", "--no-new-privs", f"--bounding-set=-all,{caps}", f"--inh-caps=-all,{caps}")
    code = "import os, sys; os.umask(0o77); os.execvp(sys.argv[1], sys.argv[1:])"
    done = real.run(sys.executable, "-c", code, *less, *python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert real.drop_in() == sshd.render(NEW)
    assert "told to reload: it answers" in done.stdout
