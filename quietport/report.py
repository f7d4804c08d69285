"""`quietport report`: the daily report of listening sockets, for whoever asks the host later."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from quietport.errors import FINE, PROBLEM
from quietport.hostfile import write_atomic
from quietport.ports import report
from quietport.survey import survey

REPORT = Path("/var/lib/quietport/ports.json")


def main(argv: list[str]) -> int:
    """Write the JSON of `quietport ports` with its time; 1 when it has violations, so the unit shows it."""
    parser = argparse.ArgumentParser(prog="quietport report", description=__doc__)
    parser.add_argument("--output", metavar="FILE", type=Path, default=REPORT, help=f"default: {REPORT}")
    options = parser.parse_args(argv)
    judged = survey()
    document = report(judged) | {"at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomic(options.output, (json.dumps(document, indent=1) + "\n").encode(), mode=0o640)
    violations = [entry for entry in judged if entry.verdict == "violation"]
    print(f"{len(judged)} listening sockets, {len(violations)} that may not be; written to {options.output}")
    for entry in violations:
        print(f"{entry.listener.protocol} {entry.listener.where} port {entry.listener.port}: {entry.hint}")
    return PROBLEM if violations else FINE
