"""The proof before anything that can cut the operator off: a new login over the tailnet works now.

It counts only when sshd itself accepted it with a key. Tailscale SSH answers the same port of the same
address with the host's own keys, also when sshd is dead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from control.dial import TAILSCALE_SSH, NoAnswer
from control.errors import QuietportError, ReachError
from control.reach import open_session
from control.session import Session

INTERFACE = "tailscale0"
PROOF_TIMEOUT_S = 20.0
# A path through the tailnet takes seconds to come up after a join, and after its relay was away.
PATIENCE_S = 30.0
AGAIN_S = 3.0
_SSHD = ("/usr/sbin/sshd", "/usr/lib/openssh/sshd-session")

# Prints the program of every ancestor, the nearest first. Field 4 of stat is the parent; the name in
# field 2 may hold anything, so everything up to the last ")" goes.
_ANCESTORS = r"""
pid=$$
while [ "$pid" -gt 1 ]; do
    readlink "/proc/$pid/exe" || echo unreadable
    stat=$(cat "/proc/$pid/stat") || exit 3
    set -- ${stat##*)}
    pid=$2
done
"""


@dataclass(frozen=True)
class Proof:
    """Whether the login worked, the sentence that says so, and the session when it did."""

    ok: bool
    sentence: str
    session: Session | None = None


def prove(name: str, addresses: Sequence[str] | None = None) -> Proof:
    """Log in to `name` anew, with a key, over the tailnet. Never raises for a host's sake.

    `addresses` are those on the tailnet interface now, as the caller read them from the host; without it,
    the remembered ones. While nothing answers there at all it is tried again, for PATIENCE_S seconds. The
    caller owns the session of a proof that is ok.
    """
    if addresses is not None and not addresses:
        return Proof(
            ok=False, sentence=f"{name}: no address is on {INTERFACE}: the host is not on the tailnet."
        )
    try:
        session = _new_login(name, addresses)
    except QuietportError as error:
        return Proof(ok=False, sentence=str(error))
    try:
        sentence = accepted(session)
    except (QuietportError, TimeoutError) as error:
        session.close()
        return Proof(ok=False, sentence=str(error))
    except BaseException:
        session.close()
        raise
    return Proof(ok=True, sentence=sentence, session=session)


def accepted(session: Session) -> str:
    """The sentence that a new login, made with keys only and the way forced, proves the tailnet path.

    Raises ReachError when sshd did not accept it, or not at an address of the tailnet's interface;
    TimeoutError when the host does not say.
    """
    _require_sshd(session)
    _require_interface(session)
    return f"{session.name}: a new key login over the tailnet ({session.address}) was accepted by sshd."


def prove_public(name: str) -> Proof:
    """Log in to `name` anew, with a key, at its public address. For the way back (deploys/undo.py).

    Never raises for a host's sake. The caller owns the session of a proof that is ok.
    """
    try:
        session = open_session(name, way="public", keys_only=True, timeout=PROOF_TIMEOUT_S)
    except QuietportError as error:
        return Proof(ok=False, sentence=str(error))
    try:
        _require_sshd(session)
        arrived, present = _arrival(session)
        if arrived is None or arrived in present:
            raise ReachError(
                f"{name}: the login at {session.address} arrived at {arrived or 'no known address'}, which "
                "is no public address of the host.",
                hint="Correct address in hosts.toml; the tailnet is not to be relied on here.",
            )
    except (QuietportError, TimeoutError) as error:
        session.close()
        return Proof(ok=False, sentence=str(error))
    except BaseException:
        session.close()
        raise
    sentence = f"{name}: a new key login at the public address ({session.address}) was accepted by sshd."
    return Proof(ok=True, sentence=sentence, session=session)


def _new_login(name: str, addresses: Sequence[str] | None) -> Session:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return open_session(
                name, way="tailnet", keys_only=True, addresses=addresses, timeout=PROOF_TIMEOUT_S
            )
        except NoAnswer:
            if time.monotonic() + AGAIN_S > end:
                raise
        time.sleep(AGAIN_S)


def _require_sshd(session: Session) -> None:
    """Raises ReachError unless the session descends from sshd, and from no tailscaled on the way."""
    if session.server_version.startswith(TAILSCALE_SSH):
        raise _tailscale_ssh(session)
    answer = session.run(_ANCESTORS, timeout=PROOF_TIMEOUT_S)
    programs = [
        line.removesuffix(" (deleted)") for line in answer.stdout.decode("utf-8", "replace").splitlines()
    ]
    for program in programs:
        if program in _SSHD:
            return
        if program.rpartition("/")[2] == "tailscaled":
            raise _tailscale_ssh(session)
    raise ReachError(
        f"{session.name}: the login at {session.address} was not accepted by the host's own sshd.",
        hint=f"Look on the host at what listens there: `ss -lntp`. Seen: {', '.join(programs) or 'nothing'}.",
    )


def _tailscale_ssh(session: Session) -> ReachError:
    return ReachError(
        f"{session.name}: Tailscale SSH answered at {session.address} instead of sshd.",
        hint="Run `tailscale set --ssh=false` on the host.",
    )


def _require_interface(session: Session) -> None:
    """Raises ReachError unless the address this connection arrived at is on the tailnet interface now.

    A provider's own 100.64.0.0/10 network carries such an address without any tailnet.
    """
    arrived, present = _arrival(session)
    if not present:
        raise ReachError(
            f"{session.name}: no address is on {INTERFACE}.", hint="Run `tailscale status` on the host."
        )
    if arrived not in present:
        raise ReachError(
            f"{session.name}: the login arrived at {arrived or 'no known address'}, "
            f"which is not on {INTERFACE} ({', '.join(sorted(present))}).",
            hint="Another network uses the tailnet's addresses on the way; look at the operator's routes.",
        )


def _arrival(session: Session) -> tuple[str | None, set[str]]:
    """The address of the host that this connection arrived at, and those on the tailnet interface now."""
    # Not as root: sudo drops SSH_CONNECTION.
    connection = session.run('echo "$SSH_CONNECTION"', timeout=PROOF_TIMEOUT_S, escalate=False)
    words = connection.stdout.decode("utf-8", "replace").split()
    shown = session.run(f"ip -o addr show dev {INTERFACE}", timeout=PROOF_TIMEOUT_S)
    fields = [line.split() for line in shown.stdout.decode("utf-8", "replace").splitlines()]
    present = {parts[3].split("/")[0] for parts in fields if len(parts) > 3}
    return words[2] if len(words) == 4 else None, present
