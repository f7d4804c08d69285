"""`quietport sshd-restore`: sshd as it was without us, in public, or as it is.

Our drop-ins go, the lines we commented out come back, the sockets we masked are as the distribution ships
them. As with sshd-apply everything is checked on a candidate first, and what fails puts all of it back. Told
the ports that the firewall lets in, it refuses to move sshd to others.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from quietport import sshd, sshd_apply
from quietport.errors import USAGE
from quietport.net import in_tailnet_ranges, parse_address
from quietport.sshd_apply import (
    SEEN_FROM,
    Apply,
    Failed,
    Host,
    Plan,
    UnitState,
    candidate,
    only_one,
    to_the_end,
)

# Ubuntu's sshd is started by its socket since 22.10 (its openssh-server.postinst); Debian's is a service.
_BY_SOCKET = ("ubuntu",)


def shipped_with_socket(os_release: str) -> bool:
    """Whether the distribution has sshd started by ssh.socket, from the text of /etc/os-release."""
    values = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    return values.get("ID", "").strip("\"'") in _BY_SOCKET


def planned(host: Host) -> dict[str, tuple[str | None, str | None]]:
    """What is to be written, as path = (digest of what is there, not looked at; text, None for no file).

    Raises Failed for a file that cannot be read.
    """
    files = host.texts()
    wanted = sshd.without_ours(files)
    changed: dict[str, tuple[str | None, str | None]] = {
        path: (None, wanted.get(path)) for path in files if wanted.get(path) != files[path]
    }
    unit = host.read(sshd.UNIT_DROP_IN).data
    if unit is not None and unit.decode(errors="replace").startswith(sshd.OURS):
        changed[sshd.UNIT_DROP_IN] = (None, None)
    return changed


class Restore(Apply):
    """The way back, on one host. `ports` are those that strangers reach; `user` has to get in by a key."""

    # The other way round: while the unit's drop-in is there, no public sshd starts at a boot.
    ORDER: ClassVar[Mapping[str, int]] = {sshd.UNIT_DROP_IN: -2, sshd.DROP_IN: -1}
    HOW = ", as the distribution ships it"

    def __init__(
        self, host: Host, *, ports: Sequence[int], user: str, by_socket: bool, say: Callable[[str], None]
    ) -> None:
        plan = Plan(files=planned(host), mask=sshd.SOCKETS, listeners=frozenset(), users=(user,))
        super().__init__(plan, host, say=say)
        self.ports = frozenset(ports)
        self.by_socket = by_socket

    def _steps(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return (
            ("reading the old state", self._remember),
            ("checking the candidate", self._check_candidate),
            ("writing the files", self._swap),
            ("unmasking the sockets", self._unmask_all),
            ("restarting sshd", self._restart),
            ("waiting for the listeners", self._wait_for_listeners),
        )

    def _check_candidate(self) -> None:
        with candidate(self.host, {path: text for path, (_, text) in self.plan.files.items()}) as main:
            done = self.host.sshd("-t", "-f", str(main))
            if done.returncode != 0:
                said = " ".join(done.stderr.split()).replace(str(main.parent), "/etc/ssh")
                raise Failed(f"sshd refuses its files as they were: {said or 'it said nothing'}")
            user = self.plan.users[0]
            seen = (
                f"user={user},host=client.invalid,addr={SEEN_FROM[2]},laddr={SEEN_FROM[2]},lport={sshd.PORT}"
            )
            done = self.host.sshd("-T", "-f", str(main), "-C", seen)
            told = sshd.parse_effective(done.stdout)
        self.plan = replace(self.plan, listeners=frozenset(map(_listener, told.get("listenaddress", []))))
        strange = sorted(port for _, port in self.plan.listeners if port not in self.ports)
        if strange:
            opened = ", ".join(map(str, sorted(self.ports)))
            raise Failed(
                f"with its files as they were sshd would listen on port {strange[0]}, and the firewall was"
                f" opened for {opened or 'none'}. Look at SSHD_OPTS in /etc/default/ssh"
            )
        if not any(map(_is_public, self.plan.listeners)):
            raise Failed("with its files as they were sshd would listen on no public address")
        if told.get("pubkeyauthentication") != ["yes"]:
            raise Failed(f"with its files as they were {user} could not log in with a key")
        if user == "root" and told.get("permitrootlogin", ["yes"]) in (["no"], ["forced-commands-only"]):
            raise Failed("with its files as they were root could not log in (PermitRootLogin)")

    def _unmask_all(self) -> None:
        masked = [unit for unit in sshd.SOCKETS if self._is_masked(unit)]
        if masked:
            self.host.systemctl("unmask", *masked)

    def _is_masked(self, unit: str) -> bool:
        # Of templates and generated units systemctl says different things; the link is what masks.
        with suppress(OSError):
            return str(self.host.path(f"/etc/systemd/system/{unit}").readlink()) == "/dev/null"
        return False

    def _restart(self) -> None:
        self.host.systemctl("daemon-reload")
        self.restarted = True
        if self.by_socket and self.host.unit("ssh.socket").enabled in ("enabled", "disabled"):
            self.host.systemctl("disable", sshd.UNIT)
            self.host.systemctl("enable", "ssh.socket")
            # The port is free for the socket only without the service; sessions live on (KillMode=process).
            self.host.systemctl("stop", sshd.UNIT)
            self.host.systemctl("start", "ssh.socket")
        else:
            self.host.systemctl("enable", sshd.UNIT)
            self.host.systemctl("restart", sshd.UNIT)
        for unit in self.host.sockets():
            # What systemd-ssh-generator makes is started at a boot; nothing hangs on it now.
            if unit.startswith("sshd-") and "@" not in unit:
                self.host.run(["systemctl", "start", unit])

    def _wait_for_listeners(self) -> None:
        seen = self._wait(self.plan.listeners)
        self.answered = self.plan.listeners <= seen
        if not self.answered:
            shown, wanted = (
                ", ".join(sorted(map(sshd.endpoint, some))) for some in (seen, self.plan.listeners)
            )
            raise Failed(f"sshd listens on {shown or 'nothing'}, not on {wanted}")

    def _wait(self, wanted: frozenset[sshd.Listener]) -> frozenset[sshd.Listener]:
        # With a socket of sshd's, what else systemd listens on is seen too.
        deadline = time.monotonic() + sshd_apply.LISTEN_TIMEOUT_S
        while not wanted <= (seen := self.host.ssh_listeners()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return seen

    def _unmask(self, unit: str, state: UnitState) -> None:
        """For the way back from here: as it was, which is masked."""
        if not state.enabled.startswith("masked") or self._is_masked(unit):
            return
        now = self.host.unit(unit)
        if now.active:
            self.host.systemctl("stop", unit)
        if now.enabled.startswith("enabled"):
            self.host.systemctl("disable", unit)
        self.host.systemctl("mask", unit)


def _listener(endpoint: str) -> sshd.Listener:
    host, _, port = endpoint.split(" ")[0].rpartition(":")
    return host.strip("[]"), int(port)


def _is_public(listener: sshd.Listener) -> bool:
    address = parse_address(listener[0].partition("%")[0])
    return not address.is_loopback and not in_tailnet_ranges(address)


def _work(ports: Sequence[int], user: str, say: Callable[[str], None]) -> int:
    host = Host()
    try:
        os_release = Path("/etc/os-release").read_text(errors="replace")
    except OSError:
        os_release = ""
    try:
        with only_one():
            restore = Restore(
                host, ports=ports, user=user, by_socket=shipped_with_socket(os_release), say=say
            )
            return 0 if restore() else 1
    except Failed as error:
        say(f"sshd: {error}")
        return 1


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 refused or put back (the output says which step and why), 2 usage."""
    parser = argparse.ArgumentParser(prog="quietport sshd-restore", description=__doc__)
    parser.add_argument("--port", type=int, action="append", metavar="PORT", help="let in (default: 22)")
    parser.add_argument("--user", default="root", help="who has to get in by a key (default: root)")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.exit(USAGE, "quietport sshd-restore: only root can do this.\n")
    return to_the_end(lambda say: _work(options.port or [sshd.PORT], options.user, say))
