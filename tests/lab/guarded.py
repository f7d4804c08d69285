"""Three hosts at the same time: one whose tailnet addresses change, one under a guard, one with ssh.socket.

What is told here is asked for by test_follow.py and test_guard_host.py. Most of it is waiting.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lab import faults
from tests.lab.interrupt import Converge
from tests.lab.onhost import CHANGE, CHANGED, NOT_LATE, ROLLBACK_S, STARTS, OnHost, late, waited
from tests.lab.story import Chapters, Hosts, Lab, reachable, watched
from tests.lab.untouched import changes, ssh_and_firewall

# Name, Debian, variants.
FOLLOW, GUARD, SOCKETS = "c13-follow", "c12-guard", "c13-socket"
MADE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    FOLLOW: ("trixie", ()),
    GUARD: ("bookworm", ()),
    SOCKETS: ("trixie", ("ssh-socket",)),
}
QUICK: Mapping[str, Any] = {"docker_source": "none", "secrets": {}}
# Of the host whose converge is killed, which then waits for it.
GUARD_TIMEOUT_S = 60
JOIN = "tailscale up --login-server={server} --auth-key={key} --hostname={name} --force-reauth --timeout=60s"
# Away with all that is ours but the drop-in's ListenAddress lines; what Debian's unit says of sshd stays.
UNFOLLOWED = """systemctl disable --now quietport-sshd-follow.service quietport-sshd-follow-once.timer
mv /etc/systemd/system/ssh.service.d/10-quietport.conf /root/
systemctl daemon-reload
"""
FOLLOWED_AGAIN = """mv /root/10-quietport.conf /etc/systemd/system/ssh.service.d/
rm -rf /etc/systemd/system/ssh.service.d/half.conf
systemctl daemon-reload
systemctl enable --now quietport-sshd-follow.service quietport-sshd-follow-once.timer
"""


@dataclass
class Guarded:
    """The lab, its hosts, and what is told about each."""

    lab: Lab
    names: Mapping[str, str] = field(default_factory=lambda: {name: name for name in MADE})
    hosts: Hosts = field(init=False)
    follow: Chapters = field(init=False)
    guard: Chapters = field(init=False)
    sockets: Chapters = field(init=False)
    tries: dict[str, int] = field(default_factory=dict)
    """How often the public side tried, by chapter of the host that is followed."""
    server: threading.Lock = field(default_factory=threading.Lock)
    """Held by who stops the control server, or cannot do without it."""

    @classmethod
    def begun(cls, lab: Lab) -> Guarded:
        """Make the hosts, then tell all stories at once; they go on when this returns."""
        told = cls(lab)
        told.begin()
        return told

    def begin(self) -> None:
        """Make the hosts, then tell all stories at once."""

        def up(name: str) -> None:
            distro, variants = MADE[name]
            self.lab.up(kind="container", distro=distro, name=name, variants=variants)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(up, MADE))
        self.tell()

    def tell(self) -> None:
        """All stories, at the same time."""
        killed = {self.names[SOCKETS]: {"guard_timeout": GUARD_TIMEOUT_S}}
        self.hosts = Hosts.of(self.lab, "guarded", every=QUICK, **killed)
        self.sockets = Chapters(self.chapters_of_sockets(), name="guard: ssh.socket").start()
        self.follow = Chapters(self.chapters_of_follow(), name="follow").start()
        self.guard = Chapters(self.chapters_of_guard(), name="guard").start()

    def host(self, name: str) -> OnHost:
        return OnHost(self.lab, self.names[name])

    def converge(self, name: str) -> None:
        """Make one host private."""
        self.hosts.apply("--limit", self.names[name]).ok()

    def again(self, name: str, *, moved: bool = False) -> None:
        """A second run changes nothing on the host, and the specs hold.

        `moved`: its address changed. The operator's machine has no tailscale of its own here: it has to be
        told, and remembers it.
        """
        host = self.host(name)
        hosts = self.hosts
        if moved:
            told = {host.name: {"tailnet_address": host.addresses()[0]}}
            hosts = Hosts.of(self.lab, "moved", every=QUICK, **told)
        applied = hosts.apply("--limit", host.name).ok()
        changed = {what for _, what in applied.changed if not (moved and "operator: remember" in what)}
        assert not changed, changed
        hosts.spec("-k", host.name, "tests/spec/test_guard.py", "tests/spec/test_ssh.py").ok()

    # The host whose addresses change

    def chapters_of_follow(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        return [
            ("up", lambda: self.converge(FOLLOW)),
            *(
                (what, lambda what=what, act=act: self.unseen(what, act))
                for what, act in (
                    ("tailscaled killed", self.tailscaled_killed),
                    ("reinstalled", self.reinstalled),
                    ("logged out and in", self.logged_out_and_in),
                    ("registered anew", self.registered_anew),
                    ("IPv6 alone", self.ipv6_alone),
                    ("follower dead", self.follower_dead),
                    ("late, with another address", self.late),
                )
            ),
            ("again", lambda: self.again(FOLLOW, moved=True)),
        ]

    def unseen(self, what: str, act: Callable[[], None]) -> None:
        """Do it, unseen by the public side; in the end sshd listens on tailscale0's addresses."""
        host = self.host(FOLLOW)
        with watched(host.target, host.places) as seen:
            act()
        assert seen.opened == [], f"{what}: in public"
        self.tries[what] = seen.tries
        wanted = sorted(f"[{each}]:22" if ":" in each else f"{each}:22" for each in host.addresses())
        assert wanted, what
        assert host.listeners() == wanted, what

    def tailscaled_killed(self) -> None:
        """It comes back by itself; a session through the tailnet goes on."""
        host = self.host(FOLLOW)
        before = host.addresses()
        with host.session(before[0]) as session:
            pid = host.inside("systemctl show --value -p MainPID tailscaled").strip()
            host.inside(f"kill -9 {pid}")
            waited(lambda: host.addresses() == before, "the same addresses", within=60)
            took = host.comes_to_answer(before[0])
            assert session.echoes()
        print(f"tailscaled killed: answered after {took:.0f} s")

    def reinstalled(self) -> None:
        host = self.host(FOLLOW)
        before = host.addresses()
        with host.session(before[0]) as session:
            install = "DEBIAN_FRONTEND=noninteractive apt-get -q -y install --reinstall tailscale"
            host.inside(install, timeout=300)
            host.comes_to_answer(before[0])
            assert session.echoes()
        assert host.addresses() == before

    def logged_out_and_in(self) -> None:
        host = self.host(FOLLOW)
        before = host.addresses()
        with host.session(before[0]) as session:
            host.inside("tailscale logout")
            waited(lambda: not host.addresses(), "no address", within=30)
            assert not host.answers(before[0]), "the control: it was away"
            with self.server:
                self.join(host)
            host.comes_to_answer(host.addresses()[0])
            assert session.lives()

    def registered_anew(self) -> None:
        """Deleted in the admin console, joined again: other addresses."""
        host = self.host(FOLLOW)
        before = host.addresses()
        with host.session(before[0]) as session:
            self.move(host)
            after = host.addresses()
            assert not set(after) & set(before)
            took = host.comes_to_answer(after[0])
            host.comes_to_answer(after[1])
            assert session.lives()
        said = host.inside("journalctl -u quietport-sshd-follow --no-pager -o cat")
        assert after[0] in said
        print(f"registered anew: answered after {took:.0f} s")

    def ipv6_alone(self) -> None:
        """It loses its IPv4 address, and comes back from a boot without one."""
        host = self.host(FOLLOW)
        new6 = host.addresses()[1]
        with host.session(new6) as session:
            with self.server:
                faults.take_ipv4(host.tailnet, host.name)
            # It would hear of it by itself, a while after it has lost the server.
            host.inside("systemctl restart tailscaled")
            waited(lambda: host.addresses() == [new6], "IPv6 alone", within=60)
            waited(lambda: host.listeners() == [f"[{new6}]:22"], "sshd follows", within=60)
            host.comes_to_answer(new6)
            assert session.lives()
        self.lab("restart", host.name, timeout=300).ok()
        host.comes_to_answer(new6, within=90)
        assert host.addresses() == [new6]

    def follower_dead(self) -> None:
        """The next start of sshd corrects it, and so does the timer."""
        host = self.host(FOLLOW)
        host.inside("systemctl mask --runtime --now quietport-sshd-follow.service")
        try:
            stale = host.listeners()
            self.move(host)
            time.sleep(5)
            assert host.listeners() == stale, "the control: nobody follows"
            assert not host.answers(host.addresses()[0])
            host.inside("systemctl start quietport-sshd-follow-once.service")
            host.comes_to_answer(host.addresses()[0], within=20)
            self.move(host)
            host.inside("systemctl restart ssh", timeout=180)
            host.comes_to_answer(host.addresses()[0], within=20)
        finally:
            host.inside("systemctl unmask --runtime quietport-sshd-follow.service")
            host.inside("systemctl start quietport-sshd-follow.service")

    def late(self) -> None:
        """A boot on which tailscaled fails twice, starts a minute late, and gets other addresses."""
        host = self.host(FOLLOW)
        before = host.addresses()
        key = self.key(host)
        join = JOIN.format(server=host.tailnet.login_server, key=key, name=host.name)
        # Its node is deleted while it is down: it joins anew as soon as tailscaled has started.
        host.inside(
            f"{late(60)}printf '[Service]\\nExecStartPost=-/bin/sh -c \"(sleep 1; {join}) &\"\\n' "
            ">> /etc/systemd/system/tailscaled.service.d/late.conf; systemctl daemon-reload"
        )
        host.tailnet.delete_node(host.name)
        began = time.monotonic()
        self.lab("restart", host.name, timeout=300)
        waited(
            lambda: bool(host.addresses()) and not set(host.addresses()) & set(before),
            "other addresses",
            within=180,
        )
        host.comes_to_answer(host.addresses()[0], within=90)
        assert time.monotonic() - began > 55, "the control: it was late"
        assert host.inside(STARTS).strip() == "3"
        host.inside(NOT_LATE)

    def move(self, host: OnHost) -> None:
        """Another node, with other addresses."""
        before = host.addresses()
        with self.server:
            host.tailnet.delete_node(host.name)
            host.inside("timeout 20 tailscale logout", check=False)
            self.join(host)
        assert not set(host.addresses()) & set(before)

    def key(self, host: OnHost) -> str:
        # A node that was just deleted may register twice in one `tailscale up`.
        return host.tailnet.auth_key(reusable=True).read_text().strip()

    def join(self, host: OnHost) -> None:
        key = self.key(host)
        host.inside(JOIN.format(server=host.tailnet.login_server, key=key, name=host.name))
        waited(lambda: len(host.addresses()) == 2, "two addresses", within=60)

    # The host under a guard

    def chapters_of_guard(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        return [
            ("up", lambda: self.converge(GUARD)),
            ("daemon-reloads", self.daemon_reloads),
            ("killed half-way", self.killed_half_way),
            ("exec killed", self.exec_killed),
            ("who may not confirm", self.who_may_not_confirm),
            ("who may confirm", self.who_may_confirm),
            ("a command with confirmation", self.command_with_confirmation),
            ("a command without confirmation", self.command_without_confirmation),
            ("rebooted", self.rebooted),
            ("again", lambda: self.again(GUARD)),
            ("nonlocal bind alone", self.nonlocal_bind_alone),
            ("ordering alone", self.ordering_alone),
        ]

    def changed_under_guard(self, host: OnHost, *options: str) -> str:
        """Arm, change; the token."""
        host.scope()
        token = host.arm(*options)
        host.inside(CHANGE)
        assert host.differs(), "the control: there is something to undo"
        return token

    def undone(self, host: OnHost, token: str, *, why: str, within: float) -> dict[str, Any]:
        """The old state is there, complete, and said so."""
        end = host.end_of(token, within=within)
        assert (end["how"], end["why"]) == ("rolled back", why), end
        assert host.differs() == ""
        return end

    def daemon_reloads(self) -> None:
        """On Debian 12 a reload begins the counting of OnActiveSec anew (systemd#27752)."""
        host = self.host(GUARD)
        address = host.addresses()[0]
        with host.session(address) as session:
            token = self.changed_under_guard(host, "--timeout 20")
            began = time.monotonic()
            for _ in range(4):
                time.sleep(2.5)
                host.inside("systemctl daemon-reload")
            there = f"test -e {CHANGED}"
            waited(lambda: host.done(there).returncode != 0, "undone", within=20)
            assert time.monotonic() - began < 27, "the counting began anew"
            self.undone(host, token, why="timeout", within=ROLLBACK_S)
            assert session.echoes()

    def killed_half_way(self) -> None:
        host = self.host(GUARD)
        token = self.changed_under_guard(host, "--timeout 10")
        unit = f"quietport-guard-{token}.service"
        killed = host.inside(
            f"while [ -e {CHANGED} ]; do sleep 0.02; done; "
            f"pid=$(systemctl show --value -p MainPID {unit}); kill -9 $pid && echo $pid"
        )
        assert int(killed) > 1
        self.undone(host, token, why="timeout", within=ROLLBACK_S)
        said = host.inside("journalctl --no-pager -o cat -t quietport-guard")
        assert said.count(f"rolling back guard {token}") == 2

    def exec_killed(self) -> None:
        """What a killed `exec` leaves at work, in a session of its own, is ended by the rollback."""
        host = self.host(GUARD)
        host.scope()
        token = host.arm("--timeout 10")
        left = "sh -c 'ufw deny 2222/tcp; setsid -w sleep 4321'"
        pid = host.inside(f"quietport guard exec {token} -- {left} >/dev/null 2>&1 & echo $!").strip()
        at_work = "pgrep -x -f 'sleep 4321'"
        waited(lambda: host.done(at_work).returncode == 0, "at work", within=30, every=0.1)
        host.inside(f"kill -9 {pid}")
        assert host.done(at_work).returncode == 0, "the control: it goes on"
        end = self.undone(host, token, why="timeout", within=ROLLBACK_S)
        assert host.done(at_work).returncode == 1
        assert any("killing" in line and "(sleep)" in line for line in end["log"]), end

    def who_may_not_confirm(self) -> None:
        """The console, a login from before through a shared connection, the public address."""
        host = self.host(GUARD)
        address, public = host.addresses()[0], host.target.public_ip
        # Short: a socket's path fits into 108 bytes (unix(7)).
        folder = tempfile.mkdtemp()
        shared = ("-o", f"ControlPath={folder}/%h")
        rule = f"ufw allow proto tcp to {public} port 22; systemctl reload ssh; sleep 1"
        host.inside(f"echo 'ListenAddress {public}' > /etc/ssh/sshd_config.d/01-lab.conf; {rule}")
        master = subprocess.Popen([*host.ssh_argv(address, "-M", *shared), "sleep 600"])
        try:
            waited(lambda: host.login(address, "true", *shared, "-O", "check").code == 0, "shared", within=30)
            token = host.arm("--timeout 120")
            confirm = f"quietport guard confirm {token}"
            console = host.done(confirm)
            assert (console.returncode, "no SSH login" in console.stderr) == (1, True), console.stderr
            old = host.login(address, confirm, *shared)
            assert (old.code, "older than the guard" in old.err) == (1, True), old.err
            outside = host.login(public, confirm)
            assert (outside.code, "not an address of the tailnet" in outside.err) == (1, True), outside.err
            assert host.status()["armed"]["token"] == token
            host.inside("quietport guard rollback")
        finally:
            master.kill()
            master.wait()
            shutil.rmtree(folder)
            host.inside(f"rm -f /etc/ssh/sshd_config.d/01-lab.conf; ufw delete {rule[4:]}")

    def who_may_confirm(self) -> None:
        """A new login over the tailnet, root's or that of a user with sudo."""
        host = self.host(GUARD)
        address = host.addresses()[0]
        host.inside(
            "useradd -m -s /bin/sh lab; echo 'lab ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/lab; "
            "cp -r /root/.ssh /home/lab/; chown -R lab: /home/lab/.ssh"
        )
        for user, sudo in (("root", ""), ("lab", "sudo ")):
            host.scope()
            token = host.arm("--timeout 60")
            host.inside("ufw deny 2222/tcp")
            host.login(address, f"{sudo}quietport guard confirm {token}", user=user).ok()
            assert host.end_of(token, within=5)["how"] == "confirmed"
            assert host.differs(), "it stays"
            host.inside("ufw delete deny 2222/tcp")
            assert host.differs() == ""
        host.inside("userdel -r lab; rm /etc/sudoers.d/lab")

    @contextlib.contextmanager
    def typed(self, host: OnHost, timeout: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """What docs/guard.md types, in a login; and the line that it says to type in another."""
        command = f"quietport guard run --timeout {timeout} -- ufw deny 2222/tcp"
        argv = host.ssh_argv(host.addresses()[0])
        process = subprocess.Popen([*argv, command], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"quietport guard confirm \w+", line):
                    yield process, found.group()
                    return
            raise AssertionError("it does not say how to confirm")
        finally:
            process.kill()
            process.wait()

    def command_with_confirmation(self) -> None:
        host = self.host(GUARD)
        with self.typed(host, 60) as (process, confirm):
            host.login(host.addresses()[0], confirm).ok()
            assert process.wait(30) == 0
        assert "2222/tcp" in host.inside("ufw status")
        host.inside("ufw delete deny 2222/tcp")

    def command_without_confirmation(self) -> None:
        host = self.host(GUARD)
        host.scope()
        with self.typed(host, 15) as (process, _):
            assert "2222/tcp" in host.inside("ufw status"), "the control: it was done"
            assert process.wait(15 + ROLLBACK_S) == 1
        assert host.differs() == ""

    def rebooted(self) -> None:
        host = self.host(GUARD)
        token = self.changed_under_guard(host, "--timeout 600")
        before = host.addresses()
        self.lab("restart", host.name, timeout=300).ok()
        end = self.undone(host, token, why="boot", within=90)
        host.comes_to_answer(before[0], within=90)
        journal = host.inside("journalctl -b --no-pager -o cat")
        assert "ordering cycle" not in journal.lower()
        assert not reachable(host.target, host.places)
        assert "putting the old files back" in journal, end

    def nonlocal_bind_alone(self) -> None:
        """sshd is active, content and listens; nobody reaches it at the address the host has."""
        host = self.host(GUARD)
        setting = "sysctl -q -w net.ipv4.ip_nonlocal_bind={0} net.ipv6.ip_nonlocal_bind={0}"
        host.inside(f"{UNFOLLOWED}{setting.format(1)}")
        try:
            self.move(host)
            host.inside("systemctl restart ssh; sleep 1; sshd -t")
            assert host.inside("systemctl is-active ssh").strip() == "active"
            assert len(host.listeners()) == 2
            assert not any(map(host.answers, host.addresses()))
        finally:
            host.inside(f"{setting.format(0)}; {FOLLOWED_AGAIN}")
        host.comes_to_answer(host.addresses()[0])

    def ordering_alone(self) -> None:
        """tailscaled has started, its address is not there yet: sshd exits with 255, and that is for good."""
        host = self.host(GUARD)
        ordered = "[Unit]\\nWants=tailscaled.service\\nAfter=tailscaled.service\\n"
        host.inside(f"{UNFOLLOWED}printf '{ordered}' > /etc/systemd/system/ssh.service.d/half.conf")
        try:
            restart = "systemctl daemon-reload; systemctl stop ssh tailscaled; systemctl start ssh"
            host.inside(restart, check=False)
            waited(lambda: len(host.addresses()) == 2, "two addresses", within=60)
            time.sleep(5)
            state = host.inside("systemctl show -p ActiveState,ExecMainStatus ssh").split()
            assert sorted(state) == ["ActiveState=failed", "ExecMainStatus=255"]
            assert not any(map(host.answers, host.addresses()))
        finally:
            host.inside(FOLLOWED_AGAIN)
        host.comes_to_answer(host.addresses()[0])

    # The host whose sshd is started by a socket

    def chapters_of_sockets(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        return [
            ("killed before the proof", self.killed_before_the_proof),
            ("converged", lambda: self.converge(SOCKETS)),
            ("again", lambda: self.again(SOCKETS)),
        ]

    def killed_before_the_proof(self) -> None:
        """The host undoes firewall and ssh by itself: its sockets are as they were, and it is public."""
        host = self.host(SOCKETS)
        units = "for verb in is-active is-enabled; do systemctl $verb ssh.socket ssh.service; done; true"
        units += "; ls -l /etc/systemd/system/ssh.service.requires | awk '{print $9, $11}'"
        before, units_before = ssh_and_firewall(self.lab, host.name), host.inside(units)
        places = [(host.target.public_ip, 22), (host.target.public_ip6, 22)]
        assert reachable(host.target, places) == set(places)
        with Converge.start(self.hosts, "--limit", host.name) as running:
            assert running.wait_for_name("ssh: answers the tailnet alone"), running.text[-3000:]
            waited(lambda: "masked" in host.inside(units), "moved", within=120, every=0.1)
            running.kill()
        assert not reachable(host.target, places), "the control: it was private"
        token = host.status()["armed"]["token"]
        end = host.end_of(token, within=GUARD_TIMEOUT_S + ROLLBACK_S)
        assert (end["how"], end["why"]) == ("rolled back", "timeout"), end
        assert changes(before, ssh_and_firewall(self.lab, host.name)) == []
        assert host.inside(units) == units_before
        assert reachable(host.target, places) == set(places)
