"""`quietport sshd-wait`: hold sshd back until the addresses it shall listen on are there.

sshd exits 255 when it can bind none of its addresses, and RestartPreventExitStatus=255 in Debian's
ssh.service then keeps it down for good: after a boot on which the tailnet comes up later than sshd, the
operator is locked out (tailscale#3340, and seen in the lab). Run as ExecStartPre= of ssh.service.

Those addresses are the ones that tailscale0 has today: where our drop-in names others, it is brought up to
date first, as `quietport sshd-follow` does it while sshd runs. So every start of sshd is one on the addresses
of that moment, also when the follower is dead.

On every address sshd is started only where that was declared (break-glass) and ufw keeps strangers out, or
where it was opened by hand. Else our own drop-in goes back to the tailnet's addresses: never in public, and
never without a way in for that.
"""

from __future__ import annotations

import argparse
import enum
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quietport import admission, opened, sshd, sshd_follow
from quietport.commands import output_of
from quietport.errors import FINE, PROBLEM, HostProgramError, printable
from quietport.hostfile import HOST_JSON, PUBLIC_SSHD, host_settings
from quietport.net import TAILNET_INTERFACE, parse_address
from quietport.rtnetlink import addresses_on
from quietport.sshd_apply import Failed, Host

SSHD = "/usr/sbin/sshd"
POLL_S = 0.25


@dataclass(frozen=True)
class Wanted:
    """One ListenAddress, as sshd itself resolved it. `zone` is the interface of a link-local address."""

    address: str
    zone: str = ""

    @property
    def shown(self) -> str:
        return f"{self.address}%{self.zone}" if self.zone else self.address


def parse_listen_addresses(text: str) -> list[Wanted]:
    """The `listenaddress` lines of `sshd -T`. Raises HostProgramError when there are none or one is odd."""
    pairs = (line.partition(" ") for line in text.splitlines())
    values = [value for keyword, _, value in pairs if keyword == "listenaddress"]
    if not values:
        raise HostProgramError("sshd -T names no listenaddress: this is not what sshd prints.")
    return list(dict.fromkeys(_wanted(value.strip()) for value in values))


def _wanted(value: str) -> Wanted:
    # sshd -T also prints "rdomain NAME" after the address when one is set.
    host, _, port = value.split(" ")[0].rpartition(":")
    address, _, zone = host.strip("[]").partition("%")
    try:
        parse_address(address)
    except ValueError as error:
        raise HostProgramError(f"sshd -T prints a listenaddress that is not one: {value!r}.") from error
    if not port.isdigit():
        raise HostProgramError(f"sshd -T prints a listenaddress without a port: {value!r}.")
    return Wanted(address=address, zone=zone)


def bindable(wanted: Wanted) -> bool:
    """Whether sshd could listen there now: on an interface, and for IPv6 no longer tentative."""
    family = socket.AF_INET6 if ":" in wanted.address else socket.AF_INET
    try:
        place = socket.getaddrinfo(wanted.shown, 0, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[0][
            4
        ]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def split_wildcards(wanted: list[Wanted]) -> tuple[list[Wanted], list[Wanted]]:
    """Wildcards, and the addresses worth waiting for: loopback is there before we are."""
    wildcards = [one for one in wanted if parse_address(one.address).is_unspecified]
    awaited = [one for one in wanted if one not in wildcards and not parse_address(one.address).is_loopback]
    return wildcards, awaited


class Step(enum.Enum):
    """What came of an attempt to bring the drop-in up to date."""

    DONE = "it is up to date, or left alone"
    WAIT = "it will have to change"
    CHANGED = "it was changed"


class CatchUp:
    """Brings the drop-in up to date while sshd is held back."""

    def __init__(
        self,
        host: Host,
        *,
        say: Callable[[str], None] = lambda sentence: None,
        hold: sshd_follow.Hold = sshd_follow.hold,
        addresses: Callable[[], tuple[str, ...]] = lambda: addresses_on(TAILNET_INTERFACE),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._say = say
        self._hold = hold
        self._addresses = addresses
        self._clock = clock
        self._steady = sshd_follow.Steadiness()
        self._given_up: sshd_follow.Seen | None = None

    def __call__(self, *, last: bool) -> Step:
        """One attempt. `last`: it is now or never; so long an absence of any address is believed then."""
        try:
            seen = sshd_follow.look(self._host, self._addresses())
            if seen.decision.text is None or seen == self._given_up:
                return Step.DONE
            if not last and self._steady.wait(seen.addresses, self._clock()) > 0:
                # With no address at all sshd is held back by the addresses it has, not by us.
                return Step.WAIT if seen.addresses else Step.DONE
            # Tried, never waited for: who holds the lock may be the one who is starting sshd.
            with self._hold(0):
                return self._place(seen)
        except HostProgramError:
            return Step.DONE

    def _place(self, seen: sshd_follow.Seen) -> Step:
        if sshd_follow.look(self._host, self._addresses()) != seen:
            return Step.WAIT
        try:
            sshd_follow.place(self._host, seen.decision)
        except HostProgramError as error:
            self._given_up = seen
            self._say(str(error))
            return Step.DONE
        self._say(seen.decision.sentence)
        return Step.CHANGED


def why_not_public() -> str:
    """Why sshd may not listen on every address, as a sentence; "" when it may."""
    if opened.read() is not None:
        return ""
    try:
        if host_settings().get(PUBLIC_SSHD) is not True:
            return f"{HOST_JSON} does not say that it may (break_glass_cidrs)."
    except HostProgramError as error:
        return str(error)
    return admission.firewall_problem()


def back_to_the_tailnet(
    host: Host,
    *,
    say: Callable[[str], None],
    hold: sshd_follow.Hold = sshd_follow.hold,
    addresses: Callable[[], tuple[str, ...]] = lambda: addresses_on(TAILNET_INTERFACE),
) -> bool:
    """Take the wildcards out of our own drop-in; False when that is not to be done, or did not work."""
    try:
        # Tried, never waited for: who holds the lock may be the one who is starting sshd.
        with hold(0):
            saved = host.read(sshd.DROP_IN)
            text = (saved.data or b"").decode()
            if not text.startswith(sshd.OURS) or saved.uid != os.geteuid() or saved.mode & 0o022:
                return False
            known = addresses()
            closed = sshd.with_addresses(text, known)
            listeners = frozenset(sshd.wanted_listeners(known))
            where = ", ".join(sorted(map(sshd.endpoint, listeners)))
            sentence = f"{sshd.DROP_IN} named every address and gets {where}."
            sshd_follow.place(host, sshd_follow.Decision(sentence, listeners, closed))
    except (HostProgramError, Failed, ValueError) as error:
        say(str(error))
        return False
    say(sentence)
    return True


def nothing_to_do(*, last: bool) -> Step:
    """For a configuration that is not the usual one."""
    return Step.DONE


def wait_for(
    read: Callable[[], list[Wanted]],
    *,
    timeout: float,
    catch_up: Callable[..., Step] = nothing_to_do,
    there: Callable[[Wanted], bool] = bindable,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[Wanted], list[Wanted]]:
    """Wait up to `timeout` seconds for all addresses that `read` tells; returns them and the missing ones.

    They are read again when `catch_up` has changed the drop-in.
    """
    deadline = clock() + timeout
    awaited = read()
    while True:
        last = clock() >= deadline
        step = catch_up(last=last)
        if step is Step.CHANGED:
            awaited = read()
        # All of them each time: one may have gone again while we waited for another.
        missing = [one for one in awaited if not there(one)]
        if last or (not missing and step is not Step.WAIT):
            return awaited, missing
        sleep(POLL_S)


def decide(awaited: list[Wanted], missing: list[Wanted], *, timeout: float) -> tuple[int, str]:
    """Exit code and sentence after the wait: one address that is there is better than no way in."""
    names = ", ".join(one.shown for one in missing)
    if not missing:
        return FINE, ""
    if len(missing) < len(awaited):
        return FINE, f"After {timeout:g} s {names} is on no interface; sshd starts on the others."
    return (
        PROBLEM,
        f"After {timeout:g} s {names} is on no interface; see `tailscale status`. systemd tries again.",
    )


def main(argv: list[str]) -> int:
    """Exit code 0 when sshd may start, 1 when it must not (systemd tries again)."""
    parser = argparse.ArgumentParser(prog="quietport sshd-wait", description=__doc__)
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="default: 60")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="sshd_config to read instead of the usual"
    )
    options = parser.parse_args(argv)
    config = ["-f", str(options.config)] if options.config else []
    host = Host()
    wildcards, _ = _read(config)
    reason = why_not_public() if wildcards else ""
    if reason:
        # Its own reason goes first: what is done about it may fail.
        _say(f"sshd would listen on every address, and may not: {reason}")
        if not config and back_to_the_tailnet(host, say=_say):
            wildcards, _ = _read(config)
        if wildcards:
            _say(
                f"sshd is not started on every address ({wildcards[0].shown}), the public one included. Name "
                f"the tailnet address in a ListenAddress line of {sshd.DROP_IN}, and no wildcard anywhere."
            )
            return PROBLEM
    catch_up = nothing_to_do if config else CatchUp(host, say=_say)
    awaited, missing = wait_for(lambda: _read(config)[1], timeout=options.timeout, catch_up=catch_up)
    code, sentence = decide(awaited, missing, timeout=options.timeout)
    if sentence:
        _say(sentence)
    return code


def _read(config: list[str]) -> tuple[list[Wanted], list[Wanted]]:
    return split_wildcards(parse_listen_addresses(output_of([SSHD, "-T", *config])))


def _say(sentence: str) -> None:
    print(f"quietport sshd-wait: {printable(sentence)}", flush=True)
