"""What goes wrong on one blank host, in this order; each time it is told why and the host is still public.

The tests build on each other: the host that refused a key is the one that the next key is tried on.
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lab import targets, toolchain
from lab.process import wait_until
from lab.tailnet import Tailnet
from tests.lab.story import DEPLOY, ROOT, Done, Hosts, Lab, reachable, run

pytestmark = pytest.mark.container
Blank = tuple[Lab, str]
# Docker has its own story; here it would only take time.
QUICK: dict[str, Any] = {"docker_source": "none"}
PROXY_TO_NOWHERE = "sh -c 'exit 1' %h %p"
BROKEN = "/etc/ssh/sshd_config.d/90-e2e-broken.conf"
STATE = (
    "sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/* 2>/dev/null; "
    "ss -Hlnt 'sport = :22' | sort; systemctl is-enabled ssh.service ssh.socket; "
    "command -v ufw >/dev/null && ufw status | head -1; "
    "dpkg-query -W | sha256sum; ls /etc /etc/apt/* | sha256sum"
)


def vary(blank: Blank, word: str, **keys: Any) -> Hosts:
    """The blank host's file, without Docker and with these keys."""
    return Hosts.of(blank[0], word, every={**QUICK, **keys})


def state(hosts: Hosts, name: str) -> str:
    """Everything of the host that a refusal must leave as it was."""
    return hosts.ssh(name, STATE + "; true").ok().out


def ssh_and_firewall(hosts: Hosts, name: str) -> list[str]:
    """The part of it that later steps would change."""
    files = "sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/* 2>/dev/null"
    listening = "ss -Hlnt 'sport = :22' | awk '{print $4}' | sort; systemctl is-enabled ssh.service"
    firewall = "(command -v ufw >/dev/null && ufw status || echo inactive) | grep -cw inactive"
    return hosts.ssh(name, f"{files}; {listening}; {firewall}; true").ok().out.splitlines()


def use_up(tailnet: Tailnet, key: Path, folder: Path) -> None:
    """Let another node join with a key that is good for one."""
    tools = toolchain.build(tailnet.cache)
    socket = folder / "other.sock"
    daemon = subprocess.Popen(
        [
            str(tools.tailscaled),
            "--tun=userspace-networking",
            f"--statedir={folder / 'other'}",
            f"--socket={socket}",
            "--port=0",
            "--no-logs-no-support",
        ],
        env={"SSL_CERT_FILE": str(tailnet.ca_cert), "TS_DISABLE_PORTMAPPER": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    up = [str(tools.tailscale), f"--socket={socket}", "up", f"--login-server={tailnet.login_server}"]
    try:
        wait_until(socket.exists, timeout=20, what="another tailscaled answers")
        run([*up, f"--auth-key=file:{key}", "--hostname=other", "--timeout=30s"]).ok()
    finally:
        daemon.terminate()
        daemon.wait()
        tailnet.delete_node("other")


def is_public(blank: Blank) -> bool:
    """Whether the public side reaches sshd over both families."""
    target = blank[0].target(blank[1])
    places = {(target.public_ip, 22), (target.public_ip6, 22)}
    return reachable(target, sorted(places)) == places


def converge(hosts: Hosts) -> Done:
    """A converge that is expected to fail, without JSON so that what it says can be read."""
    return hosts.pyinfra(DEPLOY, "-y")


def test_a_host_that_needs_a_key_and_has_none_is_refused_untouched(blank: Blank) -> None:
    hosts = vary(blank, "nokey", auth_key=None)
    before = state(hosts, blank[1])
    done = converge(hosts)
    assert done.code != 0
    assert "auth_key" in done.text
    assert state(hosts, blank[1]) == before
    assert is_public(blank)


def test_a_secret_without_its_source_is_refused_untouched(blank: Blank) -> None:
    hosts = vary(blank, "nosource", secrets={"/etc/e2e/key": "env:QUIETPORT_E2E_NOT_SET"})
    before = state(hosts, blank[1])
    done = converge(hosts)
    assert done.code != 0
    assert "QUIETPORT_E2E_NOT_SET" in done.text
    assert "/etc/e2e/key" in done.text
    assert state(hosts, blank[1]) == before


def test_a_changed_host_key_is_refused_until_forgotten(blank: Blank) -> None:
    hosts = vary(blank, "hostkey")
    hosts.ssh(blank[1], "true").ok()
    # What a reinstall of the VPS does.
    renew = "rm /etc/ssh/ssh_host_*key*; ssh-keygen -A >/dev/null; systemctl reload-or-restart ssh"
    hosts.ssh(blank[1], renew).ok()
    refused = hosts.pyinfra("fact", "facts.sockets.ListeningSockets")
    assert f"quietport forget {blank[1]}" in refused.text
    assert '"protocol"' not in refused.text
    hosts.quietport("forget", blank[1]).ok()
    assert '"protocol"' in hosts.pyinfra("fact", "facts.sockets.ListeningSockets").ok().text


def must_be_refused_for_its_key(blank: Blank, key: Path, sentence: str) -> None:
    """A converge with that key fails with the sentence, never shows the key, and the host stays public."""
    hosts = vary(blank, "key", auth_key=f"file:{key}")
    before = ssh_and_firewall(hosts, blank[1])
    done = converge(hosts)
    assert done.code != 0
    assert f"{blank[1]}: refused: the auth key {sentence}" in done.text
    assert key.read_text().strip() not in done.text
    assert ssh_and_firewall(hosts, blank[1]) == before
    assert is_public(blank)


def test_a_key_that_is_no_key_is_a_clear_error(blank: Blank, tmp_path: Path) -> None:
    wrong = tmp_path / "key"
    wrong.write_text("hskey-auth-000000000000-" + "0" * 64 + "\n")
    must_be_refused_for_its_key(blank, wrong, "was rejected")


def test_an_expired_key_is_a_clear_error(blank: Blank) -> None:
    key = Tailnet.attach(blank[0].run.directory).auth_key(expired=True)
    must_be_refused_for_its_key(blank, key, "has expired")


def test_a_used_up_key_is_a_clear_error(blank: Blank, tmp_path: Path) -> None:
    tailnet = Tailnet.attach(blank[0].run.directory)
    key = tailnet.auth_key()
    use_up(tailnet, key, tmp_path)
    must_be_refused_for_its_key(blank, key, "was used up")


def test_without_a_way_into_the_tailnet_nothing_risky_happens(blank: Blank) -> None:
    """The host joins, but the operator cannot get there: firewall and ssh stay as they are."""
    hosts = vary(blank, "noproxy", tailnet_proxy=PROXY_TO_NOWHERE)
    before = ssh_and_firewall(hosts, blank[1])
    done = converge(hosts)
    assert done.code != 0
    assert "tailnet" in done.text
    assert hosts.ssh(blank[1], "tailscale ip -4").ok().out.startswith("100.")
    assert ssh_and_firewall(hosts, blank[1]) == before
    assert is_public(blank)


def test_a_node_that_will_expire_stays_public(blank: Blank) -> None:
    lab, name = blank
    tailnet = Tailnet.attach(lab.run.directory)
    hosts = vary(blank, "expiring")
    before = ssh_and_firewall(hosts, name)
    tailnet.expire_node(name, at=datetime.now(UTC) + timedelta(days=30))
    try:
        done = converge(hosts)
    finally:
        tailnet.never_expire_node(name)
    assert done.code != 0
    assert "accept_key_expiry" in done.text
    assert ssh_and_firewall(hosts, name) == before
    assert is_public(blank)


def test_a_file_that_breaks_sshd_puts_everything_back(blank: Blank) -> None:
    """The candidate is tried with what is really there; a foreign file makes it invalid."""
    hosts = vary(blank, "broken")
    hosts.ssh(blank[1], f"echo 'NoSuchKeyword yes' > {BROKEN}").ok()
    before = hosts.ssh(blank[1], "sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*").ok().out
    done = converge(hosts)
    assert done.code != 0
    assert BROKEN in done.text
    assert "nothing was changed" in done.text
    assert hosts.ssh(blank[1], "sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*").ok().out == before
    assert "0.0.0.0:22" in hosts.ssh(blank[1], "ss -Hlnt 'sport = :22'").ok().out
    hosts.ssh(blank[1], f"rm {BROKEN}").ok()


def test_a_joined_host_needs_no_key_and_converges(blank: Blank) -> None:
    hosts = vary(blank, "keyless", auth_key=None)
    hosts.apply().ok()
    assert not is_public(blank)
    hosts.spec().ok()


def test_the_documented_way_back_in_works_and_is_closed_again(blank: Blank) -> None:
    """What docs/ssh.md says to type at a provider's console, read from there and typed."""
    lab, name = blank
    section = (ROOT / "docs/ssh.md").read_text().partition("until the next converge closes it again:")[2]
    recipe = section.split("```")[1]
    assert "systemctl restart ssh" in recipe
    targets.execute(lab.run, lab.target(name), ["sh", "-ec", recipe])
    assert is_public(blank)
    hosts = vary(blank, "keyless", auth_key=None)
    hosts.apply().ok()
    assert not is_public(blank)
    hosts.ssh(name, "ufw delete allow 22/tcp").ok()


def test_a_sudo_password_travels_on_stdin(blank: Blank, tmp_path: Path) -> None:
    """The same host as another user, who needs sudo and its password."""
    name = blank[1]
    password = tmp_path / "sudo"
    password.write_text("correct-horse-e2e\n")
    hosts = vary(blank, "keyless", auth_key=None)
    commands = [
        "useradd -m -s /bin/bash -G sudo ops",
        "echo ops:correct-horse-e2e | chpasswd",
        "install -d -m 700 -o ops -g ops /home/ops/.ssh",
        "install -m 600 -o ops -g ops /root/.ssh/authorized_keys /home/ops/.ssh/authorized_keys",
        "command -v sudo >/dev/null || apt-get -q -y install sudo",
    ]
    hosts.ssh(name, " && ".join(commands)).ok()
    ops = vary(blank, "sudo", auth_key=None, user="ops", sudo_password=f"file:{password}")
    assert ops.ssh(name, "id -u").ok().out.strip() == "0"
    # Every argv of the host while a command runs under sudo; the command's own is there as the control.
    seen = ops.ssh(name, "sleep 0.3; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '").ok().out
    assert "sleep 0.3" in seen
    assert "correct-horse" not in seen
    done = ops.pyinfra(DEPLOY, "--dry", "--debug-operations")
    assert "correct-horse" not in done.text
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong-e2e\n")
    refused = vary(blank, "wrongsudo", auth_key=None, user="ops", sudo_password=f"file:{wrong}")
    assert refused.ssh(name, "id -u").code != 0


def test_status_names_the_target(blank: Blank) -> None:
    lab, name = blank
    status = json.loads(lab("status", "--json").ok().out)
    assert status["schema"] == 1
    assert [target["name"] for target in status["targets"]] == [name]
    assert status["targets"][0]["tailnet_ip"].startswith("100.")
