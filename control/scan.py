"""What is open over TCP, seen from where this runs. Standard library only: it runs in a namespace.

    python3 -I control/scan.py ports ADDRESS... [--ports 22,80-90]  {"schema": 1, "addresses": {...}}
    python3 -I control/scan.py connect ADDRESS PORT                {"schema": 1, "answer": "open"}
    python3 -I control/scan.py http URL                            {"schema": 1, "status": 200, "body": "..."}

Of an address: `open` (port numbers), `refused` (how many said no), `silent` (how many said nothing) and
`unreachable` (how many a router turned away). An address that answers nothing at all is all silence; only
an open port somewhere, seen by the same probe, makes that mean something.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import json
import resource
import selectors
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# What waits at a time, where the limit of open files allows it. With TIMEOUT it is also the pace of a scan of
# silent ports, about 12000 packets a second: an emulated machine's network card takes no more.
CONCURRENCY = 10000
# Seconds. The system asks again after one (RFC 6298, section 2.1): a single lost packet hides no port.
TIMEOUT = 1.7
# Nothing answers for one of these: not a port's "no", but the way to it.
UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EACCES, errno.EPERM)


@dataclass
class Seen:
    """What the ports of one address said."""

    open: list[int] = field(default_factory=list)
    refused: int = 0
    unreachable: int = 0
    silent: list[int] = field(default_factory=list)


def parse_ports(text: str) -> list[int]:
    """Port numbers of `22,80,8000-8100`. Raises ValueError for anything else."""
    ports: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[0] < 1 or numbers[-1] > 65535:
            raise ValueError(f"ports are 1 to 65535: {part!r}")
        ports.extend(numbers)
    return ports


def scan(address: str, ports: Iterable[int], *, timeout: float, concurrency: int, retries: int) -> Seen:
    """Connect to every port; those that stay silent are asked anew `retries` times. Times in seconds."""
    seen = Seen(silent=list(ports))
    for _ in range(retries + 1):
        # Without one answer there is nothing a lost packet could hide behind but the address itself.
        pending, seen.silent = seen.silent, []
        _round(address, pending, seen, timeout=timeout, concurrency=concurrency)
        if not seen.silent:
            break
    seen.open.sort()
    return seen


def _round(address: str, ports: Sequence[int], seen: Seen, *, timeout: float, concurrency: int) -> None:
    family = (
        socket.AF_INET6 if ipaddress.ip_address(address.partition("%")[0]).version == 6 else socket.AF_INET
    )
    where = socket.getaddrinfo(address, 0, family, socket.SOCK_STREAM)[0][4]
    # Whatever the system is best at: epoll on Linux, kqueue on macOS.
    poll = selectors.DefaultSelector()
    # Ordered by age. (A plain dictionary looks for its first entry past all that were deleted before.)
    waiting: OrderedDict[int, tuple[socket.socket, int, float]] = OrderedDict()
    rest = iter(ports)
    exhausted = False
    try:
        while waiting or not exhausted:
            while not exhausted and len(waiting) < concurrency:
                port = next(rest, None)
                if port is None:
                    exhausted = True
                    break
                _begin(family, (where[0], port, *where[2:]), port, seen, poll, waiting, timeout)
            for key, _ in poll.select(0.05):
                sock, port, _ = waiting.pop(key.fd)
                _judge(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), port, seen)
                _end(sock, poll)
            now = time.monotonic()
            # The oldest are first.
            while waiting:
                fd, (sock, port, end) = next(iter(waiting.items()))
                if end > now:
                    break
                del waiting[fd]
                seen.silent.append(port)
                _end(sock, poll)
    finally:
        poll.close()


def _begin(
    family: socket.AddressFamily,
    where: tuple[object, ...],
    port: int,
    seen: Seen,
    poll: selectors.BaseSelector,
    waiting: dict[int, tuple[socket.socket, int, float]],
    timeout: float,
) -> None:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    # Closed by a reset: no port of ours stays in TIME_WAIT, no service of theirs waits for us.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    code = sock.connect_ex(where)
    if code == errno.EINPROGRESS:
        poll.register(sock, selectors.EVENT_WRITE)
        waiting[sock.fileno()] = (sock, port, time.monotonic() + timeout)
        return
    _judge(code, port, seen)
    sock.close()


def _judge(code: int, port: int, seen: Seen) -> None:
    if code == 0:
        seen.open.append(port)
    elif code in (errno.ECONNREFUSED, errno.ECONNRESET):
        seen.refused += 1
    elif code in UNREACHABLE:
        seen.unreachable += 1
    else:
        seen.silent.append(port)


def _end(sock: socket.socket, poll: selectors.BaseSelector) -> None:
    poll.unregister(sock)
    sock.close()


def connect(address: str, port: int, *, timeout: float) -> str:
    """`open`, `refused`, `unreachable` or `silent`."""
    seen = scan(address, [port], timeout=timeout, concurrency=1, retries=0)
    if seen.open:
        return "open"
    if seen.refused:
        return "refused"
    return "unreachable" if seen.unreachable else "silent"


def http_get(url: str, *, timeout: float) -> dict[str, object]:
    """Status and the first 64 KiB of the body, or status 0 and the reason when nothing answers."""
    # No proxy: one that this machine is told to use is not on the public side.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return {"status": answer.status, "body": answer.read(65536).decode(errors="replace")}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read(65536).decode(errors="replace")}
    except OSError as error:
        return {"status": 0, "body": str(error)}


def raise_limit(wanted: int) -> int:
    """Allow that many open files where the hard limit does. Returns how many sockets may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted + 100 if hard == resource.RLIM_INFINITY else min(hard, wanted + 100)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(1, max(soft, allowed) - 100)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was seen as JSON."""
    parser = argparse.ArgumentParser(prog="scan.py")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("ports")
    verb.add_argument("addresses", nargs="+")
    verb.add_argument("--ports", type=parse_ports, default=parse_ports("1-65535"))
    verb.add_argument("--timeout", type=float, default=TIMEOUT)
    verb.add_argument("--concurrency", type=int, default=CONCURRENCY)
    verb.add_argument("--retries", type=int, default=0)
    verb = verbs.add_parser("connect")
    verb.add_argument("address")
    verb.add_argument("port", type=int)
    verb.add_argument("--timeout", type=float, default=3.0)
    verb = verbs.add_parser("http")
    verb.add_argument("url")
    verb.add_argument("--timeout", type=float, default=5.0)
    arguments = parser.parse_args(argv)
    answer: dict[str, object] = {"schema": 1}
    if arguments.verb == "ports":
        concurrency = min(arguments.concurrency, raise_limit(arguments.concurrency))
        found: dict[str, dict[str, object]] = {}
        for address in arguments.addresses:
            seen = scan(
                address,
                arguments.ports,
                timeout=arguments.timeout,
                concurrency=concurrency,
                retries=arguments.retries,
            )
            found[address] = {
                "open": seen.open,
                "refused": seen.refused,
                "unreachable": seen.unreachable,
                "silent": len(seen.silent),
            }
        answer["addresses"] = found
    elif arguments.verb == "connect":
        answer["answer"] = connect(arguments.address, arguments.port, timeout=arguments.timeout)
    else:
        answer.update(http_get(arguments.url, timeout=arguments.timeout))
    json.dump(answer, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
