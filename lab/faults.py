"""What goes wrong around a host, made on purpose: its link, its disk, the tailnet's control server.

Faults of the apt repositories are `lab.aptrepo.AptRepo.set_faults`; a reboot is `lab.targets.restart`.
Each fault here is a context: it is there in the block, and gone after it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lab import network, targets
from lab.process import LabError, run
from lab.state import Run, Target
from lab.tailnet import Tailnet

# What a full disk is on a target: these directories, each a file system of its own that has no room left.
FULL = ("etc", "var", "usr")
_ROOMY = "2g"

# A container has no disk of its own: a copy of each directory in memory, moved over the one that is there.
# systemd-logind has mounts of its own, with the old /etc: users made later are none to it.
_PREPARE = """set -eu
for name in "$@"; do
  ! mountpoint -q "/$name" || continue
  mkdir -p "/run/faults/$name"
  mount -t tmpfs -o "size=$ROOMY,mode=755,nr_inodes=0" faults "/run/faults/$name"
  cp -a "/$name/." "/run/faults/$name/"
done
for name in "$@"; do
  ! mountpoint -q "/run/faults/$name" || mount --move "/run/faults/$name" "/$name"
done
systemctl try-restart systemd-logind.service
"""
# Not a byte more than is used. What is written meanwhile would make the kernel refuse that size.
_FILL = """set -eu
for name in "$@"; do
  for try in 1 2 3 4 5; do
    used=$(df --output=used -k "/$name" | tail -n 1)
    ! mount -o "remount,size=$((used))k" "/$name" || continue 2
  done
  exit 1
done
"""
_FREE = 'for name in "$@"; do mount -o "remount,size=$ROOMY" "/$name"; done'


@dataclass(frozen=True)
class Disk:
    """The disk of a target, which can be filled at once and freed again.

    What is filled is /etc, /var and /usr; /root, /home and what is in memory anyway (/run, /tmp) are not. As
    on a disk without room, files can still be removed and renamed, and made empty, but not written. The
    directories are copies in memory from `prepare` on: a restart of the target brings back what was before.
    """

    run: Run
    target: Target

    def prepare(self) -> None:
        """Give the directories file systems of their own; takes seconds. Raises LabError."""
        self._do(_PREPARE)

    def fill(self) -> None:
        """Leave no room. Raises LabError when it was not prepared."""
        self._do(_FILL)

    def free(self) -> None:
        """Make room again."""
        self._do(_FREE)

    @contextmanager
    def full(self) -> Iterator[None]:
        """No room in the block. Prepares when that was not done."""
        self.prepare()
        self.fill()
        try:
            yield
        finally:
            self.free()

    def _do(self, script: str) -> None:
        argv = ["env", f"ROOMY={_ROOMY}", "sh", "-c", script, "sh", *FULL]
        targets.execute(self.run, self.target, argv)


def _cut_rules(target: Target) -> list[list[str]]:
    """All that crosses this machine to and from the target; the target's neighbours still reach it."""
    rules = []
    for program, address in (("iptables", target.public_ip), ("ip6tables", target.public_ip6)):
        base = [program, "-w", "10", "-t", "raw"]
        rules += [
            [*base, "{verb}", "PREROUTING", "-s", address],
            [*base, "{verb}", "PREROUTING", "-d", address],
            [*base, "{verb}", "OUTPUT", "-d", address],
        ]
    return rules


@contextmanager
def link_cut(run_: Run, target: Target) -> Iterator[None]:
    """Nothing gets from the operator to the target or back, publicly or over the tailnet, and nobody says so.

    Packets are dropped before anything else looks at them, those of connections that stand too. The rules
    have the run's mark: `down` removes them when nobody else does.
    """
    comment = ["-m", "comment", "--comment", network.mark(run_), "-j", "DROP"]
    rules = [[*rule, *comment] for rule in _cut_rules(target)]
    try:
        for rule in rules:
            run([word.format(verb="-I") for word in rule])
        yield
    finally:
        for rule in rules:
            run([word.format(verb="-D") for word in rule], check=False)


@contextmanager
def control_server_down(tailnet: Tailnet) -> Iterator[None]:
    """Nobody listens at the tailnet's login server; the connections it had are closed."""
    tailnet.stop_server()
    try:
        yield
    finally:
        tailnet.start()


@contextmanager
def control_server_silent(tailnet: Tailnet) -> Iterator[None]:
    """The login server takes connections and says nothing; in the end it goes on where it was."""
    process = tailnet.server
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def take_ipv4(tailnet: Tailnet, name: str) -> None:
    """The node of that name has an IPv6 address alone from now on, also after a reboot.

    The control server is away for seconds: no command of it changes addresses, so its file is written to.
    """
    with (
        control_server_down(tailnet),
        closing(sqlite3.connect(tailnet.directory / "db.sqlite")) as database,
        database,
    ):
        done = database.execute("UPDATE nodes SET ipv4 = NULL WHERE given_name = ?", (name,))
        if done.rowcount != 1:
            raise LabError(f"The tailnet has {done.rowcount} nodes of the name {name!r}.")
