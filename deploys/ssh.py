"""ssh: sshd answers on the tailnet and nowhere else, to keys and nothing else."""

from __future__ import annotations

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control.settings import HostSettings
from facts.tailnet import Tailnet
from operations import opened, sshd
from operations.common import unknown_yet


@deploy("ssh: follower")
def follower(settings: HostSettings) -> None:
    """Before the risky steps, and none itself: it leaves an sshd alone that has no drop-in of ours."""
    sshd.followed(name="ssh: the tailnet addresses followed")


@deploy("ssh")
def ssh(settings: HostSettings) -> None:
    """The last step, and a risky one: passes the gate."""
    known = host.get_fact(Tailnet)["addresses"]
    networks = settings.break_glass_cidrs
    whom = "the tailnet and break_glass_cidrs" if networks else "the tailnet alone"
    later = "" if known or networks else unknown_yet("the join")
    sshd.tailnet_only(
        name=f"ssh: answers {whom}, to keys alone{later}",
        login_user=settings.user,
        users=["root", *settings.agents],
        break_glass=list(networks),
    )


@deploy("ssh: opened")
def not_opened(settings: HostSettings) -> None:
    """Once all is proven: what `quietport open` left on the host is gone."""
    opened.forgotten(name="ssh: not opened by hand any more")
