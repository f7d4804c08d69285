"""`quietport sshd-wait`: hold sshd back until the addresses it shall listen on are there.

sshd exits 255 when it can bind none of its addresses, and RestartPreventExitStatus=255 in Debian's
ssh.service then keeps it down for good: after a boot on which the tailnet comes up later than sshd, the
operator is locked out (tailscale#3340, and seen in the lab). Run as ExecStartPre= of ssh.service.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quietport.commands import output_of
from quietport.errors import FINE, PROBLEM, HostProgramError
from quietport.hostfile import host_settings
from quietport.net import parse_address

SSHD = "/usr/sbin/sshd"
POLL_S = 0.25
# The key of host.json that allows sshd on every address (break-glass).
PUBLIC_KEY = "sshd_may_be_public"


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


def wait_for(
    wanted: list[Wanted],
    *,
    timeout: float,
    there: Callable[[Wanted], bool] = bindable,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Wanted]:
    """Wait up to `timeout` seconds for all of `wanted`; returns those that are still missing."""
    deadline = clock() + timeout
    missing = [one for one in wanted if not there(one)]
    while missing and clock() < deadline:
        sleep(POLL_S)
        missing = [one for one in missing if not there(one)]
    # One may have gone again while we waited for another.
    return [one for one in wanted if not there(one)]


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
    wildcards, awaited = split_wildcards(parse_listen_addresses(output_of([SSHD, "-T", *config])))
    if wildcards and host_settings().get(PUBLIC_KEY) is not True:
        print(
            f"quietport sshd-wait: sshd would listen on every address ({wildcards[0].shown}), the public one "
            "included: it is not started. Name the tailnet address in a ListenAddress line of "
            "/etc/ssh/sshd_config.d/00-quietport.conf, and no wildcard anywhere."
        )
        return PROBLEM
    code, sentence = decide(awaited, wait_for(awaited, timeout=options.timeout), timeout=options.timeout)
    if sentence:
        print(f"quietport sshd-wait: {sentence}")
    return code
