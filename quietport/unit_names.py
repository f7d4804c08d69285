"""Names of units, and their folder, that the converge and the programs on the host share."""

from __future__ import annotations

UNIT_FOLDER = "/etc/systemd/system"
DOCKER = "docker.service"
# Holds the chain that shields containers, from before the engine's start.
CHAIN_UNIT = "quietport-docker-user.service"
# Keeps sshd on the tailnet's addresses.
FOLLOWER = "quietport-sshd-follow.service"
# Rolls back at a boot that finds a guard armed.
BOOT_UNIT = "quietport-guard-boot.service"
