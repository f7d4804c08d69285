"""An agent on a converged host logs in to a second host by a session that is bound to it, and to no third.

The key is the agent's for as long as the session lasts, and of no use elsewhere: both hosts accept it.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.onhost import OnHost
from tests.lab.story import Hosts
from tests.lab.tale import Tale

TOLD_BY = ("fleet",)
HERE, SECOND, THIRD = "c13", "c12", "c13-third"
KEY = "/root/agent-key"
LOGIN = "ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=10"
AGENT = "codex-openclaw-ssh-agent"
# Longer than its session, which has the shortest TTL that still lets a login through on a busy machine.
SHORT_TTL_S, LATER_S = 10, 14


@dataclass(frozen=True)
class Party:
    """The host with the agent, and two that accept its key."""

    here: OnHost
    second: str
    third: str

    def run(self, command: str, *options: str, ttl: str = "2m") -> subprocess.CompletedProcess[str]:
        """What the agent gets to see when it runs a command in a session."""
        words = " ".join(options)
        wrapped = f"{AGENT} --ttl {ttl} --key-fd 3 {words} -- sh -c '{command}' 3<{KEY}"
        return self.here.done(f"cd / && runuser -u agent -- {wrapped}", timeout=180)

    def sessions(self) -> str:
        return self.here.inside(f"cd / && runuser -u agent -- {AGENT} --list --json")


@pytest.fixture(scope="module")
def party(
    request: pytest.FixtureRequest, stories: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Party]:
    tale: Tale = stories.told["fleet"]  # type: ignore[attr-defined]
    tale.chapters["spec again"]
    lab = tale.lab
    lab.up(kind="container", distro="trixie", name=THIRD)
    here, second, third = (OnHost(lab, name) for name in (HERE, SECOND, THIRD))
    file = tmp_path_factory.mktemp("agent") / "key"
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", secrets.token_hex(8), "-f", str(file)]
    subprocess.run(argv, check=True)
    public = Path(f"{file}.pub").read_text().strip()
    # As the operator's secrets are: root's alone, and given to the agent as an open file.
    here.inside(f"umask 077; cat >{KEY} <<'END'\n{file.read_text()}END\n")
    for host, home in ((second, "/home/agent"), (third, "/root")):
        user = home.rpartition("/")[2]
        here_is = f"install -d -m 0700 -o {user} {home}/.ssh; echo {public} >>{home}/.ssh/authorized_keys"
        host.inside(f"{here_is}; chown {user}: {home}/.ssh/authorized_keys")
    second_address = second.addresses()[0]
    host_key = second.inside("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub").strip()
    told = {HERE: {"agent_known_hosts": [f"{second_address} {host_key}"]}}
    hosts = Hosts.of(lab, "agent", every={"docker_source": "debian"}, **told)
    hosts.apply("--limit", HERE).ok()
    yield Party(here, f"agent@{second_address}", f"root@{third.target.public_ip}")
    here.inside(f"rm -f {KEY}")


def test_a_session_lets_the_agent_in_there(party: Party) -> None:
    done = party.run(f"{LOGIN} {party.second} echo in", "--allow-host", party.second.partition("@")[2])
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr


def test_and_not_at_a_third_host(party: Party) -> None:
    allowed = party.second.partition("@")[2]
    done = party.run(f"{LOGIN} {party.third} echo in", "--allow-host", allowed)
    assert (done.returncode, done.stdout) == (255, ""), done.stderr
    # Positive control: it is the constraint that kept it out.
    free = party.run(f"{LOGIN} {party.third} echo in")
    assert (free.returncode, free.stdout) == (0, "in\n"), free.stderr


def test_and_not_when_its_time_is_over(party: Party) -> None:
    login = f"{LOGIN} {party.second} echo in"
    done = party.run(f"{login}; sleep {LATER_S}; {login}", ttl=f"{SHORT_TTL_S}s")
    assert (done.returncode, done.stdout) == (255, "in\n"), done.stderr


def test_nothing_of_it_is_left(party: Party) -> None:
    assert '"active"' not in party.sessions()
    assert party.here.done("pgrep -u agent ssh-agent").returncode == 1
    found = "grep -rl 'OPENSSH PRIVATE' /home/agent /run/user /tmp /var/lib/quietport"
    left = party.here.inside(f"{found} || true")
    assert left == ""
