"""What a measurement was made on, and what the benchmarks write down in the same way."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any


def state(*, load: float, python: str = "") -> dict[str, Any]:
    """date (UTC), cores (that this process may use), cpu (its name), load (as given, of one minute).

    With an interpreter `python` (its file), also python, its version.
    """
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[1] if model else "unknown",
        "load": round(load, 1),
        **({"python": _version(python)} if python else {}),
    }


def _version(python: str) -> str:
    said = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def where(document: Mapping[str, Any]) -> str:
    """What `state` said, as the beginning of a section of the docs."""
    python = f"{document['python']}, " if "python" in document else ""
    return (
        f"{document['cores']} cores ({document['cpu']}), load {document['load']} before it began, "
        f"{python}{document['date']}."
    )


def summed_up(times: Mapping[str, Sequence[float]], *, digits: int = 1) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of the times of each way, of which there are two at least."""
    return {
        name: {"median": round(median(values), digits), "p95": round(quantiles(values, n=20)[-1], digits)}
        for name, values in times.items()
    }


def rows(found: Mapping[str, Mapping[str, float]]) -> str:
    """A line of a table for each way that was summed up."""
    return "\n".join(f"| {name} | {one['median']:g} ms | {one['p95']:g} ms |" for name, one in found.items())


def write(document: Mapping[str, Any], output: Path) -> None:
    """Write the JSON document to `output`, whose directory is made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")


def append(page: Path | None, title: str, text: str) -> None:
    """Add a section to a page of the docs, if there is one to add to; print it either way."""
    if page is not None:
        with page.open("a") as stream:
            stream.write(f"\n## {title}\n\n{text}")
    print(text)
