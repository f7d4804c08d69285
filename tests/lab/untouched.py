"""What a host is, read past its sshd and its network: a refusal leaves every line of it as it was."""

from __future__ import annotations

from lab import targets
from tests.lab.story import Lab, reachable

# Files by content, owner and mode, where a converge or a person would leave something; packages, accounts,
# units, listeners and firewall besides. Not what a login leaves (wtmp, journal, sudo's timestamps).
_STATE = r"""
cd /
places="etc root home opt srv usr/local var/lib/quietport var/lib/tailscale var/spool/cron"
for place in $places; do
  [ -e "$place" ] || continue
  find "$place" -xdev -printf 'entry /%p %y %m %u:%g %l\n'
  find "$place" -xdev -type f -exec sha256sum {} + | sed 's/^/content /'
done
# /run/quietport is the lock that every converge takes first; it is gone with the next boot.
ls -A /run | grep -i quietport- | sed 's/^/run /'
dpkg-query -W -f 'package ${Package} ${Version} ${db:Status-Abbrev}\n'
systemctl list-unit-files --no-legend --no-pager |
  awk '$2 != "transient" && $2 != "generated" {print "unit", $1, $2}'
ss -Hlntu | awk '{print "listener", $1, $5}'
(command -v ufw >/dev/null && ufw status || echo Status: none) | sed 's/^/ufw /'
for table in iptables ip6tables; do
  $table-save 2>/dev/null | grep -v '^[#:]' | sed "s/^/$table /; s/\[[0-9:]*\]//"
done
true
"""
_SSH_AND_FIREWALL = r"""
sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/* 2>/dev/null
ss -Hlnt 'sport = :22' | awk '{print $4}' | sort
systemctl is-enabled ssh.service ssh.socket
(command -v ufw >/dev/null && ufw status || echo inactive) | grep -cw inactive
true
"""


def state(lab: Lab, name: str) -> frozenset[str]:
    """Everything of the host that a refusal must leave as it was; compare two with `changes`."""
    return _lines(lab, name, _STATE)


def ssh_and_firewall(lab: Lab, name: str) -> frozenset[str]:
    """The part of it that decides who can reach the host."""
    return _lines(lab, name, _SSH_AND_FIREWALL)


def changes(before: frozenset[str], after: frozenset[str]) -> list[str]:
    """The lines that are not the same, each marked as gone (-) or new (+)."""
    return sorted([f"- {line}" for line in before - after] + [f"+ {line}" for line in after - before])


def is_public(lab: Lab, name: str) -> bool:
    """Whether the public side reaches sshd over both families."""
    target = lab.target(name)
    places = {(target.public_ip, 22), (target.public_ip6, 22)}
    return reachable(target, sorted(places)) == places


def _lines(lab: Lab, name: str, script: str) -> frozenset[str]:
    done = targets.execute(lab.run, lab.target(name), ["sh", "-c", script])
    return frozenset(done.stdout.splitlines())
