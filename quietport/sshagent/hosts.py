"""Destination constraints: the agent signs for the named hosts alone (ssh-add(1), -h; OpenSSH 8.9 and newer).

Their host keys come from a file that root alone can change: by default ssh-add reads the agent user's own
known_hosts, where whoever stole the socket could write another host. The file is a known_hosts of sshd(8).
"""

from __future__ import annotations

import re
from pathlib import Path

KNOWN_HOSTS = Path("/etc/quietport/agent_known_hosts")
MAX_HOSTS = 64
_HOST = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}@)?([A-Za-z0-9_][A-Za-z0-9_.:-]{0,252}|\[[A-Za-z0-9_.:-]{1,253}\]:[0-9]{1,5})"
)


def is_host(text: str) -> bool:
    """Whether `text` is HOST, USER@HOST or [HOST]:PORT, as in a known_hosts file."""
    return _HOST.fullmatch(text) is not None
