"""What a host is, from top to bottom: `pyinfra inventory deploys/vps.py`.

The order is the safety: what lets the operator in comes before what shuts the public side, and the last two
steps pass the gate (operations/gate.py), which wants a login over the tailnet first. What they change undoes
itself unless another login proves it (operations/guard.py).
"""

from __future__ import annotations

from pyinfra.context import host

from control.settings import settings_for
from deploys.agent_access import agent_access
from deploys.docker import docker
from deploys.firewall import firewall
from deploys.guard import guard
from deploys.packages import packages
from deploys.preflight import preflight
from deploys.programs import closed, programs
from deploys.proof import proof
from deploys.secrets import secrets
from deploys.ssh import follower, not_opened, ssh
from deploys.tailscale import tailscale
from deploys.timers import timers
from deploys.users import users

settings = settings_for(host.name)

preflight(settings=settings)
packages(settings=settings)
users(settings=settings)
programs(settings=settings)
guard(settings=settings)
docker(settings=settings)
tailscale(settings=settings)
secrets(settings=settings)
agent_access(settings=settings)
timers(settings=settings)
follower(settings=settings)
firewall(settings=settings)
ssh(settings=settings)
proof(settings=settings)
closed(settings=settings)
not_opened(settings=settings)
