"""What ten hosts cost against one: containers of the lab, one run of pyinfra against a loop of runs.

    python -m bench.fleet [--hosts N] [--output FILE]    measure, write FILE (JSON) and docs/benchmarks.md
    python -m bench.fleet --page FILE                    docs/benchmarks.md again, from an earlier FILE

JSON, schema 1: date (UTC), cores, cpu (its name), load (of one minute, when it began), hosts (how many),
measured: a list of {way, step, hosts, wall_s, cpu_s, peak_mib, changes}. `way` is fleet (all hosts in one
run) or loop (one run a host, one after the other; an entry a host); `step` is dry, apply or again. cpu_s and
peak_mib are the controller's, changes what the run announced or did. A run that fails, or a second run that
changes something, ends the measurement with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from tests.lab.story import BIN, DEPLOY, ROOT, Hosts, Lab

SCHEMA = 1
OUTPUT = ROOT / "build/bench/fleet.json"
PAGE = ROOT / "docs/benchmarks.md"
STEPS = {
    "dry": ("dry run", ("--dry", "--json")),
    "apply": ("converge of blank hosts", ("-y", "--json")),
    "again": ("second converge, no changes", ("-y", "--json")),
}


@dataclass(frozen=True)
class Measured:
    """One run of pyinfra."""

    way: str
    step: str
    hosts: int
    wall_s: float
    cpu_s: float
    peak_mib: int
    changes: int


def measure(hosts: Hosts, way: str, step: str, count: int, *more: str) -> Measured:
    """Run one step and take its time. Exits with what it said when it fails or changes what it must not."""
    argv = [str(BIN / "pyinfra"), "inventory", DEPLOY, *STEPS[step][1], *more]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **hosts.env()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        # Unlike wait(), this tells what the process itself has used.
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        out.seek(0)
        err.seek(0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code != 0:
            sys.exit(f"{way} {step}: exit code {code}\n{err.read()[-4000:].decode(errors='replace')}")
        changes = changes_in(json.loads(out.read()))
    if (changes == 0) != (step == "again"):
        sys.exit(f"{way} {step}: {changes} changes")
    found = Measured(
        way,
        step,
        count,
        round(wall, 1),
        round(used.ru_utime + used.ru_stime, 1),
        used.ru_maxrss // 1024,
        changes,
    )
    print(f"{way} {step} {' '.join(more)}: {found.wall_s} s, {found.changes} changes", flush=True)
    return found


def changes_in(document: Mapping[str, Any]) -> int:
    """How many (host, operation) pairs of pyinfra's JSON are changes; announced ones in a dry run."""
    results = document["results"]
    operations = results["operations"] if results else document["plan"]
    return sum(len(operation["success" if results else "hosts_with_change"]) for operation in operations)


def measure_all(count: int) -> list[Measured]:
    """Both ways, each on blank hosts of its own."""
    found = []
    for way in ("fleet", "loop"):
        lab = Lab.new(f"bench-{way}")
        names = [f"h{number:02}" for number in range(1, count + 1)]
        try:
            for name in names:
                lab.up(kind="container", distro="trixie", name=name)
            # Ten Docker engines on one machine would be measured, not what drives them.
            hosts = Hosts.of(lab, way, every={"docker_source": "none"})
            for step in STEPS:
                if way == "fleet":
                    found.append(measure(hosts, way, step, count))
                else:
                    found += [measure(hosts, way, step, 1, "--limit", name) for name in names]
            if way == "fleet":
                measure_doctor(hosts, names[0])
        finally:
            lab.down()
    return found


def measure_doctor(hosts: Hosts, name: str) -> None:
    """On a host that is converged anyway; bench.doctor writes its own document."""
    argv = [sys.executable, "-m", "bench.doctor", name]
    subprocess.run(argv, cwd=ROOT, env=hosts.env(), check=True)


def document_of(measured: Sequence[Measured], *, hosts: int, load: float) -> dict[str, Any]:
    """The JSON document, with the state of this machine."""
    return {
        "schema": SCHEMA,
        **machine.state(load=load),
        "hosts": hosts,
        "measured": [asdict(one) for one in measured],
    }


def page_of(document: Mapping[str, Any]) -> str:
    """docs/benchmarks.md. Every number in it is the document's."""
    count = document["hosts"]
    measured = [Measured(**one) for one in document["measured"]]
    rows = []
    for step, (title, _) in STEPS.items():
        (fleet,) = [one for one in measured if (one.way, one.step) == ("fleet", step)]
        loop = [one for one in measured if (one.way, one.step) == ("loop", step)]
        one = median(entry.wall_s for entry in loop)
        whole = sum(entry.wall_s for entry in loop)
        rows.append(
            f"| {title} | {one:.1f} s | {fleet.wall_s:.1f} s | {fleet.wall_s / one:.1f} | {whole:.1f} s "
            f"| {median(entry.cpu_s for entry in loop):.1f} s | {fleet.cpu_s:.1f} s | {fleet.peak_mib} MiB |"
        )
    table = "\n".join(rows)
    return f"""\
# Benchmarks

`make bench` made this page; nothing in it is typed by hand. It is not part of `make test`.

## {count} hosts against one

Containers with Debian 13 in the lab, without Docker (`docker_source = "none"`), with control server and \
package repository on the same machine: {document["cores"]} cores ({document["cpu"]}), load \
{document["load"]} before it began, {document["date"]}. The hosts share these cores with what drives them: \
the converge of blank hosts is mostly their installing packages, the dry run and the second converge are \
mostly the controller.

- *one*: the median of {count} runs with `--limit`, one host each.
- *{count} in one run*: `pyinfra inventory deploys/vps.py`.
- *{count} one by one*: the sum of those runs, what a plain loop over the hosts takes.

| | one | {count} in one run | times one | {count} one by one | controller's CPU: one | {count} | its memory: {count} |
|---|---|---|---|---|---|---|---|
{table}
"""  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or make the page of an earlier measurement. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", type=Path, metavar="FILE", help="only the page, from an earlier FILE")
    options = parser.parse_args(argv)
    if options.page is None:
        load = os.getloadavg()[0]
        document = document_of(measure_all(options.hosts), hosts=options.hosts, load=load)
        machine.write(document, options.output)
    else:
        document = json.loads(options.page.read_text())
    text = page_of(document)
    PAGE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
