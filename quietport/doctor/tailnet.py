"""The tailnet: is this host on it, with its addresses on the interface, and for how long."""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from quietport import admission
from quietport.commands import is_installed, run
from quietport.doctor.model import Check, CutShortError, Finding
from quietport.doctor.place import HERE, QUICK_S, by_converge
from quietport.doctor.run import utc_now
from quietport.errors import HostProgramError
from quietport.guard import tailnet as preferences
from quietport.hostfile import PUBLIC_SSHD
from quietport.net import TAILNET_INTERFACE
from quietport.rtnetlink import addresses_on

# Who answers logins, and whether anybody may come in: what the proof of a converge rests on.
WANTED = {"RunSSH": False, "ShieldsUp": False}
_WHAT = {
    "RunSSH": "Tailscale SSH answers logins in sshd's place.",
    "ShieldsUp": "shields-up turns away every connection from the tailnet.",
}
WARN_FROM = timedelta(days=30)
FAIL_FROM = timedelta(days=3)
_RESTART = "`systemctl restart tailscaled.service`"
_ONE_ASKS = threading.Lock()


def status() -> dict[str, Any] | None:
    """What `tailscale status --json` prints; None when tailscaled does not answer. Raises HostProgramError.

    Both checks want it at the same time, and it is asked once.
    """
    with _ONE_ASKS:
        return _asked()


@lru_cache(maxsize=1)
def _asked() -> dict[str, Any] | None:
    try:
        done = run(["tailscale", "status", "--json", "--peers=false"], timeout=QUICK_S)
    except HostProgramError:
        return None
    # It prints the document also where it fails because nobody is logged in.
    return parse_status(done.out) if done.code == 0 or done.out.lstrip().startswith("{") else None


def parse_status(text: str) -> dict[str, Any]:
    """The document of `tailscale status --json`. Raises HostProgramError for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HostProgramError(f"tailscale status --json did not print JSON: {error}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("BackendState"), str):
        raise HostProgramError("tailscale status --json printed no BackendState.")
    return document


def _node(document: Mapping[str, Any]) -> dict[str, Any]:
    node = document.get("Self")
    return node if isinstance(node, dict) else {}


# --- on it ---


def look(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `tailnet`."""
    if not is_installed("tailscale"):
        return [Finding("FAIL", "tailscale is not installed.", by_converge(declared))]
    document = status()
    if document is None:
        return [Finding("FAIL", "tailscaled does not answer.", _RESTART)]
    if document["BackendState"] != "Running":
        return [not_running(document["BackendState"], declared)]
    return judge(
        _node(document),
        addresses_on(TAILNET_INTERFACE),
        _preferences(),
        declared,
        families=admission.families(),
    )


def _preferences() -> dict[str, Any] | None:
    """None when tailscaled does not tell them, or not in time."""
    try:
        return preferences.look(HERE, timeout=QUICK_S)
    except HostProgramError:
        return None


def not_running(state: str, declared: Mapping[str, Any]) -> Finding:
    """What is wrong in a state of tailscaled's that is not Running (its ipn/backend.go)."""
    if state == "Stopped":
        return Finding("FAIL", "tailscale was switched off here (tailscale down).", "`tailscale up`")
    if state == "NeedsLogin":
        step = f"Set auth_key to a fresh key in hosts.toml. {by_converge(declared)}"
        return Finding("FAIL", "The host is logged out of its tailnet, or its key has expired.", step)
    if state == "NeedsMachineAuth":
        step = "Approve it in the tailnet's admin console."
        return Finding("FAIL", "The host waits for approval by an admin of the tailnet.", step)
    return Finding("FAIL", f"tailscaled is not connected (state {state}).", _RESTART)


def judge(
    node: Mapping[str, Any],
    assigned: Sequence[str],
    prefs: Mapping[str, Any] | None,
    declared: Mapping[str, Any],
    *,
    families: Sequence[int],
) -> list[Finding]:
    """Findings for a host whose tailscaled is Running.

    `node` is Self of the status, `assigned` what is on the interface, `prefs` as the guard reads them,
    `families` those of the host: without IPv6 it cannot have an address of it. Raises HostProgramError.
    """
    try:
        given = [ipaddress.ip_address(str(address)) for address in node.get("TailscaleIPs") or []]
    except ValueError as error:
        raise HostProgramError(f"tailscale status --json names an address that is none: {error}.") from error
    wanted = [str(address) for address in given if address.version in families]
    missing = [address for address in wanted if address not in assigned]
    if not wanted:
        return [Finding("FAIL", "The tailnet has given this host no address.", _RESTART)]
    found = []
    if missing:
        why = f"{', '.join(missing)} is not on {TAILNET_INTERFACE}: nobody reaches the host there."
        found.append(Finding("FAIL", why, _RESTART))
    if prefs is None:
        mute = HostProgramError("tailscaled does not tell its preferences (tailscale debug prefs).")
        raise CutShortError(mute, found)
    for key, value in WANTED.items():
        for option in preferences.options({key: value}, {"RunSSH": False, "ShieldsUp": False, **prefs}):
            step = f"`tailscale set --accept-risk=lose-ssh {option}`"
            found.append(Finding("FAIL", _WHAT[key], step))
    name = str(declared.get("hostname") or "")
    label = str(node.get("DNSName") or "").partition(".")[0]
    if name and label and label != name:
        step = f"In the tailnet's admin console: remove the node {name}, and give its name to this one."
        found.append(Finding("WARN", f"Its name on the tailnet is {label}, not {name}.", step))
    if node.get("Online") is False:
        why = "The control server has not been reached lately: changes of the tailnet do not arrive."
        found.append(Finding("WARN", why, "See `tailscale netcheck`, and the check dns."))
    return found or [Finding("PASS", f"{', '.join(wanted)} on {TAILNET_INTERFACE}.")]


# --- for how long ---


def look_at_expiry(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `key-expiry`."""
    document = status() if is_installed("tailscale") else None
    if document is None:
        raise HostProgramError("tailscaled does not answer.")
    node = _node(document)
    expiry, expired = node.get("KeyExpiry"), node.get("Expired") is True
    state = document["BackendState"]
    # Logged out or switched off it may know of no key at all, which is not one that never expires.
    if state != "Running" and not (expiry or expired):
        raise HostProgramError(f"tailscaled tells no key's expiry while it is not connected (state {state}).")
    return [judge_expiry(expiry, expired, declared, now=utc_now())]


def judge_expiry(expiry: Any, expired: bool, declared: Mapping[str, Any], *, now: datetime) -> Finding:
    """The finding for a node key that expires at `expiry` (RFC 3339; None: never).

    Raises HostProgramError when that is no time.
    """
    server = declared.get("login_server") or "the tailnet's control server"
    step = f"Disable key expiry for this node at {server}, or log in anew: `tailscale up --force-reauth`."
    if expired:
        return Finding("FAIL", "The node's key has expired.", step)
    if not expiry:
        return Finding("PASS", "The node's key does not expire.")
    try:
        moment = datetime.fromisoformat(str(expiry))
    except ValueError as error:
        raise HostProgramError(f"tailscale tells a key expiry that is no time: {expiry!r}.") from error
    left = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now
    day = moment.date().isoformat()
    if left <= timedelta(0):
        return Finding("FAIL", f"The node's key has expired on {day}.", step)
    until = f"The node's key expires on {day}, in {left.days} days; the host then drops off the tailnet."
    if left <= WARN_FROM:
        return Finding("FAIL" if left <= FAIL_FROM else "WARN", until, step)
    # As the converge has it: a host that has another way in may expire too.
    if declared.get("accept_key_expiry") is True or declared.get(PUBLIC_SSHD) is True:
        return Finding("PASS", until)
    return Finding("WARN", f"{until} hosts.toml does not accept that (accept_key_expiry).", step)


CHECKS = (Check("tailnet", look), Check("key-expiry", look_at_expiry))
