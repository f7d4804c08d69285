"""`quietport ports`: what listens, who can reach it, and whether that may be."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from quietport.errors import FINE, PROBLEM, HostProgramError, printable
from quietport.ports import Judged, judge, report
from quietport.ss import Listener, parse_ss
from quietport.survey import survey

MAX_INPUT_BYTES = 64 << 20


def main(argv: list[str]) -> int:
    """Exit code 0 when nothing may not be, 1 for violations; input that cannot be read raises (3)."""
    parser = argparse.ArgumentParser(prog="quietport ports", description=__doc__)
    parser.add_argument(
        "--from-ss",
        metavar="FILE",
        help="read what `ss -lntup` printed instead of asking this host ('-': standard input)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(argv)
    judged = survey() if options.from_ss is None else from_text(_read(options.from_ss))
    print(json.dumps(report(judged)) if options.json else table(judged))
    return PROBLEM if any(entry.verdict == "violation" for entry in judged) else FINE


def from_text(text: str) -> list[Judged]:
    """Judge the text of ss alone: address ranges decide, names are believed. Raises HostProgramError."""
    return [judge(listener, None) for listener in parse_ss(text)]


def table(judged: list[Judged]) -> str:
    """The listeners for a reader, the most exposed first, and how to mend each violation."""
    if not judged:
        return "Nothing listens."
    order = ["public", "private", "tailnet", "loopback"]
    rows = [("EXPOSURE", "VERDICT", "PROTO", "ADDRESS", "PROCESS", "UNIT")]
    hints: list[str] = []
    for entry in sorted(judged, key=lambda entry: order.index(entry.exposure)):
        protocol, where = entry.listener.protocol, _where(entry.listener)
        rows.append((entry.exposure, entry.verdict, protocol, where, entry.process or "-", entry.unit or "-"))
        if entry.hint:
            hints.append(f"{protocol} {where}: {entry.hint}")
    lines = _aligned([[printable(cell) for cell in row] for row in rows])
    return "\n".join(lines + ([""] if hints else []) + hints)


def _where(listener: Listener) -> str:
    address = f"[{listener.where}]" if ":" in listener.address else listener.where
    return f"{address}:{listener.port}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _read(name: str) -> str:
    try:
        if name == "-":
            content = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with Path(name).open("rb") as stream:
                content = stream.read(MAX_INPUT_BYTES + 1)
    except OSError as error:
        raise HostProgramError(f"{name} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_INPUT_BYTES:
        raise HostProgramError(f"{name} is larger than {MAX_INPUT_BYTES} bytes.")
    return content.decode(errors="replace")
