"""What can be wrong with a converged host, provoked: the doctor names it, and its next step mends it.

Those of one batch are there at the same time and are mended one after the other; a converge that several of
them ask for is run once. The engine's and the tailnet's come on their own, because others stand on them.

A container has the clock of its machine: that nobody sets it is for the unit tests. So are inodes that run
out.
"""

from __future__ import annotations

import datetime
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from lab import testimage
from lab.process import say
from tests.lab.onhost import OnHost, waited
from tests.lab.story import (
    BIN,
    CONVERGE_TIMEOUT_S,
    SECRET_PATH,
    SECRET_VARIABLE,
    Chapters,
    Hosts,
    Lab,
    run,
)

NAME = "c13-doctor"
Batch = Literal["by commands", "the ground", "by a converge", "by a reboot"]
# In these the operator's side sees something else.
SEEN: tuple[Batch, ...] = ("by commands", "the ground")
BATCHES: tuple[Batch, ...] = ("by commands", "the ground", "by a converge", "by a reboot")

DOCTOR = "quietport-doctor.service"
LATEST = "/var/lib/quietport/doctor/latest.json"
IMAGE, SERVICE = "lab-busybox", "lab-shop-web"
SESSIONS = "/home/agent/.local/state/codex-openclaw-ssh-agent"
# News of the tailnet travel.
FOUND_WITHIN_S = 60
# sshd follows addresses that return, and this machine may be busy.
WELL_WITHIN_S = 180
STEP_TIMEOUT_S = 600
# Less than the three days from which on it is no warning any more.
KEY_LASTS = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Ailment:
    """One thing that is wrong: `provoke` makes it so, on the host.

    The check `check` must then have a row with `status`, and `says` in its reason. `undo` takes away what
    provoking it has left besides. `slow`: the timer finds it. `admin`: it is made and mended at the control
    server, and the next step must say so in these words.
    """

    check: str
    name: str
    provoke: str
    says: str
    status: Literal["FAIL", "WARN"] = "FAIL"
    batch: Batch = "by commands"
    undo: str = ""
    slow: bool = False
    admin: str = ""


_PUBLIC = """systemd-run --quiet --unit=lab-public.service python3 -m http.server 8088 --bind 0.0.0.0
for again in $(seq 100); do ss -Hltn 'sport = :8088' | grep -q . && exit 0; sleep 0.1; done
exit 1"""
_FAILS_ONCE = """cat >/run/systemd/system/lab-fails.service <<'END'
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'test -e /run/lab-tried || { touch /run/lab-tried; exit 1; }'
END
systemctl daemon-reload
! systemctl start lab-fails.service"""
_FULL = """mount -t tmpfs -o size=32m,mode=755 lab-full /var/cache
mkdir -p /var/cache/apt/archives/partial
head -c 33000000 /dev/zero >/var/cache/apt/archives/lab_1_all.deb"""
_OF_TOMORROW = f"""python3 - <<'END'
import json, pathlib
file = pathlib.Path("{LATEST}")
document = json.loads(file.read_text())
document["at"] = "2099-01-01T00:00:00+00:00"
file.write_text(json.dumps(document))
END"""
_OLD_LISTS = """stamps=/var/lib/apt/periodic
touch $stamps/update-stamp
for file in $stamps/update*stamp /var/lib/apt/lists/* /var/lib/apt/lists; do
  touch -d '4 days ago' "$file"
done"""
_NO_SUCH_SERVER = (
    'sed -i \'s#"login_server": "[^"]*"#"login_server": "https://control.quietport.invalid"#\''
    " /etc/quietport/host.json"
)

AILMENTS = (
    # By commands on the host
    Ailment(
        "key-expiry",
        "a key that expires in two days",
        "",
        "The node's key expires on",
        admin="Disable key expiry for this node",
    ),
    Ailment("firewall", "the firewall off", "ufw --force disable", "The firewall is not active"),
    Ailment("listeners", "a program that listens in public", _PUBLIC, "port 8088 is public"),
    Ailment("ssh-sockets", "a socket unmasked", "systemctl unmask ssh.socket", "ssh.socket is not masked"),
    Ailment(
        "compose",
        "a service stopped",
        f"docker stop -t 1 {SERVICE}",
        f"The service shop/web ({SERVICE}) does not run",
    ),
    Ailment(
        "published",
        "DOCKER-USER flushed",
        "iptables -F DOCKER-USER",
        "the chain DOCKER-USER does not begin with the rules of quietport",
    ),
    Ailment(
        "timers",
        "a timer disabled",
        "systemctl disable --now quietport-report.timer",
        "quietport-report.timer is disabled",
    ),
    Ailment("failed-units", "a unit that failed", _FAILS_ONCE, "lab-fails.service has failed"),
    Ailment("secrets", "a secret that all can read", f"chmod 0644 {SECRET_PATH}", f"{SECRET_PATH} is 0644"),
    Ailment(
        "sessions",
        "sessions that others can look into",
        f"chmod 0755 {SESSIONS}",
        f"{SESSIONS} belongs to uid",
    ),
    Ailment("disk", "a full disk", _FULL, "/var/cache is ", undo="umount /var/cache"),
    Ailment("clock", "a result of another century", _OF_TOMORROW, "the clock is wrong, or was"),
    # What others stand on
    Ailment(
        "tailnet",
        "tailscale switched off",
        "tailscale down --accept-risk=lose-ssh",
        "tailscale was switched off here",
        batch="the ground",
    ),
    Ailment(
        "docker",
        "the engine stopped",
        "systemctl stop docker.socket docker.service",
        "The engine does not run",
        batch="the ground",
    ),
    Ailment(
        "updates",
        "lists of packages that are four days old",
        _OLD_LISTS,
        "The lists of packages are 4 days old",
        batch="the ground",
        slow=True,
    ),
    # What the converge puts back, once it gets in: first the one that needs none
    Ailment(
        "tailnet",
        "Tailscale SSH switched on",
        "tailscale set --accept-risk=lose-ssh --ssh=true",
        "Tailscale SSH answers logins",
        batch="by a converge",
    ),
    Ailment(
        "firewall",
        "a rule of ours removed",
        "ufw delete allow 41641/udp",
        "ule missing: allow 41641/udp",
        batch="by a converge",
    ),
    Ailment(
        "sshd",
        "another drop-in of sshd that wins",
        "echo 'PasswordAuthentication yes' >/etc/ssh/sshd_config.d/00-a-hand.conf; systemctl reload ssh",
        "passwordauthentication",
        batch="by a converge",
    ),
    Ailment(
        "secrets",
        "a secret removed",
        f"rm {SECRET_PATH}",
        f"{SECRET_PATH} is absent",
        batch="by a converge",
    ),
    Ailment(
        "timers",
        "a timer removed",
        "systemctl disable --now quietport-report.timer; rm /etc/systemd/system/quietport-report.timer; "
        "systemctl daemon-reload",
        "quietport-report.timer is not-found",
        batch="by a converge",
    ),
    Ailment(
        "dns",
        "a login server that nobody knows",
        _NO_SUCH_SERVER,
        "control.quietport.invalid, the login server, is not found",
        batch="by a converge",
        slow=True,
    ),
    # A reboot
    Ailment(
        "reboot",
        "a reboot that is overdue",
        "touch -d '15 days ago' /run/reboot-required",
        "A reboot is due since 15 days",
        batch="by a reboot",
    ),
)


def commands(step: str) -> list[str]:
    """What a next step says to type, in its order."""
    return re.findall(r"`([^`]+)`", step)


@dataclass(frozen=True)
class Doctor:
    """What `quietport doctor --json` said, and how it ended."""

    code: int
    document: Mapping[str, Any]

    def rows(self, check: str) -> list[Mapping[str, Any]]:
        return [row for row in self.document["checks"] if row["check"] == check]

    def failing(self) -> list[str]:
        return [
            f"{row['check']}: {row['reason']}" for row in self.document["checks"] if row["status"] == "FAIL"
        ]

    def row_of(self, ailment: Ailment) -> Mapping[str, Any] | None:
        """The row that names it."""
        named = [row for row in self.rows(ailment.check) if ailment.says in row["reason"]]
        return next((row for row in named if row["status"] == ailment.status), None)

    def is_well(self, check: str) -> bool:
        """Whether nothing of a check is FAIL. A WARN may have another reason, such as today's updates."""
        return bool(self.rows(check)) and not any(row["status"] == "FAIL" for row in self.rows(check))


@dataclass
class Patient:
    """The host, and what is told about it."""

    lab: Lab
    story: Chapters = field(init=False)
    typed: dict[str, list[str]] = field(default_factory=dict)
    """What was typed for each ailment, by its name."""

    @property
    def host(self) -> OnHost:
        return OnHost(self.lab, NAME)

    @property
    def hosts(self) -> Hosts:
        return Hosts.of(self.lab, "doctor", every={"secrets": {SECRET_PATH: f"env:{SECRET_VARIABLE}"}})

    @classmethod
    def begun(cls, lab: Lab) -> Patient:
        """Begin to tell it."""
        told = cls(lab)
        told.story = Chapters(told.chapters(), name="doctor").start()
        return told

    def chapters(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        batches: list[tuple[str, Callable[[], Any]]] = []
        for batch in BATCHES:
            batches += [
                (f"ill: {batch}", partial(self.provoked, batch)),
                *([(f"seen: {batch}", self.seen)] if batch in SEEN else []),
                (f"well: {batch}", partial(self.mended, batch)),
            ]
        return [
            ("up", lambda: self.lab.up(kind="container", distro="trixie", name=NAME)),
            ("converged", lambda: self.hosts.apply().ok()),
            ("before the timer", self.doctor),
            ("healthy", self.healthy),
            ("seen: healthy", self.seen),
            *batches,
        ]

    def doctor(self) -> Doctor:
        done = self.host.done("quietport doctor --json")
        return Doctor(done.returncode, json.loads(done.stdout))

    def seen(self) -> Doctor:
        """What `quietport doctor` on the operator's side says."""
        done = self.hosts.quietport("doctor", "--json")
        return Doctor(done.code, json.loads(done.out))

    def healthy(self) -> Doctor:
        """With a service as compose makes it, and a result of the timer."""
        labels = "--label com.docker.compose.project=shop --label com.docker.compose.service=web"
        serve = f"--init --restart always {labels} {IMAGE} /bin/busybox sleep 1000000"
        self.host.inside(f"set -e; set -- {IMAGE}; {testimage.IN_A_TARGET}", timeout=STEP_TIMEOUT_S)
        self.host.inside(f"docker run -d --name {SERVICE} {serve}")
        self.host.inside(f"systemctl start {DOCTOR}", timeout=STEP_TIMEOUT_S)
        return self.doctor()

    def provoked(self, batch: Batch) -> Doctor:
        """All of a batch; what the doctor then says, once it names them all."""
        ailments = [one for one in AILMENTS if one.batch == batch]
        for one in ailments:
            if one.admin:
                at = datetime.datetime.now(datetime.UTC) + KEY_LASTS
                self.host.tailnet.expire_node(NAME, at=at)
            else:
                self.host.inside(one.provoke)
        if any(one.slow for one in ailments):
            self.host.inside(f"systemctl start {DOCTOR}", timeout=STEP_TIMEOUT_S)
        return self._comes_to(lambda said: all(said.row_of(one) for one in ailments), within=FOUND_WITHIN_S)

    def mended(self, batch: Batch) -> Doctor:
        """By what the doctor said, to the letter; what it says then."""
        ill: Doctor = self.story[f"ill: {batch}"]
        ailments = [one for one in AILMENTS if one.batch == batch]
        typed: set[str] = set()
        for one in ailments:
            row = ill.row_of(one)
            if row is not None:
                self.typed[one.name] = self._follow(one, row["next_step"], typed)
        for one in ailments:
            if one.undo:
                self.host.inside(one.undo)
        return self._comes_to(lambda said: not said.failing(), within=WELL_WITHIN_S)

    def _comes_to(self, expected: Callable[[Doctor], bool], *, within: float) -> Doctor:
        """What the doctor says once it is as expected, or at last: the tests say what was missing."""
        said = [self.doctor()]

        def asked() -> bool:
            said.append(self.doctor())
            return expected(said[-1])

        try:
            if not expected(said[-1]):
                waited(asked, "the doctor says what is expected", within=within, every=3)
        except AssertionError as error:
            say(f"{error}: {said[-1].failing()}")
        return said[-1]

    def _follow(self, ailment: Ailment, step: str, before: set[str]) -> list[str]:
        """Type what a next step says. A converge does for all of a batch."""
        if ailment.admin:
            assert ailment.admin in step
            self.host.tailnet.never_expire_node(NAME)
            return [ailment.admin]
        found = commands(step)
        for command in found:
            words = shlex.split(command)
            if words[:2] == ["quietport", "apply"]:
                if command not in before:
                    argv = [str(BIN / "quietport"), *words[1:]]
                    run(argv, env=self.hosts.env(), timeout=CONVERGE_TIMEOUT_S).ok()
                before.add(command)
            elif words == ["systemctl", "reboot"]:
                # A container has no machine of its own to reboot: the lab does it from outside.
                self.lab("restart", NAME, timeout=STEP_TIMEOUT_S).ok()
                self.host.done("systemctl is-system-running --wait", timeout=STEP_TIMEOUT_S)
            else:
                # Those that only show something may fail; whether the others did is what is asked afterwards.
                self.host.done(command, timeout=STEP_TIMEOUT_S)
        return found
