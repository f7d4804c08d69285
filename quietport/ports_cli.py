"""`quietport ports`: what listens, who can reach it, and whether that may be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietport.errors import FINE, PROBLEM, HostProgramError, printable
from quietport.ports import Judged, judge, report
from quietport.ss import parse_ss
from quietport.survey import survey
from quietport.table import aligned

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
    document = report(judged)
    print(json.dumps(document) if options.json else table(document["listeners"]))
    return PROBLEM if any(entry.verdict == "violation" for entry in judged) else FINE


def from_text(text: str) -> list[Judged]:
    """Judge the text of ss alone: address ranges decide, names are believed. Raises HostProgramError."""
    return [judge(listener, None) for listener in parse_ss(text)]


def table(listeners: Sequence[Mapping[str, Any]]) -> str:
    """The listeners of a report for a reader, the most exposed first, and below what there is to say of them.

    Those are the ways to mend the violations, and the reasons of declared exceptions.
    """
    if not listeners:
        return "Nothing listens."
    rows = [("EXPOSURE", "VERDICT", "PROTO", "ADDRESS", "PROCESS", "UNIT")]
    hints: list[str] = []
    for entry in sorted(listeners, key=_openness):
        protocol, where = _text(entry, "protocol"), _where(entry)
        process, unit = _text(entry, "process") or "-", _text(entry, "unit") or "-"
        rows.append((_text(entry, "exposure"), _text(entry, "verdict"), protocol, where, process, unit))
        if hint := _text(entry, "hint"):
            hints.append(f"{protocol} {where}: {hint}")
    return "\n".join(aligned(rows) + ([""] if hints else []) + hints)


def _openness(entry: Mapping[str, Any]) -> int:
    known = ["public", "private", "tailnet", "loopback"]
    return known.index(entry["exposure"]) if entry.get("exposure") in known else 0


def _text(entry: Mapping[str, Any], key: str) -> str:
    return printable(str(entry.get(key, "")))


def _where(entry: Mapping[str, Any]) -> str:
    address, port = _text(entry, "address"), _text(entry, "port")
    # Every port is 0: a tailnet service that has an address of its own.
    return f"[{address}]:{port}" if address.count(":") > 1 else f"{address}:{port}"


def _read(name: str) -> str:
    # Python has no stream at all for one that is closed (`<&-`).
    if name == "-" and sys.stdin is None:
        raise HostProgramError(
            "Standard input is closed, so there is no output of ss to read. "
            "Pipe `ss -lntup` into this, or name a file after --from-ss."
        )
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
