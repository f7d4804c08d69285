"""What goes wrong on one blank host, in this order; each time it is told why and the host is still public.

The tests build on each other; the host is the one of test_bad_input, which has joined no tailnet yet.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lab import targets
from lab.tailnet import Tailnet
from tests.lab.story import DEPLOY, ROOT, Done, Hosts, Lab
from tests.lab.untouched import is_public, ssh_and_firewall

pytestmark = pytest.mark.container
Blank = tuple[Lab, str]
# Docker has its own story; here it would only take time.
QUICK: dict[str, Any] = {"docker_source": "none"}
PROXY_TO_NOWHERE = "sh -c 'exit 1' %h %p"
BROKEN = "/etc/ssh/sshd_config.d/90-e2e-broken.conf"


def vary(blank: Blank, word: str, **keys: Any) -> Hosts:
    """The blank host's file, without Docker and with these keys."""
    return Hosts.of(blank[0], word, every={**QUICK, **keys})


def converge(hosts: Hosts) -> Done:
    """A converge that is expected to fail, without JSON so that what it says can be read."""
    return hosts.pyinfra(DEPLOY, "-y")


def test_without_a_way_into_the_tailnet_nothing_risky_happens(blank: Blank) -> None:
    """The host joins, but the operator cannot get there: firewall and ssh stay as they are."""
    hosts = vary(blank, "noproxy", tailnet_proxy=PROXY_TO_NOWHERE)
    before = ssh_and_firewall(*blank)
    done = converge(hosts)
    assert done.code != 0
    assert "tailnet" in done.text
    assert hosts.ssh(blank[1], "tailscale ip -4").ok().out.startswith("100.")
    assert ssh_and_firewall(*blank) == before
    assert is_public(*blank)


def test_a_node_that_will_expire_stays_public(blank: Blank) -> None:
    lab, name = blank
    tailnet = Tailnet.attach(lab.run.directory)
    hosts = vary(blank, "expiring")
    before = ssh_and_firewall(*blank)
    tailnet.expire_node(name, at=datetime.now(UTC) + timedelta(days=30))
    try:
        done = converge(hosts)
    finally:
        tailnet.never_expire_node(name)
    assert done.code != 0
    assert "accept_key_expiry" in done.text
    assert ssh_and_firewall(*blank) == before
    assert is_public(*blank)


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
    assert not is_public(*blank)
    hosts.spec().ok()


def test_the_documented_way_back_in_works_and_is_closed_again(blank: Blank) -> None:
    """What docs/ssh.md says to type at a provider's console, read from there and typed."""
    lab, name = blank
    section = (ROOT / "docs/ssh.md").read_text().partition("Use the provider's console. As root there:")[2]
    recipe = section.split("```")[1]
    assert "quietport open" in recipe
    targets.execute(lab.run, lab.target(name), ["sh", "-ec", recipe])
    assert is_public(*blank)
    hosts = vary(blank, "keyless", auth_key=None)
    hosts.apply().ok()
    assert not is_public(*blank)
    assert hosts.apply().ok().changed == frozenset()


def test_status_names_the_target(blank: Blank) -> None:
    lab, name = blank
    status = json.loads(lab("status", "--json").ok().out)
    assert status["schema"] == 1
    assert [target["name"] for target in status["targets"]] == [name]
    assert status["targets"][0]["tailnet_ip"].startswith("100.")
