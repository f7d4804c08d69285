"""One host and every way into it besides the tailnet: break-glass, `quietport open`, undo (test_ways.py).

Its public side is one network, this machine another: what one of them is let in for shows at once that the
other is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab import public
from quietport import sshd
from tests.lab.onhost import OnHost, waited
from tests.lab.record import ROOT, plain
from tests.lab.story import Applied, Chapters, Done, Hosts, Lab, Place, reachable, run

NAME = "c13-ways"
UNDO = "deploys/undo.py"
ELSEWHERE = ("192.0.2.0/24", "2001:db8::/32")
# Our timer looks every minute, and this machine may be busy.
CLOSES_WITHIN_S = 180
STAYS_OPEN = "The time is over, and the host stays open"


@dataclass
class Ways:
    """The host, and what is told about it."""

    lab: Lab
    story: Chapters = field(init=False)
    said: dict[str, str] = field(default_factory=dict)
    """What a command told its user."""

    @property
    def host(self) -> OnHost:
        return OnHost(self.lab, NAME)

    @classmethod
    def begun(cls, lab: Lab) -> Ways:
        """Begin to tell it."""
        told = cls(lab)
        told.story = Chapters(told.chapters(), name="ways").start()
        return told

    def chapters(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        return [
            ("up", lambda: self.lab.up(kind="container", distro="trixie", name=NAME)),
            ("converged", self.converged),
            ("break-glass", self.break_glass),
            ("break-glass without a tailnet", self.break_glass_without_a_tailnet),
            ("break-glass for another network", self.break_glass_for_another),
            ("break-glass taken back", self.break_glass_taken_back),
            ("opened and closed", self.opened_and_closed),
            ("opened without tailscale", self.opened_without_tailscale),
            ("opened line by line", self.opened_line_by_line),
            ("an undo that proves nothing", self.undo_that_proves_nothing),
            ("undone", self.undone),
            ("converged again", self.converged_again),
        ]

    def hosts(self, *break_glass: str) -> Hosts:
        every = {"docker_source": "none", "secrets": {}, "break_glass_cidrs": list(break_glass)}
        return Hosts.of(self.lab, "ways", every=every)

    def apply(self, *break_glass: str) -> Applied:
        return self.hosts(*break_glass).apply().ok()

    def nothing_to_do(self, *break_glass: str) -> None:
        again = self.apply(*break_glass)
        assert not again.changed, sorted(again.changed)

    def open_places(self) -> set[Place]:
        """What the public side reaches of port 22."""
        return reachable(self.host.target, self.host.places)

    def neighbour(self, command: str) -> Done:
        """Log in at the public address from the public side."""
        host = self.host
        argv = [*host.ssh_argv(host.target.public_ip), command]
        return run(public.argv(host.target, argv), timeout=60)

    def converged(self) -> None:
        assert self.open_places() == set(self.host.places), "the control: a blank host"
        self.apply()
        assert self.open_places() == set()
        self.host.scope("/root/private.json")

    def break_glass(self) -> None:
        """Open for the listed source, over both families, and for no other; the specs agree."""
        host = self.host
        here = (f"{host.target.peer_ip}/32", f"{host.target.peer_ip6}/128")
        self.apply(*here)
        assert self.open_places() == set(host.places)
        assert self.neighbour("echo in").ok().out == "in\n"
        assert not host.answers(host.target.public_ip), "this machine is not listed"
        assert host.answers(host.addresses()[0])
        self.nothing_to_do(*here)
        self.hosts(*here).spec().ok()

    def break_glass_without_a_tailnet(self) -> None:
        host = self.host
        address = host.addresses()[0]
        host.inside("systemctl stop tailscaled")
        try:
            waited(lambda: not host.addresses(), "no address", within=30)
            assert self.neighbour("echo in").ok().out == "in\n"
            host.inside("systemctl restart ssh")
            assert self.neighbour("echo in").ok().out == "in\n"
            assert not host.answers(host.target.public_ip)
        finally:
            host.inside("systemctl start tailscaled")
        host.comes_to_answer(address)

    def break_glass_for_another(self) -> None:
        self.apply(*ELSEWHERE)
        assert self.open_places() == set()
        assert "0.0.0.0:22" in self.host.listeners(), "the control: it listens, the firewall keeps it away"

    def break_glass_taken_back(self) -> None:
        self.apply()
        self.nothing_to_do()
        assert self.open_places() == set()
        wanted = sorted(sshd.endpoint((address, 22)) for address in self.host.addresses())
        assert self.host.listeners() == wanted
        assert self.host.differs("/root/private.json") == ""

    # At the console

    def opened_and_closed(self) -> None:
        host = self.host
        host.inside("quietport open --for 30m")
        assert self.open_places() == set(host.places)
        host.login(host.target.public_ip, "true").ok()
        self.said["close"] = host.inside("quietport close")
        assert self.open_places() == set()
        assert host.answers(host.addresses()[0])
        assert host.differs("/root/private.json") == ""

    def opened_without_tailscale(self) -> None:
        """Its time is over and it stays open: nobody would get in. It closes when the tailnet works again."""
        host = self.host
        address = host.addresses()[0]
        host.inside("DEBIAN_FRONTEND=noninteractive apt-get remove -y -q tailscale", timeout=300)
        waited(lambda: not host.addresses(), "no address", within=30)
        assert self.open_places() == set()
        host.inside("quietport open --for 1m")
        assert self.open_places() == set(host.places)
        host.login(host.target.public_ip, "true").ok()
        host.inside("systemctl restart ssh")
        log = "journalctl -t quietport --no-pager -o cat"
        waited(lambda: STAYS_OPEN in host.inside(log), "the timer looked", within=CLOSES_WITHIN_S)
        self.said["stays open"] = next(line for line in host.inside(log).splitlines() if STAYS_OPEN in line)
        assert self.open_places() == set(host.places)
        host.inside("DEBIAN_FRONTEND=noninteractive apt-get install -y -q tailscale", timeout=300)
        waited(lambda: not self.open_places(), "closed by itself", within=CLOSES_WITHIN_S)
        host.comes_to_answer(address)
        # sshd moves first, and the firewall and the note about it after that.
        told = "quietport open --status"
        waited(lambda: host.inside(told).startswith("Not open. "), "all of it closed", within=30)

    def opened_line_by_line(self) -> None:
        """As docs/recovery.md has it for a host on which quietport itself cannot run: to keys alone."""
        host = self.host
        _, _, after = (ROOT / "docs/recovery.md").read_text().partition("the same by hand")
        host.inside(after.split("```")[1])
        assert self.open_places() == set(host.places)
        host.login(host.target.public_ip, "true").ok()
        assert "passwordauthentication no" in host.inside("sshd -T").splitlines()
        host.inside("ufw delete allow 22/tcp")
        self.apply()
        assert self.open_places() == set()
        assert host.differs("/root/private.json") == ""

    # And back

    def undo_that_proves_nothing(self) -> None:
        """Opened past somebody's rule that drops all: open's own rule, which an undo ends, is no way in."""
        host = self.host
        drop = "INPUT ! -i tailscale0 -p tcp --dport 22 -j DROP"
        host.inside(f"iptables -I {drop}; ip6tables -I {drop}; quietport open")
        assert self.open_places() == set(host.places)
        host.scope("/root/open.json")
        done = self.hosts().pyinfra(UNDO, "-y")
        assert done.code != 0
        self.said["undo"] = plain(done.text)
        assert host.differs("/root/open.json") == ""
        assert self.open_places() == set(host.places)
        host.inside(f"quietport close; iptables -D {drop}; ip6tables -D {drop}")
        assert self.open_places() == set()
        assert host.differs("/root/private.json") == ""

    def undone(self) -> None:
        """A public host with sshd as Debian ships it; a second time changes nothing."""
        host, hosts = self.host, self.hosts()
        hosts.pyinfra(UNDO, "-y").ok()
        assert self.open_places() == set(host.places)
        host.login(host.target.public_ip, "true").ok()
        again = json.loads(hosts.pyinfra(UNDO, "-y", "--json").ok().out)["results"]["operations"]
        assert [each["name"] for each in again if each["success"]] == []
        left = host.inside("grep -rl quietport /etc/ssh /etc/systemd/system/ssh* || true")
        assert left == "", left
        assert "quietport:" not in host.inside("ufw show added")

    def converged_again(self) -> None:
        """As if it had never been undone."""
        self.apply()
        assert self.open_places() == set()
        assert self.host.differs("/root/private.json") == ""
        self.nothing_to_do()
