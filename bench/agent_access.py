"""What a session of agent access costs over bare ssh-agent and ssh-add, and listing very many sessions.

    python -m bench.agent_access [--rounds N] [--sessions N] [--python FILE] [--output FILE] [--append PAGE]

Start-to-command is the time from starting the program (the zipapp, with `python3 -I`) to the first byte of
the command; bare is a shell that starts ssh-agent, loads the same key with ssh-add and runs the same command.
Both alternate in one run. Sessions to list are stopped ones, made of files alone.

JSON, schema 1: date (UTC), cores, cpu (its name), load (of one minute, when it began), python (its version),
rounds, start_ms {bare, session, overhead: {median, p95}}, list {sessions, median_ms}.
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
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from control.zipapp import build
from quietport.sshagent.names import now, stamp
from quietport.sshagent.process import Process, boot_id
from quietport.sshagent.record import Record, agent_env

SCHEMA = 1
ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build/bench/agent_access.json"
VARIABLE = "OPENCLAW_SSH_PRIVATE_KEY"
# `-k` ends the agent, as the session does; it comes after the byte that is waited for.
BARE = 'eval "$(ssh-agent -s)" >/dev/null; ssh-add -q -t 1800 - <"$1"; echo x; ssh-agent -k >/dev/null'


def start_ms(argv: Sequence[str], env: Mapping[str, str]) -> float:
    """Milliseconds from starting `argv` to its first output. Exits when it fails."""
    began = time.monotonic()
    with subprocess.Popen(argv, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stdout is None or process.stderr is None:
            sys.exit(f"{argv[0]} has no output.")
        first = process.stdout.read(1)
        passed = time.monotonic() - began
        process.stdout.read()
        complaint = process.stderr.read().decode(errors="replace")
    if first != b"x" or process.returncode != 0:
        sys.exit(f"{argv[0]} failed with exit code {process.returncode}: {complaint}")
    return passed * 1000


def measure_start(folder: Path, python: str, rounds: int) -> dict[str, dict[str, float]]:
    """Both ways, one after the other, `rounds` times."""
    key, program = folder / "k", folder / "quietport.pyz"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    program.write_bytes(build())
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "CODEX_"))}
    session = [
        python,
        "-I",
        str(program),
        "ssh-agent",
        "--runtime-root",
        str(folder / "r"),
        "--",
        "echo",
        "x",
    ]
    found: dict[str, list[float]] = {"bare": [], "session": [], "overhead": []}
    for _ in range(rounds):
        bare = start_ms(["sh", "-c", BARE, "sh", str(key)], env)
        whole = start_ms(session, {**env, VARIABLE: key.read_text()})
        for name, value in (("bare", bare), ("session", whole), ("overhead", whole - bare)):
            found[name].append(value)
    return machine.summed_up(found)


def make_sessions(root: Path, count: int) -> None:
    """`count` stopped sessions, as the program would have left them."""
    for place in (root, root / "sessions", root / "sockets"):
        place.mkdir(mode=0o700)
    gone = Process(1 << 21, 1, boot_id())
    moment = now() - timedelta(hours=2)
    for number in range(count):
        name = f"{moment:%Y%m%dT%H%M%SZ}-{number:08x}"
        record = Record(
            id=name,
            created_at=stamp(moment),
            expires_at=stamp(moment + timedelta(minutes=30)),
            ttl_s=1800,
            deadline_s=1.0,
            hosts=(),
            wrapper=gone,
            keeper=gone,
            agent=gone,
            status="stopped",
            ended_at=stamp(moment + timedelta(minutes=1)),
            duration_s=60.0,
            exit_reason="command-ended",
            exit_status=0,
        )
        place = root / "sessions" / name
        place.mkdir(mode=0o700)
        contents = {"session.json": record.to_bytes(), "agent.env": agent_env(root / "sockets" / name, gone)}
        for file, data in contents.items():
            (place / file).write_bytes(data)
            (place / file).chmod(0o600)


def measure_list(folder: Path, python: str, count: int) -> dict[str, float]:
    """`--list --json` of `count` sessions, the median of three."""
    root, program = folder / "many", folder / "quietport.pyz"
    make_sessions(root, count)
    argv = [python, "-I", str(program), "ssh-agent", "--list", "--json", "--runtime-root", str(root)]
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(argv, capture_output=True, check=True)
        times.append((time.monotonic() - began) * 1000)
        listed = [session["status"] for session in json.loads(done.stdout)["sessions"]]
        if listed != ["stopped"] * count:
            sys.exit(f"{len(listed)} sessions were listed, not {count} stopped ones.")
    return {"sessions": count, "median_ms": round(median(times))}


def document_of(
    start: Mapping[str, Mapping[str, float]],
    listed: Mapping[str, float],
    *,
    rounds: int,
    python: str,
    load: float,
) -> dict[str, Any]:
    """The JSON document, with the state of this machine."""
    return {
        "schema": SCHEMA,
        **machine.state(load=load, python=python),
        "rounds": rounds,
        "start_ms": start,
        "list": listed,
    }


def text_of(document: Mapping[str, Any]) -> str:
    """A table. Every number in it is the document's."""
    start, listed = document["start_ms"], document["list"]
    return f"""\
{machine.where(document)}

| start to command, {document["rounds"]} rounds | median | p95 |
|---|---|---|
{machine.rows(start)}

`--list --json` of {listed["sessions"]} sessions: {listed["median_ms"]} ms.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write FILE. Returns the exit code."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.agent_access", description=summary)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--python", default="/usr/bin/python3", metavar="FILE")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--append", type=Path, metavar="PAGE", help="add the table to this page of the docs")
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.sessions < 1:
        parser.error("--rounds must be at least 2, --sessions at least 1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        start = measure_start(Path(name), options.python, options.rounds)
        listed = measure_list(Path(name), options.python, options.sessions)
    document = document_of(start, listed, rounds=options.rounds, python=options.python, load=load)
    machine.write(document, options.output)
    title = "A session of agent access against bare ssh-agent and ssh-add"
    machine.append(options.append, title, text_of(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
