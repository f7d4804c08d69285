"""A scan of all ports of a host from outside of it, which goes on while the other specs are read."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from control import outside
from control.outside import Seen
from tests.spec.reading import Reading

# Its threads only wait for the scanner, which is a program of its own.
_POOL = ThreadPoolExecutor(max_workers=8, thread_name_prefix="scan")


def begin(reading: Reading) -> Future[Seen]:
    """Begin to scan all TCP ports of every public address of the host."""
    if outside.neighbour(reading.name) is not None:
        return _POOL.submit(outside.look, reading.name, [])
    links = reading.json("ip -j addr show scope global")
    return _POOL.submit(outside.look, reading.name, outside.addresses(reading.name, links))
