"""Proof: what firewall and ssh changed holds over a new login; else the host undoes it by itself."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import proven


@deploy("proof")
def proof(settings: HostSettings) -> None:
    """The end of the transaction that firewall and ssh are."""
    proven.stays(
        name="proof: firewall and sshd hold over a new login, the guard is disarmed",
        login_user=settings.user,
        prune_foreign=settings.prune_foreign,
        break_glass=list(settings.break_glass_cidrs),
    )
