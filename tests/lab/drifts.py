"""Changes by hand to converged hosts, which a plan finds and one converge repairs (test_drift.py).

They are made on the hosts of a story that was told to its end: each on one container of the fleet, all of
them on the VM. A host has all of its drifts at once; what tells them apart is what the plan says of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.lab import fingerprint
from tests.lab.fingerprint import Fingerprint
from tests.lab.onhost import OnHost
from tests.lab.story import SECRET_PATH, SECRET_VARIABLE, Applied, Chapters, Done, Hosts, canary
from tests.lab.tale import Tale

MAKE_TIMEOUT_S = 300
SECRET_FOLDER = SECRET_PATH.rpartition("/")[0]
DROP_IN = "/etc/ssh/sshd_config.d/00-quietport.conf"
WINS = "/etc/ssh/sshd_config.d/00-a-hand.conf"
ADDS = "/etc/ssh/sshd_config.d/99-a-hand.conf"
UNITS = "/etc/systemd/system"
FIREWALL = "firewall: denied but for the tailnet and WireGuard"
SSH = "ssh: answers the tailnet alone, to keys alone"
REPORT = "timers: report, daily"
# A rule of somebody who is not told of quietport.
FOREIGN = "allow 8081/tcp"
# A drop-in of somebody else for a unit of ours.
FOREIGN_DROP_IN = f"{UNITS}/quietport-sshd-follow-once.service.d/hand.conf"
# A rule that ufw knows nothing of.
PAST_UFW = "INPUT -p tcp -m tcp --dport 8082 -j ACCEPT"
BY_SOMEBODY = f"""ufw {FOREIGN}
iptables -I {PAST_UFW}
mkdir -p $(dirname {FOREIGN_DROP_IN})
printf '[Service]\\nNice=5\\n' >{FOREIGN_DROP_IN}
systemctl daemon-reload"""
# What is due once a day may come at any moment, so it comes now. (Not an upgrade of packages: that would be
# another host.) The report fails for what the story has published. The last line: they did what they do.
A_DAY_OF_TIMERS = """listed=$(systemctl list-units --all --type=timer --plain --no-legend | cut -d' ' -f1)
for timer in $listed; do
  unit=$(systemctl show -P Triggers "$timer")
  case $timer in apt-daily*) ;; *) systemctl start "$unit" || systemctl reset-failed "$unit";; esac
done
test -e /var/backups/dpkg.status.0 && test -e /var/lib/quietport/ports.json"""
LOGS = (("ip", "ufw"), ("ip6", "ufw6"))
# What a converge notes there until the next boot; the hosts were booted since their last one.
SINCE_BOOT = tuple(
    f"path /run/{name}: is there, and should not:"
    for name in ("quietport-apt-updated", "quietport-sshd-apply.lock", "quietport/guard.lock")
)
# A converge that prunes tells the host so.
PRUNING = 'file /etc/quietport/host.json: -  "prune_foreign": false'
# Text that a person typed into a file where no secret belongs.
PASTED = "# {canary}"
OLD_TIMER = f"""for kind in service timer; do
  {{ echo '# Written by quietport, by an older version.'; echo "[Unit]"; }} >{UNITS}/quietport-old.$kind
done
printf '[Service]\\nExecStart=/bin/true\\n' >>{UNITS}/quietport-old.service
printf '[Timer]\\nOnCalendar=yearly\\n[Install]\\nWantedBy=timers.target\\n' >>{UNITS}/quietport-old.timer
systemctl daemon-reload
systemctl enable --now quietport-old.timer"""


@dataclass(frozen=True)
class Drift:
    """One thing a person did: `make` is what was typed.

    A plan must have it in the row `row`, with the reason `says`, which no other drift has; `also` are the
    reasons that follow from it. `leaves` begins what of the host is another than before, in spite of the
    repair: what the person made and is not ours to take away.
    """

    name: str
    make: str
    row: str
    says: str
    also: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    def claims(self, reason: str) -> bool:
        """Whether a reason of the plan may come from it."""
        return reason == self.says or any(reason.startswith(one) for one in self.also)


_SSHD = (
    "sshd runs with an older configuration",
    "passwordauthentication is yes, not no",
)

DRIFTS = (
    Drift(
        "a rule of ours removed",
        "ufw delete allow 41641/udp",
        FIREWALL,
        "rule missing: allow 41641/udp",
    ),
    Drift(
        "the order of the rules changed",
        "ufw prepend deny from 203.0.113.9",
        FIREWALL,
        "rule behind one that closes: allow in on tailscale0",
        also=("rule behind one that closes: ",),
    ),
    Drift(
        "a rule with our mark added",
        "ufw allow 9090/tcp comment 'quietport: by hand'",
        FIREWALL,
        "rule of ours that is wanted no more: allow 9090/tcp",
    ),
    Drift(
        "the kernel's policy opened",
        "iptables -P INPUT ACCEPT",
        FIREWALL,
        "the kernel does not deny what is incoming by default, over ipv4",
    ),
    Drift(
        "a default of ufw changed",
        "sed -i 's/^DEFAULT_OUTPUT_POLICY=.*/DEFAULT_OUTPUT_POLICY=\"DROP\"/' /etc/default/ufw",
        FIREWALL,
        "outgoing is deny by default, not allow",
        # A later `ufw allow` of a person makes ufw log what it now takes to be denied.
        leaves=tuple(f"rules {family}tables filter {chain}-after-logging-output:" for family, chain in LOGS),
    ),
    Drift(
        "the firewall not started at boot",
        "systemctl disable ufw.service",
        FIREWALL,
        "ufw.service is not enabled",
    ),
    Drift(
        "a unit's drop-in edited",
        f"echo '# by hand' >>{UNITS}/ufw.service.d/quietport.conf",
        "firewall: a restart of ufw.service opens nothing in between",
        f"{UNITS}/ufw.service.d/quietport.conf: its content differs",
    ),
    Drift(
        "a mode loosened",
        "chmod 0666 /etc/apt/apt.conf.d/52quietport",
        "packages: unattended upgrades on, tailscale's among them",
        "/etc/apt/apt.conf.d/52quietport: its mode is 0666, not 0644",
    ),
    Drift(
        "a directory's mode loosened",
        "chmod 0777 /var/log/quietport",
        "users: /var/log/quietport is there, 0750",
        "/var/log/quietport: its mode is 0777, not 0750",
    ),
    Drift(
        "the directory of root's programs open to everybody",
        "chmod 0777 /usr/local/lib/quietport",
        "programs: quietport's programs installed",
        "/usr/local/lib/quietport: its mode is 0777, not 0755",
    ),
    Drift(
        "our drop-in of sshd open to everybody",
        f"chmod 0666 {DROP_IN}",
        SSH,
        f"{DROP_IN}: its mode is 0666, not 0644",
    ),
    Drift(
        "a keyring open to everybody",
        "chmod 0666 /etc/apt/keyrings/tailscale.gpg",
        "tailscale: signed repository known to apt",
        "/etc/apt/keyrings/tailscale.gpg: its mode is 0666, not 0644",
    ),
    Drift(
        "an owner changed",
        "chown nobody /usr/local/bin/codex-openclaw-ssh-agent-ttl-evidence",
        "agent access: codex-openclaw-ssh-agent-ttl-evidence",
        "/usr/local/bin/codex-openclaw-ssh-agent-ttl-evidence: its owner is nobody:root, not root:root",
    ),
    Drift(
        "a program edited",
        "echo '# by hand' >>/usr/local/sbin/quietport",
        "programs: quietport's programs installed",
        "/usr/local/sbin/quietport: its content differs",
    ),
    Drift(
        "a file edited, a secret pasted into it",
        f"echo '{PASTED}' >>/etc/quietport/agent_known_hosts",
        "agent access: host keys that a session may be bound to",
        "/etc/quietport/agent_known_hosts: its content differs",
    ),
    Drift(
        "a socket unmasked",
        "systemctl unmask ssh.socket",
        SSH,
        "ssh.socket is not masked",
    ),
    Drift(
        "our drop-in of sshd edited",
        f"sed -i 's/^PasswordAuthentication no/PasswordAuthentication yes/' {DROP_IN}",
        SSH,
        f"{DROP_IN} differs",
        also=_SSHD,
    ),
    Drift(
        "another drop-in of sshd that wins",
        f"echo 'PasswordAuthentication yes' >{WINS}",
        SSH,
        f"{WINS} differs",
        also=_SSHD,
        leaves=(f"file {WINS}:", f"path {WINS}:"),
    ),
    Drift(
        "another drop-in of sshd that adds",
        f"echo 'Port 2222' >{ADDS}",
        SSH,
        f"{ADDS} differs",
        also=_SSHD[:1],
        leaves=(f"file {ADDS}:", f"path {ADDS}:"),
    ),
    Drift(
        "the drop-in of sshd's unit edited",
        f"echo '# by hand' >>{UNITS}/ssh.service.d/10-quietport.conf",
        SSH,
        f"{UNITS}/ssh.service.d/10-quietport.conf differs",
        also=("systemd has not read its unit",),
    ),
    Drift(
        "a secret changed",
        f"printf changed >{SECRET_PATH}",
        f"secrets: {SECRET_PATH}",
        f"{SECRET_PATH}: its content differs",
    ),
    Drift(
        "a secret's mode loosened",
        f"chmod 0644 {SECRET_PATH}",
        f"secrets: {SECRET_PATH}",
        f"{SECRET_PATH}: its mode is 0644, not 0600",
    ),
    Drift(
        "a secret's directory loosened",
        f"chmod 0755 {SECRET_FOLDER}",
        f"secrets: {SECRET_PATH}",
        f"{SECRET_FOLDER}: it is 0755 of root:root, not 0700 of root:root",
    ),
    Drift(
        "a package removed",
        "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 remove curl",
        "packages: base packages installed",
        "curl is not installed",
    ),
    Drift(
        "a preference of tailscale changed",
        "tailscale set --accept-routes=true",
        "tailscale: preferences as declared, Tailscale SSH off",
        "accept-routes is true, not false",
    ),
    Drift(
        "a daemon not started at boot",
        "systemctl disable tailscaled.service",
        "tailscale: installed and running",
        "tailscaled.service is active and disabled, not active and enabled",
    ),
    Drift(
        "the limits of a repository removed",
        "rm /etc/apt/preferences.d/quietport-tailscale",
        "tailscale: signed repository known to apt",
        "/etc/apt/preferences.d/quietport-tailscale: is absent",
    ),
    Drift(
        "a timer disabled",
        "systemctl disable --now quietport-report.timer",
        REPORT,
        "quietport-report.timer is disabled, not enabled",
        also=("quietport-report.timer is inactive, not active",),
    ),
    Drift(
        "a timer's service edited",
        f"echo '# by hand' >>{UNITS}/quietport-report.service",
        REPORT,
        f"{UNITS}/quietport-report.service: its content differs",
    ),
    Drift(
        "a timer of an older version",
        OLD_TIMER,
        "timers: none of ours but the declared ones",
        "quietport-old.timer is not declared",
    ),
    Drift(
        "apt's timer disabled",
        "systemctl disable --now apt-daily-upgrade.timer",
        "packages: apt's daily timers enabled",
        "apt-daily-upgrade.timer is disabled, not enabled",
        also=("apt-daily-upgrade.timer is inactive, not active",),
    ),
    Drift(
        "the follower not started at boot",
        "systemctl disable quietport-sshd-follow.service",
        "ssh: the tailnet addresses followed",
        "quietport-sshd-follow.service is disabled, not enabled",
    ),
    Drift(
        "the guard not started at boot",
        "systemctl disable quietport-guard-boot.service",
        "guard: what is unconfirmed is undone at boot",
        "quietport-guard-boot.service is disabled, not enabled",
    ),
    Drift(
        "an agent's runtime directory taken away",
        "loginctl disable-linger agent",
        "agent access: agent's runtime directory stays",
        "agent does not linger",
    ),
    Drift(
        "DOCKER-USER flushed",
        "iptables -F DOCKER-USER",
        "docker: containers not reachable from the public side, whatever they publish",
        "the rules that shield containers are not in place",
        # Docker's own last rule of the chain, which does what the end of a chain does.
        leaves=("rules iptables filter DOCKER-USER: --A DOCKER-USER -j RETURN",),
    ),
    Drift(
        "daemon.json edited",
        "sed -i 's/\"ip\": \"127.0.0.1\"/\"ip\": \"0.0.0.0\"/' /etc/docker/daemon.json",
        "docker: ports published on loopback, live-restore, logs rotated",
        "/etc/docker/daemon.json: its content differs",
    ),
    Drift(
        "the engine not started at boot",
        "systemctl disable docker.service",
        "docker: engine and compose installed, the engine running",
        "docker.service is disabled, not enabled",
    ),
    # Last: ufw puts its rules into the kernel anew with every change of them.
    Drift(
        "the firewall told to stay off",
        "sed -i 's/^ENABLED=.*/ENABLED=no/' /etc/ufw/ufw.conf",
        FIREWALL,
        "/etc/ufw/ufw.conf says that it does not come back after a boot",
    ),
    Drift(
        "a rule of ours taken out of the kernel",
        "ip6tables -D ufw6-user-input -i tailscale0 -j ACCEPT",
        FIREWALL,
        "the kernel has lost a rule, over ipv6: allow in on tailscale0",
    ),
)
# The row that follows from every change of firewall or ssh.
PROOF = "proof: firewall and sshd hold over a new login, the guard is disarmed"
PROOF_SAYS = "firewall or ssh change before it"


def share(names: Sequence[str]) -> dict[str, tuple[Drift, ...]]:
    """The drifts of each host, every drift on one of them."""
    ordered = sorted(names)
    return {name: DRIFTS[at :: len(ordered)] for at, name in enumerate(ordered)}


@dataclass(frozen=True)
class Told:
    """What `quietport plan --json` said, and how it ended."""

    done: Done

    @property
    def hosts(self) -> dict[str, dict[str, Any]]:
        """What it says of each host, by name. A host that could not be planned fails the test."""
        found = {host["name"]: host for host in json.loads(self.done.out)["hosts"]}
        assert {name: host["error"] for name, host in found.items() if host["error"]} == {}
        return found

    def rows(self, name: str) -> dict[str, list[str]]:
        """The reasons of each change of a host, by the change's name."""
        return {change["what"]: change["reasons"] for change in self.hosts[name]["changes"]}

    def every_row(self) -> frozenset[tuple[str, str]]:
        """(host, change) of all."""
        return frozenset((name, row) for name in self.hosts for row in self.rows(name))


def changed_by(applied: Applied) -> frozenset[tuple[str, str]]:
    """(host, change) of a converge, named as a plan names them."""
    return frozenset((host, operation.rpartition(" | ")[2]) for host, operation in applied.changed)


def unclaimed(rows: Mapping[str, Sequence[str]], drifts: Sequence[Drift]) -> Iterator[str]:
    """What a plan says of a host that none of its drifts accounts for."""
    for row, reasons in rows.items():
        if row == PROOF and list(reasons) == [PROOF_SAYS]:
            continue
        mine = [drift for drift in drifts if drift.row == row]
        for reason in reasons:
            if not any(drift.claims(reason) for drift in mine):
                yield f"{row}: {reason}"


@dataclass
class Drifted:
    """The story of a tale's hosts after its end."""

    tale: Tale
    of: dict[str, tuple[Drift, ...]] = field(init=False)
    before: dict[str, Fingerprint] = field(default_factory=dict)
    story: Chapters = field(init=False)

    def begin(self) -> Drifted:
        """Tell it in the background, once the tale itself is told to its last look at the hosts."""
        self.story = Chapters(self._chapters(), name=f"drift, {self.tale.chapters.name}").start()
        return self

    def _chapters(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        return [
            ("converged", self._converged),
            ("clean", lambda: Told(self.hosts.quietport("plan", "--json"))),
            ("made", self._make),
            ("found", lambda: Told(self.hosts.quietport("plan", "--json"))),
            ("in brief", lambda: self.hosts.quietport("drift")),
            ("repaired", lambda: self.hosts.apply().ok()),
            ("again", lambda: Told(self._elsewhere("plan", "--json"))),
            ("left", self._left),
            ("to be pruned", lambda: Told(self.pruning.quietport("plan", "--json"))),
            ("pruned", self._prune),
            ("left after that", lambda: self._left(PRUNING)),
            ("cleared away", self._clear_away),
        ]

    @property
    def hosts(self) -> Hosts:
        return self.tale.vary("drift", {SECRET_PATH: f"env:{SECRET_VARIABLE}"})

    @property
    def pruning(self) -> Hosts:
        """The same hosts, told to take foreign rules away."""
        return self.tale.vary("prune", {SECRET_PATH: f"env:{SECRET_VARIABLE}"}, prune_foreign=True)

    def _elsewhere(self, *args: str) -> Done:
        """The operator's program for somebody who has the hosts file and never converged these hosts."""
        text = self.hosts.file.read_text()
        for name in self.of:
            address = OnHost(self.tale.lab, name).addresses()[0]
            text = text.replace(f"[hosts.{name}]", f'[hosts.{name}]\ntailnet_address = "{address}"')
        # Not beside lab.json: there the lab's own pins and addresses are.
        place = self.tale.lab.run.directory / "elsewhere"
        place.mkdir(exist_ok=True)
        (place / "hosts.toml").write_text(text)
        hosts = Hosts(self.tale.lab, place / "hosts.toml")
        return hosts.quietport(*args, QUIETPORT_STATE=str(place / "state"))

    def _converged(self) -> None:
        """Told as the story's hosts file has it: other tests may have told them something else."""
        self.tale.chapters["spec again"]
        self.of = share(self.tale.names)
        self.hosts.apply().ok()

    def _make(self) -> None:
        for name, drifts in self.of.items():
            self.before[name] = fingerprint.through(self.hosts, name)
            host = OnHost(self.tale.lab, name)
            host.inside(A_DAY_OF_TIMERS, timeout=MAKE_TIMEOUT_S)
            host.inside(BY_SOMEBODY)
            for drift in drifts:
                host.inside(drift.make.replace("{canary}", canary()), timeout=MAKE_TIMEOUT_S)

    def _prune(self) -> None:
        """ufw's rules go; the rest is taken away by who made it."""
        self.pruning.apply().ok()
        for name in self.of:
            there = f"rm -r $(dirname {FOREIGN_DROP_IN}); systemctl daemon-reload; iptables -D {PAST_UFW}"
            OnHost(self.tale.lab, name).inside(there)

    def _clear_away(self) -> None:
        """What the repair left in place: other tests may read these hosts."""
        for name in self.of:
            host = OnHost(self.tale.lab, name)
            host.inside(f"rm -f {WINS} {ADDS} && systemctl restart ssh.service", timeout=MAKE_TIMEOUT_S)

    def _left(self, *besides: str) -> dict[str, list[str]]:
        """What of each host is not as before, without what its drifts leave, and lines that begin so."""
        found = {}
        for name, drifts in self.of.items():
            leaves = (*besides, *SINCE_BOOT, *(start for drift in drifts for start in drift.leaves))
            after = fingerprint.through(self.hosts, name)
            lines = fingerprint.differences(self.before[name], after)
            found[name] = [line for line in lines if not line.startswith(leaves)]
        return found


_BEGUN: dict[str, Drifted] = {}


def drifted(tale: Tale) -> Drifted:
    """What is told of a tale's hosts after its end, in the background from the first time it is asked for."""
    name = tale.chapters.name
    if name not in _BEGUN:
        _BEGUN[name] = Drifted(tale).begin()
    return _BEGUN[name]
