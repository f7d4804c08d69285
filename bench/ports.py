"""What it costs to read and judge very many listening sockets, beside the plainest way to read them.

    python -m bench.ports [--sockets N] [--rounds N] [--python FILE] [--output FILE] [--append PAGE]

All ways read one text, as `ss -lntup` prints it, and take turns in one run. `split` is the peer: it cuts each
line at its blanks and takes columns, and misreads a name with a newline. `parse` is quietport's parser,
`judge` the same and the policy of a host, both in CPU time of this process. `program` is the whole of
`quietport ports --json --from-ss FILE` as a zipapp with `python3 -I`, start included, in wall time.

JSON, schema 1: date (UTC), cores, cpu (its name), load (of one minute, when it began), python (its version),
sockets, rounds, ms {split, parse, judge, program: {median, p95}}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from control.zipapp import build
from quietport.net import Interfaces
from quietport.ports import Evidence, judge_host, report
from quietport.processes import Program
from quietport.ss import parse_ss

SCHEMA = 1
OUTPUT = Path(__file__).parents[1] / "build/bench/ports.json"
HEADER = "Netid State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n"
# Each kind of address, so that no branch is measured alone.
_ADDRESSES = ("127.0.0.1", "[::1]", "100.64.0.7", "[fe80::1]%eth0", "[::ffff:10.0.0.5]", "0.0.0.0%tailscale0")
_HOST = Interfaces(
    owners={"100.64.0.7": ("tailscale0",), "10.0.0.5": ("eth0",)},
    kinds={"lo": "loopback", "eth0": "public", "tailscale0": "tailnet"},
)


def text_of_sockets(count: int) -> str:
    """What ss would print of `count` sockets, each held by two processes."""
    rows = []
    for number in range(count):
        address = _ADDRESSES[number % len(_ADDRESSES)]
        pid = 1000 + number
        rows.append(
            f"tcp   LISTEN 0      4096  {address}:{1 + number % 65535}      0.0.0.0:*    "
            f'users:(("worker",pid={pid},fd=6),("worker",pid={pid + 1},fd=6))\n'
        )
    return HEADER + "".join(rows)


def split(text: str) -> list[tuple[str, str, int, str]]:
    """The peer: protocol, address, port and the rest, by columns."""
    found = []
    for line in text.splitlines()[1:]:
        protocol, _, _, _, local, _, *users = line.split(maxsplit=6)
        address, _, port = local.rpartition(":")
        found.append((protocol, address, int(port), users[0] if users else ""))
    return found


def parse(text: str) -> int:
    """How many listeners quietport reads."""
    return len(parse_ss(text))


def judge(text: str) -> int:
    """How many of them are reported by the policy of a host."""
    listeners = parse_ss(text)
    programs = {
        process.pid: Program("worker.service", "/usr/bin/worker")
        for listener in listeners
        for process in listener.processes
    }
    return len(report(judge_host(Evidence(listeners, _HOST, programs)))["listeners"])


def cpu_ms(way: Callable[[str], int], text: str, count: int) -> float:
    """Milliseconds of CPU that `way` takes. Exits when it does not find `count` sockets."""
    began = time.process_time()
    found = way(text)
    passed = time.process_time() - began
    if found != count:
        sys.exit(f"{way.__name__} found {found} sockets, not {count}.")
    return passed * 1000


def program_ms(argv: Sequence[str], count: int) -> float:
    """Milliseconds from the start of the program to its end. Exits when its report is another one."""
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, check=False)
    passed = time.monotonic() - began
    try:
        found = len(json.loads(done.stdout)["listeners"])
    except (ValueError, KeyError):
        sys.exit(f"{argv[0]} failed with exit code {done.returncode}: {done.stderr.decode(errors='replace')}")
    if found != count:
        sys.exit(f"the program found {found} sockets, not {count}.")
    return passed * 1000


def measure(folder: Path, python: str, *, sockets: int, rounds: int) -> dict[str, dict[str, float]]:
    """All ways, one after the other, `rounds` times."""
    text = text_of_sockets(sockets)
    program, file = folder / "quietport.pyz", folder / "ss.txt"
    program.write_bytes(build())
    file.write_text(text)
    argv = [python, "-I", str(program), "ports", "--json", "--from-ss", str(file)]
    ways: dict[str, Callable[[str], int]] = {
        "split": lambda text: len(split(text)),
        "parse": parse,
        "judge": judge,
    }
    found: dict[str, list[float]] = {name: [] for name in (*ways, "program")}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(cpu_ms(way, text, sockets))
        found["program"].append(program_ms(argv, sockets))
    return machine.summed_up(found)


def text_of(document: Mapping[str, Any]) -> str:
    """A table. Every number in it is the document's."""
    return f"""\
{machine.where(document)}

| {document["sockets"]} sockets, {document["rounds"]} rounds | median | p95 |
|---|---|---|
{machine.rows(document['ms'])}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write FILE. Returns the exit code."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.ports", description=summary)
    parser.add_argument("--sockets", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--python", default="/usr/bin/python3", metavar="FILE")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--append", type=Path, metavar="PAGE", help="add the table to this page of the docs")
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.sockets < 1:
        parser.error("--rounds must be at least 2, --sockets at least 1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.python, sockets=options.sockets, rounds=options.rounds)
    document = {
        "schema": SCHEMA,
        **machine.state(load=load, python=options.python),
        "sockets": options.sockets,
        "rounds": options.rounds,
        "ms": found,
    }
    machine.write(document, options.output)
    machine.append(options.append, "quietport ports with very many sockets", text_of(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
