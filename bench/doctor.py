"""What `quietport doctor` takes on a host, beside what somebody would type there instead.

    python -m bench.doctor NAME [--rounds N] [--output FILE]
    python -m bench.doctor --page FILE --append PAGE    from an earlier FILE

NAME is a converged host of the hosts file (QUIETPORT_HOSTS). `doctor` is `quietport doctor --json`, start
included; `by hand` is systemctl, tailscale, ufw, ss, sshd and docker one after the other, and nobody has read
their outputs yet. Both take turns in one login and are timed by the host's own clock.

JSON, schema 1: date (UTC), cores, cpu (its name), load (of one minute, when it began) of this machine, host,
rounds, ms {doctor, by hand: {median, p95}}.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from control.guard import LAUNCHER
from control.reach import open_session
from quietport.errors import FINE, PROBLEM

SCHEMA = 1
OUTPUT = Path(__file__).parents[1] / "build/bench/doctor.json"
DOCTOR = "doctor"
WAYS = {
    DOCTOR: f"{LAUNCHER} doctor --json",
    "by hand": "systemctl list-units --failed; tailscale status; ufw status verbose; ss -lntup; sshd -T; "
    "! command -v docker || docker ps",
}
ROUND_S = 30.0
# Microseconds by the host's clock, and the exit code.
_SCRIPT = """way() {
  began=$(date +%s%N); sh -c "$2" >/dev/null 2>&1; code=$?; ended=$(date +%s%N)
  printf '%s\\t%s\\t%s\\n' "$1" "$code" "$(( (ended - began) / 1000 ))"
}
"""


def script(ways: Mapping[str, str], rounds: int) -> str:
    """Shell that runs each way `rounds` times in turns, and prints way, exit code and microseconds."""
    turns = "; ".join(f"way {shlex.quote(name)} {shlex.quote(command)}" for name, command in ways.items())
    return f"{_SCRIPT}for _ in $(seq {rounds}); do {turns}; done"


def parse(text: str, *, rounds: int) -> dict[str, list[float]]:
    """Way = milliseconds of each round. Exits when a round is missing or the doctor could not tell."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        name, code, took = line.split("\t")
        if name == DOCTOR and int(code) not in (FINE, PROBLEM):
            sys.exit(f"the doctor ended with exit code {code}: what it takes then is no measurement.")
        found.setdefault(name, []).append(int(took) / 1000)
    if not found or any(len(times) != rounds for times in found.values()):
        sys.exit(f"not every way was taken {rounds} times.")
    return found


def document_of(
    found: Mapping[str, Sequence[float]], *, host: str, rounds: int, load: float
) -> dict[str, Any]:
    """The JSON document, with the state of this machine."""
    ms = machine.summed_up(found, digits=0)
    return {"schema": SCHEMA, **machine.state(load=load), "host": host, "rounds": rounds, "ms": ms}


def text_of(document: Mapping[str, Any]) -> str:
    """A table. Every number in it is the document's."""
    return f"""\
{machine.where(document)}

| {document["host"]}, {document["rounds"]} rounds | median | p95 |
|---|---|---|
{machine.rows(document['ms'])}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write FILE. Returns the exit code."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.doctor", description=summary)
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", type=Path, metavar="FILE", help="only the table, from an earlier FILE")
    parser.add_argument("--append", type=Path, metavar="PAGE", help="add the table to this page of the docs")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    if (options.name is None) == (options.page is None):
        parser.error("either NAME or --page")
    document = json.loads(options.page.read_text()) if options.page else measured(options)
    machine.append(options.append, "quietport doctor against what it asks, by hand", text_of(document))
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The document of a measurement, which is also written to FILE."""
    load = os.getloadavg()[0]
    with open_session(options.name) as session:
        done = session.run(script(WAYS, options.rounds), timeout=ROUND_S * options.rounds)
    found = parse(done.stdout.decode(errors="replace"), rounds=options.rounds)
    document = document_of(found, host=options.name, rounds=options.rounds, load=load)
    machine.write(document, options.output)
    return document


if __name__ == "__main__":
    sys.exit(main())
