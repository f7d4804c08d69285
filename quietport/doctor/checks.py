"""Every check, in the order of the table and of the JSON."""

from __future__ import annotations

from quietport.doctor import docker, files, firewall, listeners, machine, ssh, tailnet, units, updates
from quietport.doctor.model import Check

CHECKS: tuple[Check, ...] = (
    *tailnet.CHECKS,
    *firewall.CHECKS,
    *listeners.CHECKS,
    *ssh.CHECKS,
    *docker.CHECKS,
    *units.CHECKS,
    *files.CHECKS,
    *machine.CHECKS,
    *updates.CHECKS,
)
