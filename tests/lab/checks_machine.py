"""What is particular to the variants of the machine (lab/variants/machine.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from control import zipapp
from lab.variants.machine import DATABASE, HELD_S, NOTES, WEB
from tests.lab.published import REQUEST, shield_lowered
from tests.lab.story import Place, reachable, run
from tests.lab.variants import Check, Guest

HAND_MADE = (f"allow {DATABASE}/tcp", "allow 22/tcp")


def over_tailnet(guest: Guest, port: int, asked: str = "") -> str:
    """What a port of the host's tailnet address answers to `asked` (shell text that says it)."""
    address = guest.inside("tailscale ip").split()[0]
    carry = guest.over_tailnet().replace("%h", address).replace("%p", str(port))
    return run(["sh", "-c", f"{asked or 'sleep 3'} | {carry}"]).out


# --- apt -----------------------------------------------------------------------------------------------


def locked_before(guest: Guest) -> None:
    assert guest.inside("systemctl is-active lab-locks").strip() == "active"
    assert guest.inside("test -e /run/lab-locks-held && ls /run/lab-locks-held")


def locked_sees(guest: Guest) -> str:
    return guest.said("waited for", "is held by unattended-upgr")


def locked_after(guest: Guest) -> str:
    """The locks were held for all of their time, and dpkg did nothing meanwhile, but later."""
    held = json.loads(guest.inside(f"cat {NOTES}/locks"))
    assert held["free"] - held["wanted"] >= HELD_S
    lines = guest.inside("cat /var/log/dpkg.log").splitlines()
    times = [datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) for line in lines]
    assert [at for at in times if held["wanted"] < at.timestamp() < held["free"] - 1] == []
    assert [at for at in times if at.timestamp() > held["free"] - 1]
    return f"private; apt was waited for, {HELD_S} s from the moment it was asked"


def interrupted_before(guest: Guest) -> None:
    assert "unpacked" in guest.inside("dpkg-query -W -f '${db:Status-Status}\\n' jq")
    assert guest.inside("ls /var/lib/dpkg/updates").split()


def interrupted_sees(guest: Guest) -> str:
    return guest.said("waited for or repaired", "dpkg was interrupted")


def interrupted_after(guest: Guest) -> str:
    assert guest.inside("dpkg --audit") == ""
    query = "dpkg-query -W -f '${db:Status-Status} ' jq lab-interrupted"
    assert guest.inside(query).split() == ["installed", "installed"]
    assert guest.inside("jq --version").startswith("jq")
    return "private; what dpkg had not finished is installed, with what it depends on"


# --- Docker --------------------------------------------------------------------------------------------


def published(guest: Guest) -> list[Place]:
    """Where the containers could be reached from outside, if nothing stopped it."""
    target = guest.target
    return [(address, port) for address in (target.public_ip, target.public_ip6) for port in (WEB, DATABASE)]


def docker_before(guest: Guest) -> None:
    """The firewall that somebody switched on keeps nobody away."""
    ip = guest.target.public_ip
    assert {(ip, WEB), (ip, DATABASE)} <= guest.found.open
    assert "Status: active" in guest.inside("ufw status")


def docker_sees(guest: Guest) -> str:
    left = guest.said("left alone, not ours")
    assert all(rule in left for rule in HAND_MADE)
    return guest.said("published on every address", f"{DATABASE}/tcp", f"{WEB}/tcp")


def docker_after(guest: Guest) -> str:
    """The same containers, started once a boot, for the tailnet and not for the public."""
    assert guest.inside("docker ps -q --no-trunc | sort") == guest.inside(f"cat {NOTES}/containers")
    boot = int(guest.inside('date -d "$(ps -o lstart= -p 1)" +%s'))
    for container in guest.inside("docker ps -q").split():
        starts = [int(at) for at in guest.inside(f"docker exec {container} /bin/busybox cat /starts").split()]
        # The clock of `lstart` is right to the second.
        assert len([at for at in starts if at < boot - 1]) <= 1, (starts, boot)
        assert len([at for at in starts if at >= boot - 1]) == 1, (starts, boot)
    rules = guest.inside("ufw show added")
    assert all(f"ufw {rule}\n" in rules for rule in HAND_MADE)
    assert reachable(guest.target, published(guest)) == set()
    for port in (WEB, DATABASE):
        assert "HTTP/1" in over_tailnet(guest, port, REQUEST)
    with shield_lowered(guest.tale.hosts, guest.name, f"{DATABASE}:{WEB}"):
        assert reachable(guest.target, published(guest)), "the probe can see them"
    assert reachable(guest.target, published(guest)) == set()
    return (
        "private; the containers were not restarted, the tailnet reaches them and the public does not; "
        "the hand-made rules are there"
    )


# --- tailnet -------------------------------------------------------------------------------------------


def tailnet_before(guest: Guest) -> None:
    """Tailscale itself answers on the port of the tailnet address."""
    assert "SSH-2.0-Tailscale" in over_tailnet(guest, 22)


def tailnet_sees(guest: Guest) -> str:
    guest.changed("tailscale: preferences as declared")
    return guest.said("a new key login over the tailnet", "was accepted by sshd")


def tailnet_after(guest: Guest) -> str:
    """The same node, and sshd answers."""
    assert guest.inside("tailscale ip | sort") == guest.inside(f"cat {NOTES}/addresses")
    assert '"RunSSH": false' in guest.inside("tailscale debug prefs")
    assert "SSH-2.0-OpenSSH" in over_tailnet(guest, 22)
    sources = guest.inside("cat /etc/apt/sources.list.d/tailscale.list")
    assert sources.startswith("# quietport: deb ")
    guest.inside("apt-get -q update >/dev/null")
    return "private; the node that was there, without any key; sshd answers where Tailscale SSH did"


# --- an older quietport --------------------------------------------------------------------------------

RETIRED = "quietport-retired"


def programs_now(guest: Guest) -> str:
    return guest.inside("sha256sum </usr/local/lib/quietport/quietport.pyz").split()[0]


def older_before(guest: Guest) -> None:
    """Private already, by programs that are not today's."""
    assert guest.found.open == frozenset()
    assert programs_now(guest) == guest.inside(f"cat {NOTES}/programs").split()[0]
    assert programs_now(guest) != hashlib.sha256(zipapp.build()).hexdigest()
    assert "active" in guest.inside(f"systemctl is-active {RETIRED}.timer")


def older_sees(guest: Guest) -> str:
    programs = guest.changed("programs: quietport's programs installed")
    guest.changed("timers: none of ours but the declared ones")
    guest.changed("timers: report")
    guest.changed("firewall: denied but for the tailnet")
    guest.changed("ssh: answers the tailnet alone")
    # The name of the last one says whether other hosts of the run have joined before.
    return programs.rpartition(" | ")[2]


def older_after(guest: Guest) -> str:
    assert programs_now(guest) == hashlib.sha256(zipapp.build()).hexdigest()
    assert RETIRED not in guest.inside("systemctl list-units --all --no-legend; ls /etc/systemd/system")
    assert "OnCalendar=daily" in guest.inside("systemctl cat quietport-report.timer")
    assert "quietport: ssh over" not in guest.inside("ufw show added")
    return "private as before; today's programs, units and rules, and none that only the older one had"


CHECKS: Mapping[str, Check] = {
    "apt-locked": Check(locked_before, locked_sees, locked_after),
    "dpkg-interrupted": Check(interrupted_before, interrupted_sees, interrupted_after),
    "docker-published": Check(docker_before, docker_sees, docker_after),
    "tailnet-ssh": Check(tailnet_before, tailnet_sees, tailnet_after),
    "older-converge": Check(older_before, older_sees, older_after),
}
