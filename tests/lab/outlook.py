"""What is open to the public of one host, looked at all the time from both sides, and judged afterwards.

From inside: the kernel's listening sockets in the host's network namespace. From outside: connections from
its public side. Both tell when something opened and when it closed.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lab import container, public
from lab.state import Run, Target
from tests.lab.story import Place

# What tailscaled and DHCP clients have open for everybody (quietport/ports.py says why). Higher ports are
# those that programs get for a question of their own, such as DNS.
ALLOWED_UDP = (68, 546)
FIRST_EPHEMERAL = 32768
TAILNET = tuple(ipaddress.ip_network(text) for text in ("100.64.0.0/10", "fd7a:115c:a1e0::/48"))
# What was closed for as long has gone, and its return is news. A restart of sshd is shorter.
GONE_S = 5.0
READY_TIMEOUT_S = 30

# Both run on this machine, in a namespace; their times are those of `time.monotonic` here. Each line is
# [TIME, NAME, OPEN]; [TIME, null, COUNT OF LOOKS] says that all was looked at once (more).
_INSIDE = """
import json, socket, time
KINDS = (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07"))

def address(text):
    host, port = text.split(":")
    data = bytes.fromhex(host)
    data = b"".join(data[at:at + 4][::-1] for at in range(0, len(data), 4))
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, data), int(port, 16)

def look():
    found = set()
    for kind, wanted in KINDS:
        try:
            table = open("/proc/self/net/" + kind)
        except FileNotFoundError:
            continue
        with table:
            next(table)
            for line in table:
                where, _, state = line.split(None, 4)[1:4]
                if state == wanted:
                    host, port = address(where)
                    found.add(f"{kind[:3]} {host} {port}")
    return found

seen, looks = set(), 0
while True:
    now = look()
    at = time.monotonic()
    looks += 1
    for name in sorted(now ^ seen):
        print(json.dumps([at, name, name in now]), flush=True)
    if looks % 20 == 1:
        print(json.dumps([at, None, looks]), flush=True)
    seen = now
    # A look walks through the kernel's table of all connections, those of other hosts of this machine, too.
    time.sleep(0.1)
"""
_OUTSIDE = """
import json, os, socket, sys, threading, time
places = [tuple(place) for place in json.loads(sys.argv[1])]
seen = {}

def say(value):
    os.write(1, (json.dumps(value) + "\\n").encode())

def look(place):
    try:
        socket.create_connection(place, timeout=0.7).close()
        now = True
    except OSError:
        now = False
    if now != seen.get(place, False):
        say([time.monotonic(), f"tcp {place[0]} {place[1]}", now])
    seen[place] = now

def watch(place):
    looks = 1
    while True:
        # Connections to an open port cost its program some that are not the operator's (MaxStartups).
        time.sleep(2 if seen[place] else 0.25)
        look(place)
        looks += 1
        if looks % 5 == 1:
            say([time.monotonic(), None, looks])

def all_at_once(act):
    threads = [threading.Thread(target=act, args=(place,)) for place in places]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

all_at_once(look)
say([time.monotonic(), None, 1])
all_at_once(watch)
"""


@dataclass(frozen=True)
class News:
    """Something opened or closed; `at` is a time of `time.monotonic`."""

    at: float
    name: str
    """Protocol, address and port."""
    open: bool


@dataclass
class View:
    """What one of the two saw."""

    before: set[str] = field(default_factory=set)
    """What was open when it first looked."""
    news: list[News] = field(default_factory=list)
    began: float = 0.0
    last: float = 0.0
    looks: int = 0

    def take(self, line: str) -> None:
        """Take a line of a watcher's output."""
        at, name, value = json.loads(line)
        self.last = at
        if name is None:
            self.began = self.began or at
            self.looks = max(self.looks, value)
        elif not self.began:
            self.before.add(name)
        else:
            self.news.append(News(at, name, value))

    def of(self, *names: str) -> View:
        """The same, of these alone."""
        news = [one for one in self.news if one.name in names]
        return View(self.before & {*names}, news, self.began, self.last, self.looks)

    @property
    def names(self) -> set[str]:
        """Everything it ever saw open."""
        return self.before | {one.name for one in self.news}

    def opened(self, *, proven_at: float = 0.0) -> list[str]:
        """What was not open before and opened, or came back after it had gone, each with the time.

        Until `proven_at` (time.monotonic) what was open before may come back: the guard undoes what is not
        proven.
        """
        found: list[str] = []
        closed: dict[str, float] = {}
        for one in self.news:
            after = f"{one.name}, {one.at - self.began:.1f} s after the beginning"
            if not one.open:
                closed[one.name] = one.at
            elif one.name not in self.before:
                found.append(after)
            elif one.at > proven_at and one.at - closed.get(one.name, one.at) > GONE_S:
                found.append(f"{after}, {one.at - closed[one.name]:.1f} s after it had closed")
        return found

    def longest_silence(self) -> float:
        """The longest time in seconds in which nothing of it was open."""
        now = set(self.before)
        longest, since = 0.0, self.began
        for one in self.news:
            if not now:
                longest = max(longest, one.at - since)
            (now.add if one.open else now.discard)(one.name)
            since = one.at
        return longest if now else max(longest, self.last - since)


@dataclass
class Outlook:
    """What was seen of one host."""

    inside: View = field(default_factory=View)
    outside: View = field(default_factory=View)

    def violations(self, *, proven_at: float = 0.0) -> list[str]:
        """What opened to the public that was not open before, a sentence each. `proven_at`: see View."""
        listeners = self.inside.of(*filter(is_public, self.inside.names))
        return [
            *(
                f"a public listener that was not there before: {text}"
                for text in listeners.opened(proven_at=proven_at)
            ),
            *(
                f"reached from the public side, as not before: {text}"
                for text in self.outside.opened(proven_at=proven_at)
            ),
        ]

    def without_sshd(self) -> float:
        """The longest time in seconds in which nothing listened on TCP port 22, whatever the address."""
        names = [name for name in self.inside.names if name.startswith("tcp ") and name.endswith(" 22")]
        return self.inside.of(*names).longest_silence()


def is_public(name: str) -> bool:
    """Whether a socket is one that the public could reach, and that needs a reason."""
    protocol, host, port = name.split()
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    if address.is_loopback or any(address in network for network in TAILNET):
        return False
    return protocol == "tcp" or (int(port) not in ALLOWED_UDP and int(port) < FIRST_EPHEMERAL)


@contextmanager
def observed(run: Run, target: Target, places: Iterable[Place]) -> Iterator[Outlook]:
    """Look at the host, and at these places from its public side, for as long as the block lasts.

    The block begins after the first look. Raises RuntimeError when a watcher does not get that far.
    """
    seen = Outlook()
    program = [sys.executable, "-I", "-c"]
    network = ["nsenter", f"--target={container.first_pid(run, target)}", "--net"]
    watchers = (
        (seen.inside, [*network, *program, _INSIDE]),
        (seen.outside, public.argv(target, [*program, _OUTSIDE, json.dumps(list(places))])),
    )
    processes = [_start(view, argv) for view, argv in watchers]
    try:
        end = time.monotonic() + READY_TIMEOUT_S
        while not (seen.inside.began and seen.outside.began):
            if time.monotonic() > end or any(process.poll() is not None for process, _ in processes):
                raise RuntimeError(f"{target.name}: the watch of its listeners did not begin")
            time.sleep(0.05)
        yield seen
    finally:
        for process, reader in processes:
            process.terminate()
            process.wait(30)
            reader.join(30)


def _start(view: View, argv: Sequence[str]) -> tuple[subprocess.Popen[str], threading.Thread]:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            # The last one may be cut by the signal.
            if line.endswith("\n"):
                view.take(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return process, reader
