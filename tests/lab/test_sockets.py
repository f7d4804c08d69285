"""Packages bring ssh's sockets back; masks hold."""

from __future__ import annotations

from tests.lab.story import reachable
from tests.lab.tale import Tale


def test_a_reinstalled_openssh_server_stays_on_the_tailnet(tale: Tale) -> None:
    tale.chapters["spec again"]
    for name in tale.names:
        reinstall = "DEBIAN_FRONTEND=noninteractive apt-get -q -y install --reinstall openssh-server"
        tale.hosts.ssh(name, reinstall).ok()
        states = tale.hosts.ssh(name, "systemctl is-enabled ssh.socket sshd.socket; true").ok().out.split()
        assert states == ["masked", "masked"]
    assert reachable(tale.lab.target(tale.names[0]), tale.ssh_places()) == set()
    tale.hosts.spec("tests/spec/test_ssh.py").ok()
