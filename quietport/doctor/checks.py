"""Every check, in the order of the table and of the JSON."""

from __future__ import annotations

from quietport.doctor import firewall, listeners, ssh, tailnet
from quietport.doctor.model import Check

CHECKS: tuple[Check, ...] = (
    *tailnet.CHECKS,
    *firewall.CHECKS,
    *listeners.CHECKS,
    *ssh.CHECKS,
)
