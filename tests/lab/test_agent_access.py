"""An agent on a converged host logs in to a second host by a session that is bound to it, and to no third.

The key is the agent's for as long as the session lasts, two minutes here, and of no use elsewhere: both hosts
accept it. That session begins before the first test, and goes on beside the others.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.conftest import Stories
from tests.lab.onhost import OnHost
from tests.lab.story import Hosts

# The tale: its hosts stay when one of these tests fails.
pytestmark = [pytest.mark.container, pytest.mark.usefixtures("tale")]
TOLD_BY = ("fleet",)
HERE, SECOND, THIRD = "c13", "c12", "c13-third"
KEY = "/root/agent-key"
LOGIN = "ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=10"
AGENT = "codex-openclaw-ssh-agent"
TTL_S = 120
# Seconds after the first login: another one shortly before the end of the two minutes, and one after it.
STILL_S, OVER_S = 105, 125


@dataclass(frozen=True)
class Party:
    """The host with the agent, and two that accept its key."""

    here: OnHost
    second: str
    third: str

    @property
    def allowed(self) -> str:
        """The one host that sessions are bound to."""
        return self.second.partition("@")[2]

    def run(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        """What the agent gets to see when it runs a command in a session of two minutes."""
        words = " ".join(options)
        wrapped = f"{AGENT} --ttl {TTL_S}s --key-fd 3 {words} -- sh -c '{command}' 3<{KEY}"
        return self.here.done(f"cd / && runuser -u agent -- {wrapped}", timeout=TTL_S + 180)

    def two_minutes(self) -> subprocess.CompletedProcess[str]:
        """One session: a login at once, one shortly before its end, one after it, and when each was tried."""
        login = f"{LOGIN} {self.second} echo in"
        wait = "sleep $(({} - $(date +%s) + began))"
        moment = "echo after $(($(date +%s) - began))"
        parts = ["began=$(date +%s)", login]
        for seconds in (STILL_S, OVER_S):
            parts += [wait.format(seconds), moment, login]
        return self.run("; ".join(parts), "--allow-host", self.allowed)

    def sessions(self) -> str:
        return self.here.inside(f"cd / && runuser -u agent -- {AGENT} --list --json")


@pytest.fixture(scope="module")
def party(story: str, stories: Stories, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    tale = stories.told[story]
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


@pytest.fixture(scope="module", autouse=True)
def two_minutes(party: Party) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """What comes of the two minutes, which begin before the first test."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(party.two_minutes)


def test_a_session_lets_the_agent_in_there(party: Party) -> None:
    done = party.run(f"{LOGIN} {party.second} echo in", "--allow-host", party.allowed)
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr


def test_and_not_at_a_third_host(party: Party) -> None:
    done = party.run(f"{LOGIN} {party.third} echo in", "--allow-host", party.allowed)
    assert (done.returncode, done.stdout) == (255, ""), done.stderr
    # Positive control: it is the constraint that kept it out.
    free = party.run(f"{LOGIN} {party.third} echo in")
    assert (free.returncode, free.stdout) == (0, "in\n"), free.stderr


def test_for_two_minutes_and_no_longer(
    party: Party, two_minutes: Future[subprocess.CompletedProcess[str]]
) -> None:
    done = two_minutes.result()
    first, still, again, over = done.stdout.splitlines()
    assert (first, again) == ("in", "in"), done.stdout + done.stderr
    assert STILL_S <= int(still.removeprefix("after ")) < TTL_S
    assert int(over.removeprefix("after ")) >= OVER_S
    assert done.returncode == 255, done.stderr
    assert f"has reached its TTL of {TTL_S // 60}m" in done.stderr
    assert '"expired"' in party.sessions()


def test_what_happened_is_in_the_journal_too(party: Party) -> None:
    """The agent's user can delete the audit, and not that."""
    told = party.here.inside(f"journalctl -t {AGENT} -o cat --no-pager")
    for event in ("created", "key_loaded", "stopped", "expired"):
        assert f'"event": "{event}"' in told
    assert "PRIVATE" not in told
    files = "cd /; find /var/log/journal /run/log/journal -name '*.journal' -writable 2>/dev/null || true"
    assert party.here.inside(f'runuser -u agent -- sh -c "{files}"') == ""
    assert party.here.inside(files) != ""  # the positive control


def test_nothing_of_it_is_left(party: Party) -> None:
    assert '"active"' not in party.sessions()
    assert party.here.done("pgrep -u agent ssh-agent").returncode == 1
    found = "grep -rl 'OPENSSH PRIVATE' /home/agent /run/user /tmp /var/lib/quietport"
    left = party.here.inside(f"{found} || true")
    assert left == ""
