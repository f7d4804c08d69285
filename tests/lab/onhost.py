"""One converged host of a lab, seen from inside, from the operator's side and from its public side."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab import keys, targets
from lab.state import Target
from lab.tailnet import Tailnet
from tests.lab.story import Done, Lab, Place, run

LOGIN_TIMEOUT_S = 60
# An address that came or went is believed after 1.5 s, and sshd then reloads; this machine may be busy.
FOLLOWED_S = 60
ARMED = "/etc/quietport/guard/armed.json"
HISTORY = "/var/lib/quietport/guard/history"
# A change by hand that a guard is to undo: firewall, sshd's files, and what sshd has read.
CHANGED = "/etc/ssh/sshd_config.d/99-lab.conf"
CHANGE = f"ufw deny 2222/tcp; echo ClientAliveInterval 77 >{CHANGED}; systemctl reload ssh"
# What a rollback may take after its time: two tries with sshd on a busy machine.
ROLLBACK_S = 60
# How often tailscaled was started by `late`, and the end of it.
STARTS = "wc -l < /run/starts"
NOT_LATE = "rm -f /etc/systemd/system/tailscaled.service.d/late.conf; systemctl daemon-reload"


def late(seconds: int) -> str:
    """Script: from the next boot on, tailscaled's start fails twice, and the third waits until `seconds`
    after the boot."""
    return f"""mkdir -p /etc/systemd/system/tailscaled.service.d
cat > /etc/systemd/system/tailscaled.service.d/late.conf <<'END'
[Service]
TimeoutStartSec={seconds + 120}
ExecStartPre=/root/late
END
cat > /root/late <<'END'
#!/bin/sh
echo . >> /run/starts
[ $(wc -l < /run/starts) -gt 2 ] || exit 1
age=$(ps -o etimes= -p 1)
[ $age -ge {seconds} ] || sleep $(({seconds} - age))
END
chmod 755 /root/late
"""


@dataclass(frozen=True)
class OnHost:
    """A host of a lab, by name."""

    lab: Lab
    name: str
    user: str = "root"
    """Who logs in unless another is named."""

    @property
    def target(self) -> Target:
        return self.lab.target(self.name)

    @property
    def tailnet(self) -> Tailnet:
        return Tailnet.attach(self.lab.run.directory)

    @property
    def places(self) -> list[Place]:
        """Port 22 of its public addresses."""
        return [(self.target.public_ip, 22), (self.target.public_ip6, 22)]

    def inside(self, script: str, *, check: bool = True, timeout: float = 120) -> str:
        """What a shell script prints in the host, past its sshd and its firewall."""
        return self.done(script, check=check, timeout=timeout).stdout

    def done(
        self, script: str, *, check: bool = False, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """As `inside`, with its exit code and errors."""
        command = ["sh", "-c", script]
        return targets.execute(self.lab.run, self.target, command, check=check, timeout=timeout)

    def addresses(self) -> list[str]:
        """Those on tailscale0 now, IPv4 first."""
        shown = json.loads(self.inside("ip -j addr show dev tailscale0 2>/dev/null || true") or "[]")
        found = [one["local"] for link in shown for one in link.get("addr_info", [])]
        return sorted((each for each in found if not each.startswith("fe80")), key=lambda each: ":" in each)

    def listeners(self) -> list[str]:
        """Where sshd listens, sorted."""
        return sorted(self.inside("ss -Hlnt 'sport = :22' | awk '{print $4}'").split())

    def ssh_argv(self, address: str, *options: str, user: str = "") -> list[str]:
        """OpenSSH's own client, to an address of the tailnet, or a public one."""
        proxy = f"ProxyCommand={self.tailnet.proxy_command}"
        argv = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
        argv += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=15"]
        argv += ["-i", str(keys.operator_key(self.lab.run)), "-o", "IdentitiesOnly=yes", *options]
        argv += [] if address == self.target.public_ip else ["-o", proxy]
        return [*argv, f"{user or self.user}@{address}"]

    def login(self, address: str, command: str, *options: str, user: str = "") -> Done:
        """Log in anew, run a command."""
        return run([*self.ssh_argv(address, *options, user=user), command], timeout=LOGIN_TIMEOUT_S)

    def answers(self, address: str) -> bool:
        """Whether a new login there works. One that hangs, on a path that is just being found, does not."""
        try:
            return self.login(address, "true").code == 0
        except subprocess.TimeoutExpired:
            return False

    def comes_to_answer(self, address: str, *, within: float = FOLLOWED_S) -> float:
        """Wait for a login there; how many seconds it took."""
        return waited(lambda: self.answers(address), f"{self.name} answers at {address}", within=within)

    @contextmanager
    def session(self, address: str) -> Iterator[Session]:
        """A login that stays."""
        argv = [*self.ssh_argv(address), "echo $$; exec cat"]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield Session(self, process, int(process.stdout.readline()))
        finally:
            process.kill()
            process.wait()

    # The guard

    def arm(self, *options: str) -> str:
        """The token of a guard that is armed now."""
        return self.inside(f"quietport guard arm {' '.join(options)} 2>/dev/null").strip()

    def scope(self, file: str = "/root/scope.json") -> None:
        """Note what a guard would keep, to compare with."""
        self.inside(f"quietport guard scope > {file}")

    def differs(self, file: str = "/root/scope.json") -> str:
        """What is not as it was noted."""
        done = self.done(f"quietport guard scope --against {file}")
        assert done.returncode == (1 if done.stdout else 0), done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What `guard status --json` says."""
        found: dict[str, Any] = json.loads(self.inside("quietport guard status --json"))
        return found

    @property
    def armed(self) -> bool:
        """Whether a guard is armed: `guard status` says more, and takes seconds on an emulated machine."""
        return self.done(f"test -e {ARMED}").returncode == 0

    def end_of(self, token: str, *, within: float) -> dict[str, Any]:
        """Wait for the end of a guard, and its entry in the history."""
        waited(lambda: not self.armed, f"{token} is armed no more", within=within, every=0.5)
        found: dict[str, Any] = next(one for one in self.status()["history"] if one["token"] == token)
        return found


@dataclass(frozen=True)
class Session:
    """A login that stays: `cat`, which is process `pid` of the host."""

    host: OnHost
    process: subprocess.Popen[str]
    pid: int

    def echoes(self) -> bool:
        """Whether what is typed comes back."""
        assert self.process.stdin is not None and self.process.stdout is not None
        word = f"{time.monotonic()}\n"
        self.process.stdin.write(word)
        self.process.stdin.flush()
        return self.process.stdout.readline() == word

    def lives(self) -> bool:
        """Whether the host has not ended it; nothing has to reach it."""
        return self.host.done(f"grep -qx cat /proc/{self.pid}/comm").returncode == 0


def waited(probe: Callable[[], bool], what: str, *, within: float, every: float = 1) -> float:
    """Wait until `probe`, at most `within` seconds; how many it took."""
    began = time.monotonic()
    while not probe():
        assert time.monotonic() - began < within, f"not within {within:g} s: {what}"
        time.sleep(every)
    return time.monotonic() - began
