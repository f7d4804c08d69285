"""The preferences of tailscale that quietport sets: remembered and set again, nothing of its state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quietport.guard.machine import GuardError, Machine

# Key of `tailscale debug prefs` = option of `tailscale set`.
PREFERENCES = {
    "RunSSH": "ssh",
    "ShieldsUp": "shields-up",
    "CorpDNS": "accept-dns",
    "RouteAll": "accept-routes",
    "Hostname": "hostname",
}
_LOOK_S = 5.0
_SET_S = 15.0


def look(machine: Machine, *, timeout: float = _LOOK_S) -> dict[str, Any] | None:
    """The preferences by their key; None when tailscaled does not answer or is not there.

    `timeout` is in seconds: a rollback has no time to wait. Raises HostProgramError when it is over.
    """
    done = machine.run(["tailscale", "debug", "prefs"], timeout=timeout)
    if done.code != 0:
        return None
    try:
        document = json.loads(done.out)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    return {key: document[key] for key in PREFERENCES if key in document}


def options(old: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options of `tailscale set` that make `now` into `old`."""
    return [
        f"--{PREFERENCES[key]}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in old.items()
        if key in PREFERENCES and now.get(key) != value
    ]


def restore(machine: Machine, old: Mapping[str, Any] | None) -> str:
    """Set again what is otherwise now; what was done, as a phrase. Raises GuardError."""
    if old is None:
        return ""
    now = look(machine)
    if now is None:
        return "tailscaled does not answer: its preferences were not looked at"
    wanted = options(old, now)
    if not wanted:
        return ""
    done = machine.run(["tailscale", "set", "--accept-risk=lose-ssh", *wanted], timeout=_SET_S)
    if done.code != 0:
        raise GuardError(f"tailscale set {' '.join(wanted)}: {done.complaint}")
    return f"tailscale set {' '.join(wanted)}"
