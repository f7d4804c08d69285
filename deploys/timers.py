"""timers: what runs on the host by itself, declared here and nowhere else."""

from __future__ import annotations

from dataclasses import replace

from pyinfra.api.deploy import deploy

from control.guard import LAUNCHER
from control.settings import HostSettings
from deploys.agent_access import FOLDER
from operations import timers as operations
from operations.agent_access import STATE, home_of
from operations.common import each
from operations.timers import Timer
from quietport.sshagent.names import PROGRAM

TIMERS = (
    Timer(
        name="report",
        schedule="daily",
        program=(LAUNCHER, "report"),
        user="root",
        # Names of other users' processes: their /proc/PID/fd and exe are ptrace's business (proc(5)).
        capabilities=("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"),
        # ss and ip ask the kernel through netlink.
        address_families=("AF_NETLINK", "AF_UNIX"),
        writes=("/var/lib/quietport",),
        sees_processes=True,
    ),
    Timer(
        name="doctor",
        schedule="hourly",
        program=(LAUNCHER, "doctor", "--record"),
        user="root",
        # As the report; and the kernel tells its packet filter to an administrator of the network alone.
        capabilities=("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_NET_ADMIN"),
        # Names are looked up, and notify_command tells somebody.
        address_families=("AF_NETLINK", "AF_UNIX", "AF_INET", "AF_INET6"),
        network=True,
        writes=("/var/lib/quietport",),
        sees_processes=True,
        sees_homes=True,
        jitter_s=1800,
    ),
    # For a follower that is dead or stuck: templates/ssh/quietport-sshd-follow.service.
    Timer(
        name="sshd-follow-once",
        schedule="*:0/5",
        program=(LAUNCHER, "sshd-follow", "--once"),
        user="root",
        capabilities=("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"),
        address_families=("AF_NETLINK", "AF_UNIX"),
        writes=("/etc/ssh", "/run"),
        sees_processes=True,
        jitter_s=60,
        timeout_s=600,
    ),
)


def prune_of(user: str, home: str) -> Timer:
    """The timer that clears away the ended ssh-agent sessions of an agent."""
    return Timer(
        name=f"agent-prune-{user}",
        schedule="daily",
        program=(f"{FOLDER}/{PROGRAM}", "--prune"),
        user=user,
        # To the journal, which the agent cannot edit.
        address_families=("AF_UNIX",),
        # Made in the converge, and not there when the agent has removed it: then there is nothing to do.
        writes=(f"-{home}/{STATE}", "-/run/user"),
        sees_homes=True,
    )


def declared(settings: HostSettings) -> list[Timer]:
    """The host's own timers, of one that is told `settings`."""
    if not settings.break_glass_cidrs:
        return list(TIMERS)
    # An sshd on every address is judged by what the firewall admits, and to ask it is a privilege too.
    more = {"report": ("CAP_NET_ADMIN",)}
    return [replace(one, capabilities=(*one.capabilities, *more.get(one.name, ()))) for one in TIMERS]


@deploy("timers")
def timers(settings: HostSettings) -> None:
    """Each timer's units, enabled; none of ours besides."""
    wanted = [*declared(settings), *(prune_of(user, home_of(user)) for user in settings.agents)]
    units = [timer.unit for timer in wanted]
    operations.no_others(name="timers: none of ours but the declared ones", units=units)
    for timer in each(wanted):
        operations.running(name=f"timers: {timer.name}, {timer.schedule}", timer=timer)
