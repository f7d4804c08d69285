"""Joining the tailnet and staying on it as declared."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from pyinfra import logger
from pyinfra.api.command import FunctionCommand, StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.connectors.util import CommandOutput
from pyinfra.context import host

from control import reach
from control import state as remembered_state
from control.connector import Unanswered
from control.errors import QuietportError
from control.secret import Secret, resolve
from control.settings import HostSettings
from facts.packages import Packages
from facts.tailnet import Tailnet
from facts.units import Units
from operations import apt, gate, notes
from operations.common import (
    Commands,
    executing,
    fail,
    no_room,
    one_host_at_most,
    operation,
    program,
    refuse,
    script,
)

SERVICE = "tailscaled.service"
UP_TIMEOUT_S = 60
ADDRESS_TIMEOUT_S = 30
JOIN_TIMEOUT_S = 180
STATE_MARK = "quietport-state="
OAUTH_PREFIX = "tskey-client-"
LOGGED_OUT = (None, "", "NoState", "NeedsLogin")

# $1 is how long `up` may take, $2 the key's size, the rest options; the key comes on standard input, and when
# the link is cut it ends early: an empty one would make `up` wait for a login by hand. It is a file that only
# root can reach, gone on every way out. A node that had no key of its own before is logged out when joining
# fails: tailscaled would go on trying with a refused key. While the control server does not answer, logging
# out does not make it forget the auth key: once the server is back, the key would be used up by a node that
# nobody waits for. A restart does. One that waits for approval waits on.
_JOIN = """set -eu
umask 077
limit=$1; size=$2; shift 2
work=$(mktemp -d /run/quietport-join.XXXXXXXXXX)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cat >"$work/key"
[ "$(wc -c <"$work/key")" -eq "$size" ] || { echo "the auth key was cut off on its way" >&2; exit 1; }
status() {
  timeout 15 tailscale status --json --peers=false 2>/dev/null | python3 -I -c \
    'import json, sys; s = json.load(sys.stdin); print(s.get("BackendState"), s.get("HaveNodeKey"))'
}
# Just started, tailscaled does not know yet whether it is logged in.
for second in $(seq 15); do
  case "$(status || true)" in ''|None*|NoState*|Starting*) sleep 1 ;; *) break ;; esac
done
before=$(status || true)
case "$before" in Running*) exit 0 ;; esac
timeout --kill-after=5 "$((limit + 20))" \
  tailscale up "--auth-key=file:$work/key" "--timeout=${limit}s" "$@" && exit 0
after=$(status || true)
echo "quietport-state=${after%% *}" >&2
case "$after,$before" in
  NeedsMachineAuth*|Running*|*True) ;;
  *)
    timeout 20 tailscale logout >/dev/null 2>&1 || true
    timeout 30 systemctl restart tailscaled || true
    ;;
esac
exit 1
"""

# Joined is not yet reachable: what counts is an address of the node's own on the interface.
_WAIT_FOR_ADDRESS = """for second in $(seq "$1"); do
  for address in $(timeout 10 tailscale ip 2>/dev/null); do
    if ip -o addr show dev tailscale0 2>/dev/null | grep -qF " $address/"; then exit 0; fi
  done
  sleep 1
done
echo "no tailnet address came up on tailscale0 within $1 s; see 'journalctl -u tailscaled'." >&2
exit 1
"""


@dataclass(frozen=True)
class Membership:
    """What a host is told about its tailnet; `auth_key` is the key's source, never the key."""

    hostname: str
    login_server: str
    auth_key: str | None = None
    tags: tuple[str, ...] = ()
    accept_dns: bool = True
    accept_routes: bool = False

    @classmethod
    def of(cls, name: str, settings: HostSettings) -> Membership:
        """The membership that `settings` describe for the host called `name`."""
        return cls(
            hostname=settings.hostname or name,
            login_server=settings.login_server,
            auth_key=settings.auth_key,
            tags=settings.tailscale_tags,
            accept_dns=settings.accept_dns,
            accept_routes=settings.accept_routes,
        )

    def preferences(self) -> dict[str, bool | str]:
        """Every preference that is declared, by the name the fact has for it."""
        return {
            "accept_dns": self.accept_dns,
            "accept_routes": self.accept_routes,
            "run_ssh": False,
            "shields_up": False,
            "hostname": self.hostname,
        }

    def up_options(self) -> tuple[str, ...]:
        """Options of `tailscale up`, without the key. All of them each time: `up` wants them named."""
        options = [f"--login-server={self.login_server}"]
        options += [_flag(name, value) for name, value in self.preferences().items()]
        if self.tags:
            options.append(f"--advertise-tags={','.join(self.tags)}")
        return tuple(options)


FLAGS = {
    "accept_dns": "accept-dns",
    "accept_routes": "accept-routes",
    "run_ssh": "ssh",
    "shields_up": "shields-up",
    "hostname": "hostname",
}


def _flag(name: str, value: bool | str) -> str:
    return f"--{FLAGS[name]}={str(value).lower() if isinstance(value, bool) else value}"


def key_to_use(key: Secret, *, tags: tuple[str, ...]) -> Secret:
    """The key as `tailscale up` gets it. An auth key is taken as it is.

    An OAuth client secret gets the attributes that make the node stay: tailscale's defaults for it are
    ephemeral=true and preauthorized=false (tailscale 1.102, feature/oauthkey/oauthkey.go), and an ephemeral
    node is deleted when it is offline for a while. Raises QuietportError when it asks for an ephemeral node
    itself, or has no tags.
    """
    text = key.reveal().strip().decode("utf-8", errors="surrogateescape")
    if not text.startswith(OAUTH_PREFIX):
        return key.stripped()
    secret, _, attributes = text.partition("?")
    values = dict(parse_qsl(attributes, keep_blank_values=True))
    # Go's strconv.ParseBool takes these for true; an empty value means the default, which is true as well.
    if values.get("ephemeral", "false").lower() in ("true", "t", "1", ""):
        raise QuietportError(
            "auth_key asks for an ephemeral node, which the tailnet deletes when it is offline for a while.",
            hint="Remove ephemeral=true from it.",
        )
    if not tags:
        raise QuietportError(
            "auth_key is an OAuth client secret, which joins tagged nodes only.",
            hint='Set tailscale_tags, such as ["tag:server"].',
        )
    values = {**values, "ephemeral": "false"}
    values.setdefault("preauthorized", "true")
    joined_text = f"{secret}?{urlencode(values)}"
    return Secret(joined_text.encode("utf-8", errors="surrogateescape"), source=key.source)


# Tailscale's keys and headscale's.
_KEY_TEXT = re.compile(r"[th]skey-[A-Za-z0-9_?=&%.-]+")


def redacted(text: str, key: Secret | None = None) -> str:
    """`text` without the key in it, and without anything that looks like one."""
    if key is not None:
        shown = key.reveal().decode("utf-8", errors="replace").strip()
        text = text.replace(shown, "***") if shown else text
    return _KEY_TEXT.sub("***", text)


def why_not_joined(said: str, state: str, *, login_server: str) -> str:
    """One sentence for a join that failed: what `tailscale up` said, and the state tailscaled is in after it.

    The words are those of Tailscale's control server and of headscale 0.29 (hscontrol/types/preauth_key.go).
    """
    text = said.lower()
    if reason := no_room(said):
        return reason
    if state == "NeedsMachineAuth":
        return NEEDS_APPROVAL
    if re.search(r"already (been )?used|has been used", text):
        return "the auth key was used up before. Make one for this host and set it as auth_key."
    if re.search(r"key.{0,40}expired|expired.{0,40}key", text):
        return "the auth key has expired. Make a new one and set it as auth_key."
    if re.search(r"invalid .{0,12}key|unable to validate|key.{0,60}(not (found|valid|exist)|invalid)", text):
        return f"the auth key was rejected by {login_server}. Make a new one there and set it as auth_key."
    if "tags" in text and re.search(r"not permitted|invalid|requested tags|require", text):
        return "the tailnet does not let this key have tailscale_tags. Correct them, or the tailnet's policy."
    if "requires mentioning all" in text:
        return (
            "tailscale on the host has settings of its own, which joining would reset. "
            "Log in by hand there once (`tailscale up` says with what), then run again."
        )
    if re.search(r"x509|certificate", text):
        return f"the certificate of {login_server} is not trusted here. Give the host its CA, or correct it."
    if not text or re.search(r"timeout waiting|timed out|no such host|refused|unreachable|dial tcp", text):
        return (
            f"{login_server} gave no answer within {UP_TIMEOUT_S} s. Look whether it is up, and reached from "
            "there (`journalctl -u tailscaled`), then run again."
        )
    return f"joining the tailnet failed: {said.strip().splitlines()[-1]}"


NEEDS_APPROVAL = (
    "the node waits for approval by an admin of the tailnet. Approve it in the admin console, then run again."
)


def blocking_reason(tailnet: dict[str, Any], settings: HostSettings) -> str | None:
    """Why firewall and ssh must stay untouched on this host, as a sentence; None when they need not.

    `tailnet` is what the fact Tailnet tells. A host that is not on its tailnet, or that will drop off it, is
    not made reachable through it alone.
    """
    return _leaving_reason(
        tailnet,
        login_server=settings.login_server,
        accept_key_expiry=settings.accept_key_expiry or bool(settings.break_glass_cidrs),
    )


def _leaving_reason(tailnet: dict[str, Any], *, login_server: str, accept_key_expiry: bool) -> str | None:
    reason = not_joined_reason(tailnet, login_server=login_server)
    if reason is not None:
        return reason
    if not tailnet["addresses"]:
        return "tailscale runs, but no address of its is on tailscale0. See `journalctl -u tailscaled` there."
    if tailnet["key_expiry"] and not accept_key_expiry:
        return (
            f"the node's key expires on {tailnet['key_expiry']}, and the host drops off the tailnet then. "
            "Disable key expiry for it (or join it with a tag), or set accept_key_expiry = true."
        )
    return None


def not_joined_reason(tailnet: dict[str, Any], *, login_server: str) -> str | None:
    """Why the host is not on the tailnet it belongs to, as a sentence; None when it is."""
    state = tailnet["backend_state"]
    if not tailnet["installed"] or not tailnet["running"]:
        return "tailscale does not run here. Look at `systemctl status tailscaled`."
    if tailnet["expired"]:
        return "the node's key has expired. Set auth_key to a fresh key and run again."
    if state in LOGGED_OUT:
        return "tailscale is logged out here. Set auth_key to a fresh key and run again."
    if state == "NeedsMachineAuth":
        return NEEDS_APPROVAL
    if state == "Stopped":
        return "tailscale was stopped here (`tailscale down`). Run `tailscale up` there, then run again."
    if not same_server(tailnet["login_server"], login_server):
        return (
            f"the host is on the tailnet of {tailnet['login_server']}, not of {login_server}. "
            "Correct login_server, or log it out there with `tailscale logout`."
        )
    return None


def same_server(one: str | None, other: str) -> bool:
    """Whether two addresses of a control server are the same, whatever slash they end with."""
    return (one or "").rstrip("/").lower() == other.rstrip("/").lower()


@operation()
def installed() -> Commands:
    """tailscale is installed and its service enabled and running."""
    if not host.get_fact(Packages, names=["tailscale"]).get("tailscale"):
        notes.because("tailscale is not installed")
        yield apt.install(("tailscale",))
    unit = host.get_fact(Units, names=[SERVICE]).get(SERVICE, {})
    if unit.get("active") == "active" and unit.get("enabled") == "enabled":
        host.noop("tailscale is installed and runs")
        return
    notes.because(
        f"{SERVICE} is {unit.get('active') or 'inactive'} and {unit.get('enabled') or 'absent'}, "
        "not active and enabled"
    )
    # Starting it is never a risk; stopping or restarting would be.
    yield program("systemctl", "enable", "--now", SERVICE, timeout=120)


@operation()
def joined(membership: Membership) -> Commands:
    """The host is on its tailnet, with an address on tailscale0. A host that is joined needs no key.

    The key goes from its source to the host's standard input, into a file only root reaches, and is gone
    afterwards. Refused with the reason: no key, another tailnet, stopped by hand, waiting for approval.
    """
    tailnet = host.get_fact(Tailnet)
    if tailnet["installed"] and tailnet["running"] and tailnet["backend_state"] not in LOGGED_OUT:
        reason = not_joined_reason(tailnet, login_server=membership.login_server)
        if reason is not None:
            yield refuse(reason)
        elif tailnet["addresses"]:
            host.noop("on the tailnet")
        else:
            notes.because("no tailnet address is on tailscale0")
            notes.unknown("whether an address comes up is not the host's to say")
            yield script(_WAIT_FOR_ADDRESS, str(ADDRESS_TIMEOUT_S), timeout=JOIN_TIMEOUT_S)
        return
    notes.because(_why_out(tailnet))
    if not tailnet["running"]:
        notes.depends("tailscaled's start, by which it may be on the tailnet already")
    if membership.auth_key is None:
        why = "its key on the tailnet has expired" if tailnet["expired"] else "it is not on the tailnet yet"
        yield refuse(f"{why}, and there is no auth_key. Set auth_key to a fresh key and run again.")
        return
    yield FunctionCommand(_join, (asdict(membership),), {})
    yield script(_WAIT_FOR_ADDRESS, str(ADDRESS_TIMEOUT_S), timeout=JOIN_TIMEOUT_S)


def _why_out(tailnet: dict[str, Any]) -> str:
    if not tailnet["running"]:
        return "tailscaled does not run"
    return "its key has expired" if tailnet["expired"] else "it is logged out"


@one_host_at_most
def _join(state: State, host: Host, membership: dict[str, Any]) -> bool:
    """Join now. The key is read from its source here, not at prepare: it may be made on request."""
    wanted = Membership(**membership)
    try:
        key = key_to_use(resolve(wanted.auth_key or "", what=f"{host.name}: auth_key"), tags=wanted.tags)
    except QuietportError as error:
        return _failed(host, str(error))
    arguments = (str(UP_TIMEOUT_S), str(len(key.reveal())), *wanted.up_options())
    command = script(_JOIN, *arguments, stdin=key, timeout=JOIN_TIMEOUT_S)
    ok, output = _run(host, command)
    if ok:
        return True
    if isinstance(output, Unanswered):
        return fail(host, output.sentence)
    lines = output.output_lines
    said = redacted("\n".join(line for line in lines if not line.startswith(STATE_MARK)), key)
    after = next((line.removeprefix(STATE_MARK) for line in lines if line.startswith(STATE_MARK)), "")
    logger.debug(f"{host.print_prefix}tailscale up: {said}")
    return _failed(host, why_not_joined(said, after, login_server=wanted.login_server))


def _run(host: Host, command: StringCommand) -> tuple[bool, CommandOutput]:
    # Output is never echoed: an error of tailscale may repeat a part of the key.
    arguments = command.connector_arguments
    return host.run_shell_command(command, print_output=False, print_input=False, **arguments)


def _failed(host: Host, sentence: str) -> bool:
    refusal = refuse(sentence)
    return bool(refusal.function(host.state, host, *refusal.args))


def drift(prefs: dict[str, Any], membership: Membership) -> tuple[str, ...]:
    """Options of `tailscale set` for the preferences that are not as declared."""
    return tuple(_flag(name, wanted) for name, _, wanted in _drifted(prefs, membership))


def _drifted(
    prefs: dict[str, Any], membership: Membership
) -> list[tuple[str, bool | str | None, bool | str]]:
    """(name, what it is, what it should be) of each preference that is not as declared."""
    wanted = membership.preferences()
    return [(name, prefs.get(name), value) for name, value in wanted.items() if prefs.get(name) != value]


def _was(value: bool | str | None) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@operation()
def preferences(membership: Membership) -> Commands:
    """tailscale's preferences are as declared: no Tailscale SSH, no shields, DNS, routes and name as set.

    A risky step on a host that is reached over the tailnet. Tags are asked for when joining only: `set` has
    no option for them.
    """
    tailnet = host.get_fact(Tailnet)
    if tailnet["installed"] and not tailnet["running"] and not executing():
        # The join starts it, and what it finds on the tailnet already it leaves as it is.
        notes.because("the preferences cannot be read")
        notes.unknown("tailscaled does not run")
        yield from gate.risky_if_tailnet(host, [_set(drift({}, membership))])
        return
    if not tailnet["running"] or tailnet["backend_state"] in LOGGED_OUT:
        host.noop("set when the host joins")
        return
    options = drift(tailnet["prefs"], membership)
    if not options:
        host.noop("the preferences are as declared")
        return
    others = _drifted(tailnet["prefs"], membership)
    notes.because(*(f"{FLAGS[name]} is {_was(now)}, not {_was(wanted)}" for name, now, wanted in others))
    yield from gate.risky_if_tailnet(host, [_set(options)])


def _set(options: Iterable[str]) -> StringCommand:
    # Switching Tailscale SSH off asks for confirmation where the session came through it.
    return program("tailscale", "set", "--accept-risk=lose-ssh", *options)


@operation()
def lasting(login_server: str, accept_key_expiry: bool) -> Commands:
    """The host stays on the tailnet. Else the run ends here for it, before firewall and ssh."""
    tailnet = host.get_fact(Tailnet)
    if tailnet["backend_state"] in LOGGED_OUT:
        host.noop("known after the join")
        return
    reason = _leaving_reason(tailnet, login_server=login_server, accept_key_expiry=accept_key_expiry)
    if reason is None:
        host.noop("on the tailnet to stay")
        return
    yield refuse(reason)


@operation()
def remembered(host_name: str) -> Commands:
    """The operator's side knows the host's tailnet addresses, so that the next connection goes there."""
    addresses = list(host.get_fact(Tailnet)["addresses"])
    if addresses and addresses == known_addresses(host_name):
        host.noop("remembered")
        return
    notes.because("the operator's side does not remember its tailnet addresses")
    if addresses:
        # Only this machine has to learn something: another operator's, or a CI's, did not converge it.
        notes.leaves_host()
    else:
        notes.depends("the join")
    yield FunctionCommand(_remember, (host_name, addresses), {})


def known_addresses(name: str) -> list[str]:
    """The tailnet addresses the operator's side remembers for the host called `name`."""
    return list(remembered_state.load(name).tailnet_addresses)


@one_host_at_most
def _remember(state: State, host: Host, name: str, addresses: list[str]) -> bool:
    if not addresses:
        return _failed(host, "no tailnet address is on tailscale0, so there is none to remember.")
    try:
        reach.remember_tailnet(name, addresses)
    except QuietportError as error:
        return _failed(host, str(error))
    return True
